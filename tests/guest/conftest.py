"""What the tests of the lab share: Debian's kernel as a guest, an initramfs for it, and a console to talk to it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pexpect
import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONSOLE_SECONDS = 120  # for one expectation; the lab's CPU is emulated and may share its machine


@pytest.fixture(scope="session")
def guest_kernel() -> Path:
    """The bzImage of Debian's cloud kernel (set by scripts/lab)."""
    return Path(os.environ["PYKVM_GUEST_KERNEL"])


@pytest.fixture(scope="session")
def guest_modules() -> Path:
    """The modules of that kernel: VERSION/modules.dep and so on (set by scripts/lab)."""
    return Path(os.environ["PYKVM_GUEST_MODULES"])


@pytest.fixture(scope="session")
def initramfs(images: Path) -> Path:
    """A busybox initramfs: a shell on the console, or `pykvm.run=COMMAND` and power off."""
    return images / "initramfs.cpio.gz"


@pytest.fixture
def start() -> Iterator[Callable[..., pexpect.spawn[str]]]:
    """start(ARGUMENT...) runs `pykvm start ARGUMENT...` on a terminal; what still runs after the test is killed.

    All that a guest prints is shown with a failing test.
    """
    running: list[pexpect.spawn[str]] = []

    def run(*arguments: str | Path) -> pexpect.spawn[str]:
        command = ["-m", "pykvm", "start", *map(str, arguments)]
        console = pexpect.spawn(
            sys.executable, command, timeout=CONSOLE_SECONDS, encoding="utf-8", codec_errors="replace"
        )
        console.logfile_read = sys.stdout
        running.append(console)
        return console

    yield run
    for console in running:
        console.close(force=True)
