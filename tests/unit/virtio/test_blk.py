"""The disk as its driver sees it: requests, their limits, and a host that fails."""

from __future__ import annotations

import errno
import os
import resource
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from driver import RAM, RINGS, WRITE, Driver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm import log
from pykvm._native import ffi, lib
from pykvm.errors import ConfigError
from pykvm.virtio.blk import MAX_DISCARD_SECTORS, MAX_SEGMENTS, MAX_ZERO_SECTORS, QUEUE_SIZE, Disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IN, OUT, FLUSH = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_OUT, lib.VIRTIO_BLK_T_FLUSH
GET_ID, DISCARD, ZEROES = lib.VIRTIO_BLK_T_GET_ID, lib.VIRTIO_BLK_T_DISCARD, lib.VIRTIO_BLK_T_WRITE_ZEROES
OK, IOERR, UNSUPP = lib.VIRTIO_BLK_S_OK, lib.VIRTIO_BLK_S_IOERR, lib.VIRTIO_BLK_S_UNSUPP
PARALLEL = {"serial": lib.PK_BLK_SERIAL, "parallel": lib.PK_BLK_ALL}
SECTORS = 256
CONTENT = b"".join(struct.pack("<Q", n) * 64 for n in range(SECTORS))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """128 KiB in which each sector repeats its own number."""
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The facts of each warning."""
    lines: list[dict[str, object]] = []
    monkeypatch.setattr(log, "warning", lambda event, **facts: lines.append(facts))
    return lines


def header(kind: int, sector: int = 0) -> bytes:
    """struct virtio_blk_outhdr."""
    return struct.pack("<IIQ", kind, 0, sector)


def request(driver: Driver, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> tuple[int, bytes]:
    """One request by itself: (status, what the device wrote before it)."""
    queue = driver.queues[0]
    readable = [header(kind, sector), *([data] if data else [])]
    places = queue.add(readable, [*([room] if room else []), 1])
    queue.kick()
    ((_, written),) = queue.used()
    assert written <= room + 1
    return driver.memory.read_u8(places[-1]), driver.memory.read(places[0], room) if room else b""


@pytest.fixture(params=["c", "serial", "parallel", "python"])
def start(drive: Callable[[Disk], Driver], request: pytest.FixtureRequest) -> Callable[..., Driver]:
    """start(path, OPTION=...) makes a disk with its driver, ready.

    C serves what it can, as it likes, one request after the other, or all it can side by side; or Python serves all.
    """

    def make(path: Path, features: int | None = None, **options: Any) -> Driver:
        driver = drive(Disk(path, **{"native": request.param != "python"} | options))
        if request.param in PARALLEL:
            disk(driver).plane.state.parallel = PARALLEL[request.param]
        driver.start(features)
        return driver

    return make


Start = "Callable[..., Driver]"


def disk(driver: Driver) -> Disk:
    """The device."""
    assert isinstance(driver.transport.device, Disk)
    return driver.transport.device


def failing(monkeypatch: pytest.MonkeyPatch, function: str, code: int) -> None:
    """Let os.FUNCTION fail with `code`, however it is called."""

    def fail(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, function, fail)


# -- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
def test_reads_and_writes(start: Start, image: Path, direct: bool) -> None:
    """Sectors come and go at their place, whatever the alignment of the guest's buffers."""
    driver = start(image, direct=direct)
    assert request(driver, IN, 3, room=1024) == (OK, CONTENT[1536:2560])
    assert request(driver, OUT, 255, data=b"z" * 512) == (OK, b"")
    driver.allocate(1)
    driver._free += 3  # a buffer at an odd address
    assert request(driver, OUT, 8, data=b"a" * 4096) == (OK, b"")
    assert request(driver, IN, 0, room=131072) == (OK, CONTENT[:4096] + b"a" * 4096 + CONTENT[8192:-512] + b"z" * 512)
    assert image.read_bytes()[4096:8192] == b"a" * 4096


