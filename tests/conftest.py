"""What every test shares: which tests can run on this machine, and where the guests are.

Tests in tests/kvm and tests/guest are marked "kvm", those in tests/guest also "lab". A marked test is skipped where
it cannot run; when its mark is listed in PYKVM_REQUIRE (as in PYKVM_REQUIRE=kvm,lab, which the CI sets) it fails.
"""

from __future__ import annotations

import fcntl
import os
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FOLDER_MARKS = {"kvm": ("kvm",), "guest": ("kvm", "lab")}
# What is about pykvm's process and its terminal, not about KVM: the lab would only be slower at it
HOST_ONLY = frozenset({"test_bad_input.py", "test_follow.py", "test_cli.py", "test_cli_streams.py", "test_terminal.py"})
KVM_GET_API_VERSION = 0xAE00  # _IO(KVMIO, 0), <linux/kvm.h>
KVM_API_VERSION = 12


@cache
def kvm_obstacle() -> str | None:
    """Why /dev/kvm cannot be used here; None when it can."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
    except OSError as error:
        return f"/dev/kvm is no KVM: {error.strerror}"
    finally:
        os.close(fd)
    return None if version == KVM_API_VERSION else f"KVM API version {version} instead of {KVM_API_VERSION}"


def lab_obstacle() -> str | None:
    """Why a test of the lab cannot run here; None inside the lab."""
    return None if os.environ.get("PYKVM_LAB") == "1" else "runs only in the lab: scripts/test lab"


OBSTACLES = {"kvm": kvm_obstacle, "lab": lab_obstacle}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests by their folder."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        for name in FOLDER_MARKS.get(folder, ()):
            item.add_marker(name)
        if folder == "kvm" and item.path.name in HOST_ONLY:
            item.add_marker("host")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, or fail it when it was required."""
    required = os.environ.get("PYKVM_REQUIRE", "").split(",")
    for name, obstacle in OBSTACLES.items():
        reason = obstacle() if item.get_closest_marker(name) else None
        if reason and name in required:
            pytest.fail(f"PYKVM_REQUIRE={','.join(required)}: {reason}", pytrace=False)
        if reason:
            pytest.skip(reason)


@pytest.fixture(scope="session")
def images() -> Path:
    """The folder of the built test guests."""
    folder = TESTS.parent / "images" / "build"
    if not (folder / "hello.bin").exists():
        pytest.fail(f"the test guests are not built: make -C {folder.parent}", pytrace=False)
    return folder
