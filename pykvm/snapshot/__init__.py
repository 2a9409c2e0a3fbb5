"""Saving, copying and restoring machines."""
