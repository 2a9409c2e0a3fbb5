"""Disks with overlays in snapshot files: what the guest wrote to them is in the file, the image is not."""

from __future__ import annotations

import gc
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import guests
import pytest
from cguest import build
from command import run
from test_snapshot import SOURCE, say
from test_snapshot_file import refused, sealed_is_refused

from pykvm import Machine, Outcome, Pc, SnapshotError, restore_file
from pykvm.core import reaper
from pykvm.snapshot.format import PAGE
from pykvm.snapshot.load import load
from pykvm.virtio.blk import Disk
from pykvm.virtio.net import Net
from pykvm.virtio.rate import RateLimit, numbers_of
from pykvm.virtio.rng import Rng

SIZE = (4 << 20) + 512
WRITES = ((0, b"first"), (1 << 20, bytes(4096)), ((1 << 20) + 65000, b"across" * 2000), (SIZE - 512, b"last" * 128))
MORE = ((8192, b"more"), (2 << 20, b"new" * 30000))


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A guest that counts the characters it gets."""
    return build(tmp_path_factory.mktemp("guest"), SOURCE)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image whose last page is not whole."""
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(5).randbytes(SIZE))
    return path


@pytest.fixture
def vm(guest: str, image: Path) -> Iterator[Pc]:
    """A machine with that disk, on which WRITES were written."""
    with Pc(guest, memory="4M", memfd=True, devices=[Disk(image, overlay=True)]) as machine:
        machine.console.expect("ready")
        write(machine, WRITES)
        yield machine


def write(machine: Machine, what: tuple[tuple[int, bytes], ...]) -> None:
    """As the device does for the guest."""
    assert isinstance(machine, Pc)
    for offset, data in what:
        machine.virtio[0].device.file.write([memoryview(data)], offset)  # type: ignore[attr-defined]


def content(machine: Machine) -> bytes:
    """The disk, as the guest has it."""
    assert isinstance(machine, Pc)
    buffer = bytearray(SIZE)
    machine.virtio[0].device.file.read([memoryview(buffer)], 0)  # type: ignore[attr-defined]
    return bytes(buffer)


def changed(data: bytes, *batches: tuple[tuple[int, bytes], ...]) -> bytes:
    """`data` with what was written."""
    disk = bytearray(data)
    for offset, new in (each for batch in batches for each in batch):
        disk[offset : offset + len(new)] = new
    return bytes(disk)


@pytest.mark.parametrize("compress", [False, True])
def test_what_was_written_is_in_the_file(vm: Pc, image: Path, tmp_path: Path, compress: bool) -> None:
    """Full and differential files have the changed parts of the disk, and a machine made of them the whole disk."""
    before = image.read_bytes()
    full = vm.save(str(tmp_path / "1"), compress=compress)
    write(vm, MORE)
    vm.save(str(tmp_path / "2"), parent=full, compress=compress)
    write(vm, ((0, b"lost"),))
    for name, batches in (("1", (WRITES,)), ("2", (WRITES, MORE))):
        for lazy in (False, True):
            with restore_file(tmp_path / name, lazy=lazy) as machine:
                assert content(machine) == changed(before, *batches)
                assert say(machine, "a") == "1,0"  # type: ignore[arg-type]
    assert image.read_bytes() == before
    assert (tmp_path / "1").stat().st_blocks * 512 < 1 << 20
    assert (tmp_path / "2").stat().st_blocks * 512 < 512 << 10


def test_a_restored_overlay_lives_on(vm: Pc, image: Path, tmp_path: Path) -> None:
    """It is forked, reset, and saved again like one that was never in a file."""
    before, path = image.read_bytes(), tmp_path / "vm"
    vm.save(str(path))
    with restore_file(path) as machine:
        assert isinstance(machine, Pc)
        start = machine.snapshot()
        write(machine, MORE)
        with machine.fork() as child, machine.fork(start) as other:
            write(child, ((5, b"child"),))
            assert content(other) == changed(before, WRITES)
            assert content(child) == changed(before, WRITES, MORE, ((5, b"child"),))
        machine.save(str(path))  # over the file that it is mapped from
        machine.restore(start)
        assert content(machine) == changed(before, WRITES)
    with restore_file(path) as machine:
        assert content(machine) == changed(before, WRITES, MORE)


