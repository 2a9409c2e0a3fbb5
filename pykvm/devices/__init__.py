"""The legacy PC devices, one file each."""
