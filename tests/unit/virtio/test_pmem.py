"""Persistent memory: the flush queue, which files will do, and accesses to pages that are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from driver import Driver

from pykvm._native import lib
from pykvm.cli.devices import make_devices
from pykvm.cli.start import PARSER
from pykvm.core.memory import GuestMemory
from pykvm.errors import ConfigError, SnapshotError, UsageError
from pykvm.virtio.pmem import ALIGNMENT, CONFIG, Pmem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Make = Callable[..., tuple[Driver, Pmem]]

GPA = 1 << 32
FLUSH = bytes(4)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """2 MiB that begin with a word."""
    path = tmp_path / "memory.img"
    path.write_bytes(b"kept".ljust(ALIGNMENT, b"\0"))
    return path


@pytest.fixture
def make(image: Path) -> Iterator[Make]:
    """make(**options) puts the image at GPA as a Pmem, with a driver."""
    drivers: list[Driver] = []

    def put(**options: bool) -> tuple[Driver, Pmem]:
        memory, device = GuestMemory(), Pmem(image, **options)
        memory.add(0, 1 << 20)
        device.place(memory, GPA)
        drivers.append(Driver(device, memory))
        return drivers[-1], device

    yield put
    for driver in drivers:
        driver.close()
        assert not driver.errors


def ask(driver: Driver, request: bytes = FLUSH) -> int:
    """The result of one request."""
    if not driver.queues:
        driver.start()
    (place,) = driver.queues[0].add([request], [4])
    driver.queues[0].kick()
    ((_, written),) = driver.queues[0].used()
    assert written == 4
    return driver.memory.read_u32(place)


def test_the_memory_is_the_file(make: Make, image: Path) -> None:
    """The configuration says where it is; what is written there is in the file, and what is in the file is there."""
    driver, _ = make()
    config = b"".join(driver.read(lib.VIRTIO_MMIO_CONFIG + at).to_bytes(4, "little") for at in range(0, CONFIG.size, 4))
    assert CONFIG.unpack(config) == (GPA, ALIGNMENT)
    assert driver.memory.read(GPA, 4) == b"kept"
    driver.memory.write(GPA + 4096, b"new")
    assert image.read_bytes()[4096:4099] == b"new"


def test_a_flush_waits_for_the_disk(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """fdatasync, then 0; when it fails, another number and one line (5.19.6)."""
    driver, device = make()
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    assert ask(driver) == 0
    assert synced == [device.file.fd]

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    assert ask(driver) == 1


@pytest.mark.parametrize("request_", [b"\1\0\0\0", b"", b"\0", b"\xff" * 4])
def test_unknown_requests_fail(make: Make, request_: bytes) -> None:
    """What is no flush is answered by a failure."""
    driver, device = make()
    if request_:
        assert ask(driver, request_) == 1
    else:
        (queue,) = driver.start()
        (place,) = queue.add([], [4])
        queue.kick()
        assert driver.memory.read_u32(place) == 1
    assert not device.flushes


@pytest.mark.parametrize("room", [[], [3]])
def test_a_request_needs_room_for_its_result(make: Make, room: list[int]) -> None:
    """Without, the device stops."""
    driver, _ = make()
    (queue,) = driver.start()
    queue.add([FLUSH], room)
    queue.kick()
    assert driver.needs_reset


def test_read_only(make: Make, image: Path) -> None:
    """Its slot is one that the guest cannot write; what a debugger writes there is not in the file."""
    driver, _ = make(readonly=True)
    slot = driver.memory.slot_at(GPA)
    assert slot is not None and slot.readonly and slot.shared_fd == -1
    driver.memory.write(GPA, b"trap")
    assert image.read_bytes()[:4] == b"kept"
    assert ask(driver) == 0


def test_a_read_only_file_of_any_size(make: Make, image: Path) -> None:
    """Zeros follow up to 2 MiB."""
    image.write_bytes(b"x" * 5000)
    driver, device = make(readonly=True)
    assert device.memory_size == ALIGNMENT
    assert driver.memory.read(GPA + 4990, 20) == b"x" * 10 + bytes(10)
    assert driver.memory.read(GPA + ALIGNMENT - 8, 8) == bytes(8)


@pytest.mark.parametrize("size", [1, 4096, ALIGNMENT + 512])
def test_a_writable_file_has_whole_units(image: Path, size: int) -> None:
    """Others are refused with what to do, and are not left locked."""
    os.truncate(image, size)
    with pytest.raises(ConfigError, match=r"truncate -s \dM FILE, or add ,ro|truncate -s 1G FILE"):
        Pmem(image)
    os.truncate(image, ALIGNMENT)
    Pmem(image).close()


@pytest.mark.parametrize("what", ["a directory", "a FIFO", "a character device"])
def test_what_is_no_file_is_refused(tmp_path: Path, what: str) -> None:
    """In words, before it is opened."""
    place = {"a directory": tmp_path, "a FIFO": tmp_path / "fifo", "a character device": "/dev/zero"}[what]
    if what == "a FIFO":
        os.mkfifo(place)
    with pytest.raises(ConfigError, match=f"pmem: .*{what} is no pmem"):
        Pmem(place)


def test_one_writer(image: Path) -> None:
    """Two machines do not have the same file, unless both only read it."""
    first = Pmem(image)
    with pytest.raises(ConfigError, match=r"pmem: .* another machine or program"):
        Pmem(image, readonly=True)
    first.close()
    readers = [Pmem(image, readonly=True) for _ in range(2)]
    for each in readers:
        each.close()


def test_pages_that_are_gone(make: Make, image: Path) -> None:
    """An access of pykvm's own after the file was cut finds zeros, and the slot's guard says what happened."""
    driver, _ = make()
    slot = driver.memory.slot_at(GPA)
    assert slot is not None and slot.guard is not None
    os.truncate(image, 4096)
    assert driver.memory.read(GPA, 4) == b"kept"
    with pytest.raises(BlockingIOError):
        os.eventfd_read(slot.guard.event)
    assert driver.memory.read(GPA + 8192, 4) == bytes(4)
    driver.memory.write(GPA + 12288, b"x")
    assert os.eventfd_read(slot.guard.event) == 2
    why = f"{image} was cut to 4096 bytes while {ALIGNMENT} were in use as the guest's memory"
    assert driver.memory.damage() == why


def test_other_failures_have_words_too(make: Make, image: Path) -> None:
    """A file that is as long as ever."""
    driver, _ = make()
    assert "no space left, or an I/O error" in driver.memory.damage()
    assert GuestMemory().damage() == ""


def test_it_is_not_given_back(make: Make) -> None:
    """A balloon cannot punch holes into the file."""
    driver, _ = make()
    assert not driver.memory.discard([(GPA, 4096)])
    assert driver.memory.read(GPA, 4) == b"kept"


CHILD = """
import mmap, os, signal, sys
from pykvm.core.memory import GuestMemory
from pykvm.virtio.pmem import Pmem
if sys.argv[2] == "faulthandler":
    import faulthandler; faulthandler.enable()