def test_it_leaves_nothing_behind(vm: Pc, tmp_path: Path) -> None:
    """Machines made of the file, forked and closed again, leave no file descriptor."""

    def open_fds() -> int:
        gc.collect()
        reaper.drain()
        return len(os.listdir("/proc/self/fd"))

    vm.save(str(tmp_path / "vm"))
    found = []
    for _ in range(4):
        with restore_file(tmp_path / "vm") as machine, machine.fork() as child:
            write(child, MORE)
        del machine, child
        found.append(open_fds())
    assert found[1] == found[3]


@pytest.mark.usefixtures("images")
def test_in_the_middle_of_its_work(tmp_path: Path) -> None:
    """A guest that verifies its disk is saved again and again while it runs: each file's machine verifies its own."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(16 << 20))
    with guests.pc("blk.elf", "mode=check count=1500", devices=[Disk(image, overlay=True)], memfd=True) as vm:
        saved = None
        for lap in range(3):
            assert vm.run(0.02).kind == "TIMEOUT"
            saved = vm.save(str(tmp_path / str(lap)), parent=saved)
        for lap in range(3):
            with restore_file(tmp_path / str(lap)) as machine:
                assert machine.run(60) == Outcome("DEBUG_EXIT", 0), machine.console.text
    assert not any(image.read_bytes())


def test_at_a_shell(guest: str, image: Path, tmp_path: Path) -> None:
    """`pykvm restore` goes on with it; when the image has changed meanwhile, one line says so."""
    path = tmp_path / "vm"
    with Pc(guest, memory="4M", devices=[Disk(image, overlay=True)]) as machine:
        machine.console.expect("ready\n")
        machine.save(str(path))
    done = run("restore", "--timeout", "1", path, input="a")
    assert (done.returncode, done.stdout) == (124, "1,0;\n")
    os.utime(image, (1, 1))
    done = run("restore", path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "has changed since" in done.stderr


def test_rate_limits_are_kept(guest: str, image: Path, tmp_path: Path) -> None:
    """A file has the rate limits of its devices, and a fork has limits of its own."""
    limits = (RateLimit(bytes_per_s=1 << 20, burst_bytes=1 << 22), RateLimit(ops_per_s=7), None)
    devices = [Disk(image, overlay=True, limit=limits[0]), Rng(limits[1]), Net(None, limit=limits[2])]
    with Pc(guest, memory="4M", devices=devices) as machine:
        machine.console.expect("ready")
        machine.save(str(tmp_path / "vm"))
        with machine.fork() as child:
            for mine, theirs in zip(machine.virtio, child.virtio, strict=True):
                assert mine.device.limit is None or mine.device.limit is not theirs.device.limit
    with restore_file(tmp_path / "vm") as machine:
        assert isinstance(machine, Pc)
        assert [numbers_of(each.device.limit) for each in machine.virtio] == [*map(numbers_of, limits)]


def test_an_image_that_was_cut_short(vm: Pc, image: Path, tmp_path: Path) -> None:
    """Nothing is snapshotted, saved or forked any more, in one line each and without SIGBUS; the machine goes on."""
    vm.snapshot()
    write(vm, MORE)
    os.truncate(image, 65536)
    for attempt in (vm.snapshot, vm.fork, lambda: vm.save(str(tmp_path / "vm"))):
        with pytest.raises(SnapshotError, match="cut short"):
            attempt()
    assert not (tmp_path / "vm").exists()
    assert say(vm, "a") == "1,0"


def test_damaged_files(vm: Pc, tmp_path: Path) -> None:
    """A byte changed in the disk's part is found; forged states are refused, and nothing else happens."""
    path = tmp_path / "vm"
    vm.save(str(path))
    good, chance = path.read_bytes(), random.Random(6)
    place = good.index(b"across" * 100)
    refused(tmp_path / "bad", good[:place] + b"?" + good[place + 1 :], "damaged")
    text_length = struct.unpack_from("<Q", good, PAGE)[0]
    layers, overlay = (good.index(word) for word in (b'"layers"', b'"device_overlay"'))
    for lap in range(100):
        bad = bytearray(good)
        around = (layers, overlay, PAGE + 16 + chance.randrange(text_length))[lap % 3]
        bad[around + chance.randrange(40)] = chance.choice(b'0123456789-"{}[],:enul\xff')
        sealed_is_refused(path, bad)
    path.write_bytes(good)
    assert len(load(str(path)).layers) == 1
