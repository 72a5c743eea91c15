"""Benchmarks: ours, its peers and its floor in one run, as ratios. `RESULTS.md` keeps what was measured where.

Each benchmark measures the machine that it runs on. What is compared takes turns (`rounds`), and the best of each
counts: noise of a shared machine only ever slows things down.
"""
