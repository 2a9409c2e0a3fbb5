"""Loaders: bytes of a kernel file into guest memory, plus the state of the first CPU."""
