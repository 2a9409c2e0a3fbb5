"""qcow2 disks on a real /dev/kvm: qemu-storage-daemon serves the driver of images/blk.c past pykvm."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import threading
from time import monotonic, sleep
from typing import TYPE_CHECKING

import guests
import pytest
from qcow2 import qcow2

from pykvm import Pc, SnapshotError, log, restore_file
from pykvm.virtio.imagedisk import ImageDisk
from pykvm.virtio.imagelayers import MAX_LAYERS, Stack

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 4 << 20
pytestmark = pytest.mark.skipif(
    not shutil.which("qemu-storage-daemon"), reason="qemu-storage-daemon (qemu-system-common) is not installed"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty disk of 4 MiB."""
    return qcow2(tmp_path / "disk.qcow2", SIZE)


@pytest.mark.parametrize(
    ("cmdline", "how", "queues"), [("", "polled", 1), ("irq=1", "by interrupt", 1), ("irq=1", "by interrupt", 2)]
)
def test_data_come_back(image: Path, cmdline: str, how: str, queues: int) -> None:
    """A guest reads what it wrote, and the image holds it; kicks and interrupts go straight to the daemon and back."""
    disk = ImageDisk(str(image), "qcow2", queues=queues)
    outcome, text = guests.run("blk.elf", f"mode=check count=16 {cmdline}", devices=[disk])
    assert (outcome.kind, outcome.code) == ("DEBUG_EXIT", 0), text
    assert f"blk: 16 blocks of 4096 bytes, {how}, ok" in text
    assert struct.pack("<512Q", *range(3 * 1000003, 3 * 1000003 + 512)) in image.read_bytes()


def test_a_read_only_disk_stays_as_it_is(image: Path) -> None:
    """A guest that writes all the same gets an I/O error."""
    before = image.read_bytes()
    disk = ImageDisk(str(image), "qcow2", readonly=True)
    outcome, text = guests.run("blk.elf", "mode=probe type=1 sector=8", devices=[disk])
    assert "type 1 at sector 8: status 1" in text
    assert outcome.code == 0 and image.read_bytes() == before


