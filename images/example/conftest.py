"""Builds the kernel that the tests boot."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pykvm_kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of kernel.elf, built once for the session."""
    build = tmp_path_factory.mktemp("kernel")
    subprocess.run(["make", "-s", "-C", str(Path(__file__).parent), f"BUILD={build}"], check=True)
    return str(build / "kernel.elf")
