"""Shared folders and QEMU's image formats: command lines, errors, and real processes that never outlive pykvm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qcow2 import qcow2

from pykvm.cli.devices import MAKERS
from pykvm.errors import ConfigError, UsageError
from pykvm.virtio import share as share_module
from pykvm.virtio.imagedisk import ImageDisk
from pykvm.virtio.share import Share, Virtiofsd

C_HELP, RUST_HELP = "-o source=PATH", "--shared-dir <SHARED_DIR>"


def virtiofsd_obstacle() -> str:
    """Why no folder can be shared here; "" when one can."""
    try:
        Virtiofsd("/", False, "auto")
    except ConfigError as error:
        return str(error)
    return ""


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="the older virtiofsd is for root only")
needs_virtiofsd = pytest.mark.skipif(bool(virtiofsd_obstacle()), reason=virtiofsd_obstacle())
needs_storage_daemon = pytest.mark.skipif(
    not shutil.which("qemu-storage-daemon"), reason="qemu-storage-daemon is not installed"
)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtiofsd that does nothing."""
    path = tmp_path / "virtiofsd"
    path.write_text("#!/bin/sh\necho nothing to share >&2\nexit 3\n")
    path.chmod(0o755)
    monkeypatch.setenv("PYKVM_VIRTIOFSD", str(path))
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (C_HELP, ["-f", "--fd=9", "source=/a\\,b", "cache=none", "log_level=err"]),
        (RUST_HELP, ["--fd=9", "--shared-dir=/a,b", "--cache=never", "--log-level=error"]),
    ],
)
def test_both_command_lines(program: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: list[str]) -> None:
    """Debian 12's virtiofsd (C) and the later one (Rust) get the words that they know."""
    monkeypatch.setattr(share_module, "_help", lambda path: text)
    command = Virtiofsd("/a,b", False, "never").command(9)
    assert command[0] == str(program) and [word for word in command if word in words] == words
    assert any("sandbox=" in word for word in command)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(C_HELP, "-f --fd=N -o source={} -o cache=auto -o sandbox=S -o log_level=err", marks=as_root),
        (RUST_HELP, "--fd=N --shared-dir={} --cache=auto --sandbox=S --log-level=error"),
    ],
    ids=["C", "Rust"],
)
def test_the_program_is_asked_which_it_is(program: Path, tmp_path: Path, text: str, words: str) -> None:
    """By --help, which both have; then it is run with its own words."""
    told = tmp_path / "told"
    program.write_text(f'#!/bin/sh\n[ "$1" != --help ] || {{ echo "{text}"; exit; }}\necho "$*" >{told}\nexit 3\n')
    with pytest.raises(ConfigError, match="ended with status 3"):
        Share(str(tmp_path), tag="x")
    said = re.sub(r"(--fd=)\d+|(sandbox=)\w+", lambda found: "--fd=N" if found[1] else "sandbox=S", told.read_text())
    assert said.removesuffix(" --rlimit-nofile=0\n").rstrip() == words.format(tmp_path)


def test_virtiofsd_that_ends(program: Path, tmp_path: Path) -> None:
    """A virtiofsd that ends at its start: its status and its words in one line."""
    with pytest.raises(ConfigError, match=r"virtiofsd ended with status 3 \(nothing to share\)"):
        Share(str(tmp_path), tag="x")


def test_missing_virtiofsd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the program the error names the package."""
    monkeypatch.setattr(share_module, "PLACES", ())
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("PYKVM_VIRTIOFSD", raising=False)
    with pytest.raises(ConfigError, match="apt-get install virtiofsd"):
        Share(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("/nonexistent", "is no folder"),
        ("/etc/hostname", "is no folder"),
        ("/tmp:" + 37 * "x", "1 to 36 bytes"),
        ("/tmp,cache=some", "none of auto, always, never"),
        ("/tmp,rw", "none of ro"),
        (":tag", "no folder given"),
    ],
)
def test_wrong_shares(spec: str, words: str) -> None:
    """What --share cannot mean is said in one line."""
    with pytest.raises(UsageError, match=words):
        MAKERS["share"](spec)


def test_only_root_can_use_the_older_one(program: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """QEMU's virtiofsd drops groups and so needs root: said in one line instead of its own words."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(share_module, "_help", lambda path: C_HELP)
    with pytest.raises(ConfigError, match="works for root only"):
        Share(str(tmp_path))
    monkeypatch.setattr(share_module, "_help", lambda path: RUST_HELP)
    assert "--rlimit-nofile=0" in Virtiofsd("/a", False, "auto").command(3)


