"""kill -9 of pykvm with every device that has a helper or a socket: nothing of it is left, and the next start works."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import command
import guests
import pytest
from qcow2 import qcow2

VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not shutil.which("qemu-storage-daemon"), reason="qemu-storage-daemon is not installed"),
    pytest.mark.skipif(
        os.geteuid() != 0 or not any(map(os.path.exists, VIRTIOFSD)), reason="needs virtiofsd, and root for QEMU's"
    ),
]


def mentioning(text: str) -> list[str]:
    """The command lines of the processes that have `text` in their environment."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdigit() and text.encode() in (place / "environ").read_bytes():
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_everything_at_once_killed_and_started_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Helpers end, sockets in the way are replaced, images are free again."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))  # also what the processes are known by
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    words = ["--mem", "64M", "--debug-exit", "--disk", str(image), "--share", f"{tmp_path}:work"]
    words += ["--disk", f"{qcow2(tmp_path / 'disk.qcow2', 1 << 20)},format=qcow2", "--vsock", f"3:{tmp_path}/vsock"]
    words += ["--console", f"unix:{tmp_path}/agent,port=agent", "--gdb", f"unix:{tmp_path}/gdb", "--rng", "--balloon"]
    process = command.spawn(*words, "--append", "mode=log count=64", str(guests.IMAGES / "blk.elf"))
    assert process.stdout is not None and process.stderr is not None
    said = b""
    while b"flushed 5\r" not in said:
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece, process.stderr.read()
        said += piece
    helpers = "\n".join(mentioning(str(tmp_path)))
    assert re.search("qemu-storage-daemon", helpers) and re.search("virtiofsd", helpers)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    end = time.monotonic() + 20
    while left := mentioning(str(tmp_path)):
        assert time.monotonic() < end, left
        time.sleep(0.02)
    assert list((tmp_path / "tmp").iterdir()) == []
    again = command.start(*words, "--append", "mode=check count=2", str(guests.IMAGES / "blk.elf"))
    assert again.returncode == 1, again  # debug-exit 0
    assert "2 blocks of 4096 bytes, polled, ok" in again.stdout
    assert not {"vsock", "agent", "gdb"} & {entry.name for entry in tmp_path.iterdir()}