def test_the_framing_is_the_drivers(start: Start, image: Path) -> None:
    """Header, data and status may be cut into buffers anywhere (2.7.4: no assumptions on framing)."""
    driver = start(image)
    (queue,) = driver.queues
    head = header(OUT, 1) + b"x" * 512
    queue.add([head[:7], head[7:20], head[20:]], [1])
    queue.kick()
    places = queue.add([header(IN, 1)], [100, 413])
    queue.kick()
    assert queue.used() == [(0, 1), (4, 513)]
    assert driver.memory.read(places[0], 100) + driver.memory.read(places[1], 413) == b"x" * 512 + bytes([OK])


def test_flush_reaches_the_file(start: Start, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is an fdatasync of the image; without the feature every write is on stable storage by itself."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    driver = start(image, native=False)
    assert request(driver, FLUSH) == (OK, b"")
    assert synced == [disk(driver).file.fd]


def test_write_through_without_the_flush_feature(start: Start, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that cannot flush gets each write on stable storage before its end (5.2.6.2)."""
    flags: list[int] = []
    real = os.pwritev

    def spy(fd: int, buffers: list[memoryview], offset: int, flag: int = 0) -> int:
        flags.append(flag)
        return real(fd, buffers, offset, flag)

    monkeypatch.setattr(os, "pwritev", spy)
    driver = start(image, 0, native=False)
    assert request(driver, OUT, 0, data=bytes(512)) == (OK, b"")
    assert flags == [os.RWF_DSYNC]


def test_serial_number(start: Start, image: Path) -> None:
    """GET_ID gives the id, padded with zeroes, as far as there is room."""
    driver = start(image, id="root-0001")
    assert request(driver, GET_ID, room=20) == (OK, b"root-0001".ljust(20, b"\0"))
    assert request(driver, GET_ID, room=4) == (OK, b"root")


def test_configuration(start: Start, image: Path) -> None:
    """The configuration space names capacity, segments, sizes and queues."""
    driver = start(image, queues=4)
    config = ffi.new("struct virtio_blk_config *")
    size = ffi.sizeof("struct virtio_blk_config")
    for at in range(size):
        ffi.buffer(config)[at] = bytes([driver.read(lib.VIRTIO_MMIO_CONFIG + at, 1)])
    assert (config.capacity, config.seg_max, config.blk_size) == (SECTORS, QUEUE_SIZE - 2, 512)
    assert config.num_queues == len(driver.transport.queues) == 4
    assert driver.features() >> lib.VIRTIO_BLK_F_MQ & 1


def test_every_queue_is_served(start: Start, image: Path) -> None:
    """Each queue of a multi-queue disk takes requests."""
    driver = start(image, queues=3)
    for index, queue in enumerate(driver.queues):
        places = queue.add([header(IN, index)], [512, 1])
        queue.kick()
        assert driver.memory.read_u64(places[0]) == index


def test_discard_frees_space(start: Start, tmp_path: Path) -> None:
    """A discarded range takes no blocks of the host's file system any more, and reads as zeroes."""
    path = tmp_path / "big.img"
    path.write_bytes(b"x" * (1 << 20))
    driver = start(path)
    before = path.stat().st_blocks
    segment = struct.pack("<QII", 0, 1024, 0)
    assert request(driver, DISCARD, data=segment) == (OK, b"")
    assert path.stat().st_blocks <= before - 1024
    assert path.stat().st_size == 1 << 20
    assert request(driver, IN, 1023, room=1024) == (OK, bytes(512) + b"x" * 512)


@pytest.mark.parametrize("unmap", [0, 1])
@pytest.mark.parametrize("supported", [True, False])
def test_write_zeroes(start: Start, image: Path, unmap: int, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The range is zeroes afterwards, whether the file system helps or not."""
    if not supported:
        monkeypatch.setattr("pykvm.virtio.diskfile.DiskFile._fallocate", lambda *_: failed(errno.EOPNOTSUPP))
    driver = start(image)
    segments = struct.pack("<QIIQII", 1, 2, unmap, 9, 1, unmap)
    assert request(driver, ZEROES, data=segments) == (OK, b"")
    expected = CONTENT[:512] + bytes(1024) + CONTENT[1536 : 9 * 512] + bytes(512) + CONTENT[10 * 512 :]
    assert image.read_bytes() == expected


def failed(code: int) -> None:
    """Fail as the kernel does."""
    raise OSError(code, os.strerror(code))


# -- requests that no driver should make ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sector", "data", "room", "status"),
    [
        (IN, SECTORS, b"", 512, IOERR),
        (IN, SECTORS - 1, b"", 1024, IOERR),
        (IN, (1 << 64) - 1, b"", 512, IOERR),
        (IN, 1 << 55, b"", 512, IOERR),
        (IN, 0, b"", 100, IOERR),
        (OUT, SECTORS, bytes(512), 0, IOERR),
        (OUT, 0, bytes(511), 0, IOERR),
        (OUT, (1 << 64) - 1, bytes(512), 0, IOERR),
        (DISCARD, 0, b"", 0, IOERR),
        (DISCARD, 0, bytes(15), 0, IOERR),
        (DISCARD, 0, struct.pack("<QII", SECTORS, 1, 0), 0, IOERR),
        (DISCARD, 0, struct.pack("<QII", 0, MAX_DISCARD_SECTORS + 1, 0), 0, IOERR),
        (DISCARD, 0, struct.pack("<QII", 0, 1, 1), 0, UNSUPP),
        (DISCARD, 0, struct.pack("<QII", 0, 1, 0) * (MAX_SEGMENTS + 1), 0, IOERR),
        (ZEROES, 0, struct.pack("<QII", 0, 1, 2), 0, UNSUPP),
        (ZEROES, 0, struct.pack("<QII", 0, MAX_ZERO_SECTORS + 1, 0), 0, IOERR),
        (ZEROES, 0, struct.pack("<QIIQII", 0, 1, 0, SECTORS, 1, 0), 0, IOERR),
        (99, 0, b"", 512, UNSUPP),
        (0xFFFFFFFF, 0, b"", 0, UNSUPP),
    ],
)
def test_bad_requests(start: Start, image: Path, kind: int, sector: int, data: bytes, room: int, status: int) -> None:
    """A request outside the rules gets its status, changes nothing, and the next one works."""
    driver = start(image)
    assert request(driver, kind, sector, data, room)[0] == status
    assert image.read_bytes() == CONTENT
    assert request(driver, IN, 7, room=512) == (OK, CONTENT[3584:4096])
    assert not driver.needs_reset


def test_a_short_header_is_an_error(start: Start, image: Path) -> None:
    """Fewer bytes than a header fail with IOERR."""
    driver = start(image)
    (queue,) = driver.queues
    (place,) = queue.add([bytes(15)], [1])
    queue.kick()
    assert queue.used() == [(0, 1)]
    assert driver.memory.read_u8(place) == IOERR


def test_no_room_for_the_status_stops_the_device(start: Start, image: Path) -> None:
    """Nothing can be said to such a driver: the device asks for a reset."""
    driver = start(image)
    driver.queues[0].add([header(IN)], [])
    driver.queues[0].kick()
    assert driver.needs_reset


def test_read_only_is_enforced(start: Start, image: Path) -> None:
    """Writes, discards and zeroes fail on a read-only disk, which says that it is one; reads and flushes do not."""
    driver = start(image, readonly=True)
    assert driver.features() >> lib.VIRTIO_BLK_F_RO & 1
    assert not driver.features() >> lib.VIRTIO_BLK_F_DISCARD & 1
    segment = struct.pack("<QII", 0, 1, 0)
    for kind, data in ((OUT, bytes(512)), (DISCARD, segment), (ZEROES, segment)):
        assert request(driver, kind, data=data)[0] == IOERR
    assert request(driver, IN, room=512) == (OK, CONTENT[:512])
    assert request(driver, FLUSH) == (OK, b"")
    assert image.read_bytes() == CONTENT


# -- a host that fails ---------------------------------------------------------------------------------------------


def test_full_file_system(
    start: Start, image: Path, monkeypatch: pytest.MonkeyPatch, said: list[dict[str, object]]
) -> None:
    """ENOSPC is an I/O error for the guest and one line for the user, however often it happens."""
    driver = start(image, native=False)
    with monkeypatch.context() as patch:
        failing(patch, "pwritev", errno.ENOSPC)
        for _ in range(3):
            assert request(driver, OUT, data=bytes(512))[0] == IOERR
    assert request(driver, OUT, data=bytes(512))[0] == OK
    assert said == [{"disk": str(image), "request": "write", "reason": "No space left on device"}]


def test_file_cut_short(start: Start, image: Path, said: list[dict[str, object]]) -> None:
    """Sectors that the file lost give I/O errors, those before its new end are still there."""
    driver = start(image)
    os.truncate(image, 8192)
    assert request(driver, IN, 15, room=1024)[0] == IOERR
    assert request(driver, IN, 200, room=512)[0] == IOERR
    assert request(driver, IN, 15, room=512) == (OK, CONTENT[7680:8192])
    assert said == [{"disk": str(image), "request": "read", "reason": "the file ends before the disk does"}]


def test_failing_flush(start: Start, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush that the host cannot do is never reported as done."""
    failing(monkeypatch, "fdatasync", errno.EIO)
    assert request(start(image, native=False), FLUSH)[0] == IOERR


def test_failing_flush_in_c(start: Start, image: Path, said: list[dict[str, object]]) -> None:
    """An error that the kernel told C is not lost on its way to Python, where a second try would succeed."""
    driver = start(image)
    plane, whole = disk(driver).plane.state, disk(driver).file.fd
    reading, writing = os.pipe()
    plane.fd = reading  # fdatasync says EINVAL
    expected = IOERR if plane.lock else OK
    assert request(driver, FLUSH)[0] == expected
    plane.fd = whole
    assert request(driver, FLUSH)[0] == OK
    assert len(said) == (expected == IOERR)
    os.close(reading)
    os.close(writing)


def test_write_that_does_not_fit(start: Start, image: Path, said: list[dict[str, object]]) -> None:
    """A write that the host takes only a part of is an error; what was there before it still can be read."""
    driver = start(image)
    os.truncate(image, 8192)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        assert request(driver, OUT, 15, data=b"n" * 1024)[0] == IOERR
        assert request(driver, OUT, 20, data=b"n" * 512)[0] == IOERR
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said == [{"disk": str(image), "request": "write", "reason": "File too large"}]
    assert request(driver, IN, 0, room=512) == (OK, CONTENT[:512])


# -- opening -------------------------------------------------------------------------------------------------------


def refused(path: Path | str, **options: object) -> str:
    """Why the disk is not made: one line."""
    with pytest.raises(ConfigError) as caught:
        Disk(path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_disk(tmp_path: Path) -> None:
    """A directory, a FIFO, a character device, a missing or empty file are refused without being opened."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    assert "a directory is no disk" in refused(tmp_path)
    assert "a FIFO is no disk" in refused(tmp_path / "fifo")
    assert "a character device is no disk" in refused("/dev/zero")
    assert "No such file" in refused(tmp_path / "none")
    assert "hold no sector" in refused(tmp_path / "empty")


def test_one_writer(image: Path) -> None:
    """A second writer or reader beside a writer is refused, and so is a writer beside readers, who bear each other."""
    writer = Disk(image)
    assert "locked" in refused(image)
    assert "locked" in refused(image, readonly=True)
    writer.close()
    readers = [Disk(image, readonly=True) for _ in range(2)]
    assert "locked" in refused(image)
    for reader in readers:
        reader.close()
    Disk(image).close()


@pytest.fixture
def block_device(image: Path) -> Iterator[Path]:
    """The image as a loop device."""
    made = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@pytest.mark.parametrize("direct", [False, True])
def test_block_device(start: Start, block_device: Path, direct: bool) -> None:
    """A block device is a disk: data, discard and zeroes; a second user of it is refused."""
    driver = start(block_device, direct=direct)
    assert disk(driver).capacity == SECTORS
    assert request(driver, OUT, 8, data=b"a" * 4096) == (OK, b"")
    assert request(driver, DISCARD, data=struct.pack("<QII", 16, 8, 0)) == (OK, b"")
    assert request(driver, ZEROES, data=struct.pack("<QIIQII", 0, 8, 0, 24, 8, 1)) == (OK, b"")
    assert request(driver, FLUSH) == (OK, b"")
    assert request(driver, IN, 0, room=8192) == (OK, bytes(4096) + b"a" * 4096)
    assert request(driver, IN, 24, room=8192) == (OK, bytes(4096) + CONTENT[32 * 512 : 40 * 512])
    assert "in use" in refused(block_device)
    disk(driver).file.close()


def test_bad_options(image: Path) -> None:
    """An id that does not fit and an impossible number of queues are refused, with no file left open."""
    before = os.listdir("/proc/self/fd")
    assert "20 printable ASCII" in refused(image, id="x" * 21)
    assert "20 printable ASCII" in refused(image, id="ä")
    assert "queues" in refused(image, queues=0)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_large_request_in_many_buffers(start: Start, tmp_path: Path) -> None:
    """More buffers than one system call takes, over direct I/O's bounce buffer and without."""
    path = tmp_path / "large.img"
    path.write_bytes(os.urandom(RAM))
    for direct in (False, True):
        driver = start(path, direct=direct)
        parts = [(driver.allocate(256), 256, WRITE) for _ in range(1000)]
        head = driver.allocate(16)
        driver.memory.write(head, header(IN, 5))
        driver.queues[0].add_indirect([(head, 16, 0), *parts, (driver.allocate(1), 1, WRITE)])
        driver.queues[0].kick()
        assert driver.queues[0].used() == [(0, 256_001)]
        assert driver.memory.read(parts[0][0], 256_000) == path.read_bytes()[2560 : 2560 + 256_000]
        disk(driver).file.close()


# -- hostile drivers -----------------------------------------------------------------------------------------------

SMALL = 8  # entries of the ring
hostile_entries = st.lists(
    st.tuples(
        st.one_of(st.integers(RINGS, RINGS + 0x9000), st.integers(0, RAM + 64), st.sampled_from([2**64 - 1, 2**63])),
        st.one_of(st.integers(0, 70), st.sampled_from([512, 4096, RAM, 2**32 - 1])),
        st.integers(0, 7),
        st.integers(0, SMALL),
    ),
    min_size=SMALL,
    max_size=SMALL,
)


@pytest.mark.parametrize("native", ["c", "parallel", "python"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=hostile_entries,
    headers=st.lists(st.tuples(st.integers(0, 16), st.integers(0, SECTORS + 2)), min_size=1, max_size=4),
    heads=st.lists(st.integers(0, SMALL), min_size=1, max_size=SMALL),
)
def test_hostile_rings_end_in_a_reset_at_most(
    image: Path,
    native: str,
    table: list[tuple[int, int, int, int]],
    headers: list[tuple[int, int]],
    heads: list[int],
) -> None:
    """Whatever is in the rings, the device answers or asks for a reset, and works after one; nothing is raised."""
    driver = Driver(Disk(image, native=native != "python"))
    disk(driver).plane.state.parallel = PARALLEL.get(native, lib.PK_BLK_MISSES)
    (queue,) = driver.start(size=SMALL)
    for at, (kind, sector) in enumerate(headers):
        driver.memory.write(RINGS + 0x6000 + 16 * at, header(kind, sector))
    for at, entry in enumerate(table):
        queue.descriptor(at, *entry)
    for head in heads:
        queue.offer(head)
    queue.kick()
    assert not driver.errors
    driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    driver.memory.write(RINGS, bytes(0x10000))
    driver.start()
    assert request(driver, FLUSH) == (OK, b"")
    driver.close()
