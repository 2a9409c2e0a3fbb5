"""Disks on a real /dev/kvm, with the virtio-blk driver of images/blk.c."""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import subprocess
import threading
from time import monotonic, sleep
from typing import TYPE_CHECKING

import command
import guests
import pytest
from qcow2 import qcow2

from pykvm.virtio.blk import Disk

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 4 << 20
BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """4 MiB of zeroes."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.mark.parametrize(
    ("cmdline", "options", "how"),
    [
        ("", {}, "polled"),
        ("", {"native": False}, "polled"),
        ("bytes=65536", {"direct": True}, "polled"),
        ("irq=1", {}, "by interrupt"),
        ("irq=1", {"thread": True}, "by interrupt"),
        ("irq=1", {"direct": True}, "by interrupt"),
        ("irq=1", {"native": False}, "by interrupt"),
    ],
)
def test_data_come_back(image: Path, cmdline: str, options: dict[str, bool], how: str) -> None:
    """A guest reads what it wrote, by C and by Python, polled and by interrupts, and the image holds it."""
    disk = Disk(image, **options)  # type: ignore[arg-type]
    outcome, text = guests.run("blk.elf", f"mode=check count=16 {cmdline}", devices=[disk])
    assert (outcome.kind, outcome.code) == ("DEBUG_EXIT", 0), text
    size = 65536 if "bytes" in cmdline else BLOCK
    assert f"blk: 16 blocks of {size} bytes, {how}, ok" in text
    assert disk.requests == {
        **dict.fromkeys(("get id", "discard", "write zeroes"), 0),
        "read": 16,
        "write": 16,
        "flush": 1,
    }
    numbers = struct.unpack(f"<{size // 8}Q", image.read_bytes()[3 * size : 4 * size])
    assert numbers == tuple(range(3 * 1000003, 3 * 1000003 + size // 8))


@pytest.mark.parametrize("direct", [False, True])
def test_python_serves_only_what_c_cannot(image: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Thousands of reads, many in flight, never reach Python."""
    disk = Disk(image, direct=direct)
    monkeypatch.setattr(disk, "on_request", lambda *_: pytest.fail("served by Python"))
    outcome, text = guests.run("blk.elf", "count=3000 depth=32", devices=[disk])
    assert (outcome.kind, outcome.code) == ("DEBUG_EXIT", 0), text
    assert disk.requests["read"] == 3000


def test_a_read_only_disk_stays_as_it_is(image: Path) -> None:
    """A guest that writes all the same gets an I/O error."""
    outcome, text = guests.run("blk.elf", "mode=probe type=1 sector=8", devices=[Disk(image, readonly=True)])
    assert "type 1 at sector 8: status 1" in text
    assert outcome.code == 0
    assert image.read_bytes() == bytes(SIZE)


def test_an_unknown_request(image: Path) -> None:
    """A type that nobody knows is unsupported, no more."""
    _, text = guests.run("blk.elf", "mode=probe type=77", devices=[Disk(image)])
    assert "status 2" in text


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize("kind", [0, 1], ids=["read", "write"])
def test_a_file_cut_short_under_a_running_guest(image: Path, kind: int, overlay: bool) -> None:
    """The guest sees an I/O error for what is gone, mapped or not; the machine goes on to its end. A write grows it."""
    disk = Disk(image, overlay=overlay)
    os.truncate(image, BLOCK)
    outcome, text = guests.run("blk.elf", f"mode=probe sector=8 type={kind}", devices=[disk])
    status = int(overlay or not kind)
    assert f"blk: {SIZE // 512} sectors, type {kind} at sector 8: status {status}" in text
    assert outcome.code == 0


