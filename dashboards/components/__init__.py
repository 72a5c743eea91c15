"""Reusable pieces of the pages. They take plain values and return Dash components; none registers a callback."""
