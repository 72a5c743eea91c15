"""Sparse dictionaries: one architecture per file, found by name through the registry; files are read by `formats`."""