@pytest.mark.host
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_full_file_system(tmp_path: Path, kind: str) -> None:
    """ENOSPC is an I/O error for the guest and one line for the user; with room again the guest's data are all kept.

    Of a qcow2 image's errors only the guest hears: qemu-storage-daemon tells nobody else.
    """
    if kind == "qcow2" and not shutil.which("qemu-storage-daemon"):
        pytest.skip("qemu-storage-daemon is not installed")
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    script = 'mount -t tmpfs -o size=1M none "$0" && cd "$0" && exec "$@"'
    if subprocess.run([*mount, script, tmp_path, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace or tmpfs can be had")
    image, folder = tmp_path / "empty.img", tmp_path / "small"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(SIZE)
    if kind == "qcow2":
        qcow2(image, SIZE)
    script = script.replace("cd", f'cp "{image}" "$0/disk.img" && head -c 700000 /dev/zero >"$0/ballast" && cd')
    words = ["--debug-exit", "--disk", f"disk.img,format={kind}", "--append", "mode=check count=100 retry=1"]
    process = subprocess.Popen(
        [*mount, script, folder, *command.COMMAND, "start", *words, guests.IMAGES / "blk.elf"],
        env=command.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        refused = process.stdout.readline()
        assert re.search(r"block \d+ refused: status 1", refused), refused + process.stderr.read()
        os.unlink(f"/proc/{process.pid}/root{folder}/ballast")
        output, errors = process.communicate(timeout=command.SECONDS)
    assert "blk: 100 blocks of 4096 bytes, polled, ok" in output and "refused" not in output
    assert process.returncode == 1  # debug-exit 0
    assert errors.count("\n") == errors.count("No space left on device") == int(kind == "raw"), errors


@pytest.mark.parametrize("direct", [False, True])
def test_a_reset_in_the_middle_of_load(image: Path, direct: bool) -> None:
    """A machine that is reset with many requests in flight, again and again, then runs to its end on the same disk."""
    disk = Disk(image, direct=direct)
    with guests.pc("blk.elf", "count=3000 depth=32 op=write", devices=[disk]) as machine:
        for _ in range(5):
            before = disk.requests["write"]
            machine.start()
            end = monotonic() + guests.RUN_S
            while disk.requests["write"] < before + 200:
                assert monotonic() < end, guests.text(machine)
                sleep(0.001)
            machine.pause()
            machine.reset()
        outcome = machine.run(guests.RUN_S)
    assert (outcome.kind, outcome.code) == ("DEBUG_EXIT", 0), guests.text(machine)
    assert disk.errors == 0


def test_split_irqchip(image: Path) -> None:
    """With the IOAPIC in Python, interrupts take their way from the irqfd through KVM's routes."""
    outcome, text = guests.run("blk.elf", "mode=check count=16 irq=1", devices=[Disk(image)], irqchip="split")
    assert (outcome.kind, outcome.code) == ("DEBUG_EXIT", 0), text
    assert "by interrupt, ok" in text


def test_several_disks(image: Path, tmp_path: Path) -> None:
    """Each disk has its own window and interrupt."""
    second = tmp_path / "second.img"
    second.write_bytes(bytes(SIZE))
    outcome, text = guests.run(
        "blk.elf", "mode=check count=4 irq=1 base=0xd0001000 gsi=17", devices=[Disk(image), Disk(second)]
    )
    assert (outcome.kind, outcome.code) == ("DEBUG_EXIT", 0), text
    assert image.read_bytes() == bytes(SIZE) != second.read_bytes()


def test_a_reset_machine_uses_its_disk_again(image: Path) -> None:
    """After a reset the driver starts anew on the same disk."""
    with guests.pc("blk.elf", "mode=check count=4", devices=[Disk(image)]) as machine:
        for _ in range(2):
            outcome = machine.run(guests.RUN_S)
            assert (outcome.kind, outcome.code) == ("DEBUG_EXIT", 0)
            machine.reset()
    assert guests.text(machine).count("ok") == 2


def test_a_slow_flush_holds_up_no_other_device(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thread of its own, a disk whose flush hangs leaves the machine's I/O thread to the others."""
    second = tmp_path / "second.img"
    second.write_bytes(bytes(SIZE))
    release, inside = threading.Event(), threading.Event()
    slow = Disk(second, thread=True, native=False)
    monkeypatch.setattr(slow.file, "flush", lambda: (inside.set(), release.wait(guests.RUN_S)))
    cmdline = "mode=check count=4 base=0xd0001000"
    with guests.pc("blk.elf", cmdline, devices=[Disk(image), slow]) as machine:
        machine.start()
        assert inside.wait(guests.RUN_S)
        alive = threading.Event()
        machine.io.call_soon(alive.set)
        assert alive.wait(guests.RUN_S)
        release.set()
        outcome = machine.wait(guests.RUN_S)
    assert outcome is not None and outcome.code == 0


@pytest.mark.host
@pytest.mark.parametrize("options", ["", ",direct"])
def test_kill_loses_no_flushed_write(image: Path, options: str) -> None:
    """A VMM killed in the middle of writes leaves every block that was flushed, whole."""
    blocks = 64
    process = command.spawn(
        *("--mem", "64M", "--disk", f"{image}{options}"),
        *("--append", f"mode=log count={blocks}", str(guests.IMAGES / "blk.elf")),
    )
    assert process.stdout is not None
    said = b""
    while b"flushed 100" not in said:
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece, said
        said += piece
    os.killpg(process.pid, signal.SIGKILL)
    said += process.communicate()[0]
    flushed = max(int(number) for number in re.findall(rb"flushed (\d+)\r", said))
    content = image.read_bytes()
    for number in range(max(1, flushed - blocks + 2), flushed + 1):  # the next but one may be half written over it
        at = number % blocks * BLOCK
        assert content[at : at + BLOCK] == struct.pack("<Q", number) * (BLOCK // 8), number


@pytest.mark.host
def test_command_line(image: Path) -> None:
    """--disk makes disks; what cannot be one is refused in a line, and so is an image that is in use."""
    guest = str(guests.IMAGES / "blk.elf")
    done = command.start("--debug-exit", "--disk", f"{image},id=root,queues=2", "--append", "mode=check count=2", guest)
    assert (done.returncode, done.stderr) == (1, "")
    held = Disk(image)
    for spec, reason in (
        (str(image), "locked"),
        (f"{image},rw", "'rw' is none of"),
        (f"{image},queues=x", "no number"),
        (f"{image},id={'x' * 21}", "20 printable"),
        (str(image.parent), "a directory is no disk"),
        ("", "no file given"),
    ):
        done = command.start("--disk", spec, guest)
        assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1, done
    held.close()
