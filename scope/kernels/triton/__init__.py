"""Triton kernels. Each is called through the function of `scope.kernels` that has its plain reference beside it.

Nothing here is imported where there is no CUDA device. With TRITON_INTERPRET=1 they run on the CPU, for tests.
"""