@needs_virtiofsd
def test_tags(tmp_path: Path) -> None:
    """The tag is the given one or the folder's name; a colon in an existing folder's name is no separator."""
    odd = tmp_path / "a:b"
    odd.mkdir()
    for spec, tag in ((str(odd), "a:b"), (f"{odd}:c,ro", "c")):
        device = MAKERS["share"](spec)
        assert isinstance(device, Share)
        assert device.config() == tag.encode().ljust(36, b"\0") + struct.pack("<I", 1)
        assert (device.path, device.readonly) == (str(odd), spec.endswith(",ro"))
        device.close()


@needs_virtiofsd
@pytest.mark.skipif(os.geteuid() != 0, reason="looks into a process of root's")
def test_the_root_read_only() -> None:
    """All of the host's files can be shared, and virtiofsd then has no mount that can be written but its own /proc."""
    device = Share("/", tag="all", readonly=True)
    (child,) = [pid for pid in group_members(device.source.process.pid) if pid != device.source.process.pid]  # type: ignore[attr-defined]
    assert {"etc", "usr"} <= {path.name for path in Path(f"/proc/{child}/root").iterdir()}
    mounts = [line.split() for line in Path(f"/proc/{child}/mountinfo").read_text().splitlines()]
    writable = [words[4] for words in mounts if "ro" not in words[5].split(",")]
    assert all(path.startswith("/proc") for path in writable), writable
    device.close()


def group_members(group: int) -> list[int]:
    """The processes of a process group that are not zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
        except OSError:
            continue
        if fields and fields[0] != "Z" and int(fields[2]) == group:
            found.append(int(entry.name))
    return found


def wait_gone(group: int) -> None:
    """Wait until a process group has ended."""
    deadline = time.monotonic() + 10
    while group_members(group):
        assert time.monotonic() < deadline, "a back end is still there"
        time.sleep(0.02)


MAKE = {
    "share": "from pykvm.virtio.share import Share; device = Share(sys.argv[1], readonly=True)",
    "disk": "from pykvm.virtio.imagedisk import ImageDisk; device = ImageDisk(sys.argv[1] + '/disk.qcow2', 'qcow2')",
}


@pytest.mark.parametrize(
    "kind", [pytest.param("share", marks=needs_virtiofsd), pytest.param("disk", marks=needs_storage_daemon)]
)
def test_kill_nine_leaves_nothing(tmp_path: Path, kind: str) -> None:
    """After kill -9 of pykvm its back end ends as well, and no socket is left; even if the starting thread is gone."""
    qcow2(tmp_path / "disk.qcow2", 1 << 20)
    (tmp_path / "tmp").mkdir()
    code = f"""
import sys, threading, time
def make():
    global device
    {MAKE[kind]}
thread = threading.Thread(target=make); thread.start(); thread.join()
print(device.source.process.pid, flush=True)
time.sleep(60)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as owner:
        assert owner.stdout is not None
        group = int(owner.stdout.readline())
        time.sleep(0.1)
        assert group_members(group)
        owner.send_signal(signal.SIGKILL)
    wait_gone(group)
    assert list((tmp_path / "tmp").iterdir()) == []


@needs_storage_daemon
def test_image_disk(tmp_path: Path) -> None:
    """A qcow2 image's virtual size is the disk's; the daemon ends with the device."""
    device = ImageDisk(str(qcow2(tmp_path / "disk, 1.qcow2", 3 << 20)), "qcow2", queues=2)
    assert struct.unpack_from("<Q", device.config()) == ((3 << 20) // 512,)
    assert len(device.queue_sizes) == 2
    group = device.source.process.pid  # type: ignore[attr-defined]
    device.close()
    assert not group_members(group)


@needs_storage_daemon
def test_format_is_not_guessed(tmp_path: Path) -> None:
    """A raw file offered as qcow2 is refused in the daemon's words."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1 << 16))
    with pytest.raises(ConfigError, match=r"qemu-storage-daemon ended with status 1 .*not in qcow2 format"):
        ImageDisk(str(raw), "qcow2")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{}/none.qcow2,format=qcow2", "is no file"),
        ("{}/disk.qcow2,format=guess", "format=guess is none of raw, qcow2"),
        ("{}/disk.qcow2,format=qcow2,queues=0", "between 1 and 16"),
        ("{}/disk.qcow2,format=qcow2,id=x", "id is for raw images"),
    ],
)
def test_wrong_image_disks(tmp_path: Path, spec: str, words: str) -> None:
    """What --disk cannot do with a format is said in one line."""
    qcow2(tmp_path / "disk.qcow2", 1 << 20)
    with pytest.raises(UsageError, match=words):
        MAKERS["disk"](spec.format(tmp_path))