def test_a_damaged_image_is_said(image: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The guest gets an I/O error, and the user what the daemon has to say about it while it goes on."""
    log.configure()
    with image.open("r+b") as file:
        file.seek(40)
        file.seek(int.from_bytes(file.read(8), "big"))  # the L1 table: a table that is not aligned to a cluster
        file.write(struct.pack(">Q", 1 << 63 | 0x10200))
    with guests.pc("blk.elf", "mode=probe sector=8", devices=[ImageDisk(str(image), "qcow2")]) as machine:
        outcome = machine.run(guests.RUN_S)
        assert "type 0 at sector 8: status 1" in guests.text(machine) and outcome.code == 0
        said, end = "", monotonic() + guests.RUN_S
        while "image as corrupt: L2 table" not in said:
            assert monotonic() < end, said
            sleep(0.01)
            said += capfd.readouterr().err
    log.configure()
    assert "disk.qcow2" in said and "unaligned" in said


def test_a_reset_machine_uses_its_disk_again(image: Path) -> None:
    """After a reset the driver starts anew on the same disk, served by the same daemon."""
    disk = ImageDisk(str(image), "qcow2")
    process = disk.source.process  # type: ignore[attr-defined]
    with guests.pc("blk.elf", "mode=check count=4", devices=[disk]) as machine:
        for _ in range(2):
            outcome = machine.run(guests.RUN_S)
            assert (outcome.kind, outcome.code) == ("DEBUG_EXIT", 0)
            machine.reset()
        assert disk.source.process is process and process.poll() is None  # type: ignore[attr-defined]
    assert guests.text(machine).count("ok") == 2
    assert process.poll() is not None


def test_a_killed_daemon_is_replaced_under_the_guest(image: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """kill -9 of the daemon between two requests: a new one goes on where it was, the guest's data are all there."""
    log.configure()
    disk = ImageDisk(str(image), "qcow2")
    killed = threading.Event()
    with guests.pc("blk.elf", "mode=check count=200", devices=[disk]) as machine:
        original = disk.activate

        def activate(features: int) -> None:
            original(features)
            os.kill(disk.source.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            killed.set()

        disk.activate = activate  # type: ignore[method-assign]
        outcome = machine.run(guests.RUN_S)
        assert (outcome.kind, outcome.code) == ("DEBUG_EXIT", 0), guests.text(machine)
    log.configure()
    assert killed.is_set()
    said = capfd.readouterr().err
    assert "was started again" in said and "SIGKILL" in said


def go_on(machine: Pc) -> None:
    """Run until some more requests are served, however fast this host is."""
    queue = machine.virtio[0].queues[0]

    def served() -> int:
        return machine.memory.read_u16(queue.used + 2) if queue.enabled else 0

    goal, end = served() + 20, monotonic() + guests.RUN_S
    machine.start()
    while served() < goal:
        assert monotonic() < end
        sleep(0.0002)
    machine.pause()
    assert machine.outcome is None


def test_saved_and_restored_under_load(image: Path, tmp_path: Path) -> None:
    """A guest that verifies what it wrote goes through a file again and again, each time with a new daemon."""
    disk = ImageDisk(str(image), "qcow2")
    machine = guests.pc("blk.elf", "mode=check count=150 irq=1", devices=[disk])
    try:
        for _ in range(2):
            go_on(machine)
            machine.save(str(tmp_path / "vm"))
            machine.close()
            machine = restore_file(tmp_path / "vm")  # type: ignore[assignment]
        assert machine.run(guests.RUN_S).code == 0
        assert "blocks of 4096 bytes" in machine.console.text and machine.memory.slots[0].copied
    finally:
        machine.close()


def test_it_goes_on_after_it_was_saved(image: Path, tmp_path: Path) -> None:
    """Saving is no end; then the image is not the one of the file any more, which says so."""
    with guests.pc("blk.elf", "mode=check count=150 irq=1", devices=[ImageDisk(str(image), "qcow2")]) as machine:
        for _ in range(2):
            go_on(machine)
            machine.save(str(tmp_path / "vm"))
        assert machine.run(guests.RUN_S).code == 0
        with pytest.raises(SnapshotError, match="give it overlay, or ro"):
            machine.fork()
    with pytest.raises(SnapshotError, match="image has changed since"):
        restore_file(tmp_path / "vm")


def test_read_only_disks_are_forked_and_put_back(image: Path) -> None:
    """Each copy has a daemon of its own, and a machine that is put back reads on with the one that it has."""
    disk = ImageDisk(str(image), "qcow2", readonly=True)
    with guests.pc("blk.elf", "mode=probe sector=8", devices=[disk]) as machine:
        snapshot = machine.snapshot()
        with machine.fork() as copy, copy.fork() as third:
            for each in (third, copy, machine):
                assert each.run(guests.RUN_S).code == 0
                assert "type 0 at sector 8: status 0" in guests.text(each)
        machine.restore(snapshot)
        assert machine.run(guests.RUN_S).code == 0


def test_overlays_are_forked_under_load(image: Path) -> None:
    """Copies made in the middle of verified writes each go on with a disk of their own; the image stays as it is."""
    before = image.read_bytes()
    disk = ImageDisk(str(image), "qcow2", overlay=True)
    with guests.pc("blk.elf", "mode=check count=60 irq=1", devices=[disk]) as machine:
        copies = []
        for _ in range(2):
            go_on(machine)
            copies.append(machine.fork())
        snapshot = machine.snapshot()
        with pytest.raises(SnapshotError, match="cannot be saved to a file"):
            machine.save(str(image.parent / "vm"))
        for each in (*copies, machine):
            assert each.run(guests.RUN_S).code == 0, guests.text(each)
            assert "blocks of 4096 bytes" in guests.text(each)
        machine.restore(snapshot)
        assert machine.run(guests.RUN_S).code == 0
        for copy in copies:
            copy.close()
    assert image.read_bytes() == before


def test_what_one_copy_writes_no_other_sees(image: Path) -> None:
    """Each machine writes into a layer of its own; one in which nothing was written is no layer for the next one."""
    disk = ImageDisk(str(image), "qcow2", overlay=True)
    with guests.pc("blk.elf", "mode=check count=4", devices=[disk]) as machine:
        machine.restore(machine.snapshot())
        with machine.fork() as copy:
            (theirs,) = copy.find(ImageDisk)
            assert copy.run(guests.RUN_S).code == 0
            snapshot = copy.snapshot()
            assert theirs.stack is not None and len(theirs.stack.frozen) == 1 and theirs.stack.top.empty
            with copy.fork(snapshot) as third:
                assert third.find(ImageDisk)[0].stack.frozen == theirs.stack.frozen  # type: ignore[union-attr]
        assert disk.stack is not None and disk.stack.frozen == () and disk.stack.top.empty
        assert machine.run(guests.RUN_S).code == 0
        machine.snapshot()
        assert len(disk.stack.frozen) == 1


def test_too_many_layers() -> None:
    """A chain that grows by every snapshot is refused before it is slow; a layer of a large disk is a sound one."""
    stack = Stack(3 << 40)
    assert stack.top.empty and os.fstat(stack.top.fd).st_size == 4 << 16
    for _ in range(MAX_LAYERS):
        os.pwrite(stack.top.fd, b"\1", 3 << 16)
        stack.freeze()
    os.pwrite(stack.top.fd, b"\1", 3 << 16)
    with pytest.raises(SnapshotError, match="32 snapshots deep"):
        stack.freeze()
