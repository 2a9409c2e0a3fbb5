"""Tests of kernels: the pytest plugin, and what drives a guest from outside (see README.md here)."""