if sys.argv[2] == "ignore":
    signal.signal(signal.SIGBUS, lambda *_: print("heard") or os._exit(7))
memory, device = GuestMemory(), Pmem(sys.argv[1])
device.place(memory, 0)
if sys.argv[2] in ("kill", "ignore"):
    os.kill(os.getpid(), signal.SIGBUS)
    while True: pass
other = open(sys.argv[1] + ".other", "w+b")
other.truncate(8192)
view = mmap.mmap(other.fileno(), 8192)
other.truncate(0)
print(view[4096])
"""


@pytest.mark.parametrize("how", ["plain", "kill", "faulthandler", "ignore"])
def test_other_bus_errors_are_not_ours(image: Path, how: str) -> None:
    """One elsewhere, or that somebody sent, does what it did before: it kills, or goes to who listened for it."""
    done = subprocess.run([sys.executable, "-c", CHILD, image, how], capture_output=True, timeout=60, check=False)
    assert done.returncode == (7 if how == "ignore" else -signal.SIGBUS), done
    assert (b"Fatal Python error: Bus error" in done.stderr) == (how == "faulthandler")


def test_snapshots_are_refused(make: Make) -> None:
    """With a reason."""
    _, device = make()
    with pytest.raises(SnapshotError, match="its file goes on changing"):
        device.check_snapshot(to_file=False)


def test_option(image: Path) -> None:
    """--pmem FILE[,ro]; commas in FILE are written twice."""
    values, _ = PARSER.parse(["--pmem", f"{image},ro", "kernel"])
    (device,) = make_devices(values)
    assert isinstance(device, Pmem) and device.file.readonly
    device.close()
    for wrong in ("", f"{image},rw", f"{image},ro,ro"):
        with pytest.raises(UsageError, match="--pmem"):
            make_devices({"pmem": [wrong]})
