"""The virtio-mmio transport: identity, device status, register widths, resets; and register accesses at random."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from driver import EVENT_IDX, VERSION_1, Driver
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm import log
from pykvm._native import lib
from pykvm.core.iothread import IoThread
from pykvm.core.memory import GuestMemory
from pykvm.virtio.device import VirtioDevice
from pykvm.virtio.fault import DriverFault
from pykvm.virtio.mmio import LOGGED_FAULTS, VirtioMmio

if TYPE_CHECKING:
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.queue import Virtqueue

Drive = "Callable[[VirtioDevice], Driver]"

STATUS, READY, NUM, SEL = (
    lib.VIRTIO_MMIO_STATUS,
    lib.VIRTIO_MMIO_QUEUE_READY,
    lib.VIRTIO_MMIO_QUEUE_NUM,
    lib.VIRTIO_MMIO_QUEUE_SEL,
)
ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK = 1, 2, 8, 4
FAILED = lib.VIRTIO_CONFIG_S_FAILED
RUNNING = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK


class Recorder(VirtioDevice):
    """Holds every request, and has eight bytes of configuration of which the driver may write the last four."""

    device_id = 0x30
    features = 1
    queue_sizes = (8, 4)

    def __init__(self) -> None:
        self.held: list[tuple[Virtqueue, Chain]] = []
        self.activated: list[int] = []
        self.resets = 0
        self.space = bytearray(b"\x01\x02\x03\x04\x05\x06\x07\x08")

    def config(self) -> bytes:
        """Eight bytes."""
        return bytes(self.space)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the upper half, and call a write into the lower one what it is."""
        if offset < 4:
            raise DriverFault("the first four bytes are read-only")
        self.space[offset : offset + len(data)] = data

    def activate(self, features: int) -> None:
        """Remember it."""
        self.activated.append(features)

    def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
        """Keep it."""
        self.held.append((queue, chain))
        return None

    def reset(self) -> None:
        """Count."""
        self.resets += 1


def test_identity(drive: Drive) -> None:
    """Magic value, version 2 and the device's id stand where 4.2.2 puts them; shared memory does not exist."""
    driver = drive(Recorder())
    assert driver.read(lib.VIRTIO_MMIO_MAGIC_VALUE) == 0x74726976
    assert driver.read(lib.VIRTIO_MMIO_VERSION) == 2
    assert driver.read(lib.VIRTIO_MMIO_DEVICE_ID) == 0x30
    assert driver.read(lib.VIRTIO_MMIO_SHM_LEN_LOW) == driver.read(lib.VIRTIO_MMIO_SHM_LEN_HIGH) == 0xFFFFFFFF
    assert driver.features() & (VERSION_1 | EVENT_IDX | 1) == VERSION_1 | EVENT_IDX | 1


def test_handshake(drive: Drive) -> None:
    """The device is activated once, with the features that both sides know (3.1.1)."""
    device = Recorder()
    driver = drive(device)
    driver.start(1)
    assert driver.read(STATUS) == RUNNING
    driver.write(STATUS, RUNNING)
    assert device.activated == [VERSION_1 | 1]


@pytest.mark.parametrize(
    ("page", "bits"),
    [(0, 2), (1, 1 << 31 | 1), (2, 1), (0xFFFFFFFF, 4)],
    ids=["low", "high", "page 2", "last page"],
)
def test_features_that_nobody_offers_are_refused(drive: Drive, page: int, bits: int) -> None:
    """FEATURES_OK does not stick, and the driver may try again with less (3.1.1 step 6, 2.2.1)."""
    driver = drive(Recorder())
    driver.write(STATUS, ACKNOWLEDGE | DRIVER)
    driver.write(lib.VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1)
    driver.write(lib.VIRTIO_MMIO_DRIVER_FEATURES, 1)
    driver.write(lib.VIRTIO_MMIO_DRIVER_FEATURES_SEL, page)
    driver.write(lib.VIRTIO_MMIO_DRIVER_FEATURES, bits)
    driver.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert driver.read(STATUS) == ACKNOWLEDGE | DRIVER


def test_version_1_is_a_must(drive: Drive) -> None:
    """A driver that does not take VERSION_1 is a legacy one, which version 2 of the transport does not serve (6.1)."""
    driver = drive(Recorder())
    driver.write(STATUS, ACKNOWLEDGE | DRIVER)
    driver.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert driver.read(STATUS) == ACKNOWLEDGE | DRIVER


def test_driver_ok_without_features_ok(drive: Drive) -> None:
    """The device does not start; it asks for a reset (3.1.1)."""
    device = Recorder()
    driver = drive(device)
    driver.write(STATUS, ACKNOWLEDGE | DRIVER)
    driver.write(STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert driver.needs_reset and device.activated == []


def test_features_after_features_ok(drive: Drive) -> None:
    """Rewriting features after FEATURES_OK is a fault (2.2.1) and changes nothing."""
    driver = drive(Recorder())
    driver.start(1)
    driver.write(lib.VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0)
    driver.write(lib.VIRTIO_MMIO_DRIVER_FEATURES, 0)
    assert driver.needs_reset and driver.transport.driver_features == VERSION_1 | 1


def test_status_does_not_go_backwards(drive: Drive) -> None:
    """A driver may add bits or write 0 (2.1.1)."""
    driver = drive(Recorder())
    driver.start()
    driver.write(STATUS, ACKNOWLEDGE | DRIVER)
    assert driver.needs_reset and driver.read(STATUS) & RUNNING == RUNNING


def test_failed_and_needs_reset_bits(drive: Drive) -> None:
    """A driver may say FAILED; NEEDS_RESET is the device's alone (2.1)."""
    driver = drive(Recorder())
    driver.write(STATUS, ACKNOWLEDGE | lib.VIRTIO_CONFIG_S_NEEDS_RESET)
    assert driver.read(STATUS) == ACKNOWLEDGE
    driver.write(STATUS, ACKNOWLEDGE | FAILED)
    assert driver.read(STATUS) == ACKNOWLEDGE | FAILED


def test_reset_with_requests_in_flight(drive: Drive) -> None:
    """What was in flight is never completed into the rings of the next life (2.4)."""
    device = Recorder()
    driver = drive(device)
    queue, _ = driver.start()
    queue.add([b"x"], [4])
    queue.kick()
    driver.write(STATUS, 0)
    assert driver.read(STATUS) == 0 and device.resets == 1
    driver.start()
    driver.interrupts()
    device.complete(*device.held[0], 4)
    assert driver.memory.read_u16(queue.used_ring + 2) == 0
    assert driver.interrupts() == 0


def test_double_reset_and_a_second_life(drive: Drive) -> None:
    """Resetting twice is resetting once, and the device serves the next driver."""
    device = Recorder()
    driver = drive(device)
    driver.start()
    driver.write(STATUS, 0)
    driver.write(STATUS, 0)
    assert (driver.read(STATUS), driver.read(READY)) == (0, 0)
    driver.memory.fill(0x10000, 0x10000)
    queue, _ = driver.start()
    queue.add([b"x"])
    queue.kick()
    assert len(device.held) == 1


def test_reset_ends_needs_reset(drive: Drive) -> None:
    """After NEEDS_RESET nothing is served until the driver resets the device (2.1.2)."""
    device = Recorder()
    driver = drive(device)
    queue, _ = driver.start()
    queue.offer(99)
    queue.kick()
    assert driver.needs_reset
    assert driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) & lib.VIRTIO_MMIO_INT_CONFIG
    queue.add([b"x"])
    queue.kick()
    assert device.held == []
    driver.write(STATUS, 0)
    assert driver.read(STATUS) == 0


def test_notify_of_what_is_not_there(drive: Drive) -> None:
    """Notifying a queue that does not exist, is not ready, or belongs to a device that does not run, is nothing."""
    device = Recorder()
    driver = drive(device)
    for index in (0, 1, 2, 0xFFFF, 0xFFFFFFFF):
        driver.kick(index)
    driver.negotiate()
    driver.setup_queue(0).add([b"x"])
    driver.kick(0)
    assert device.held == [] and not driver.needs_reset


@pytest.mark.parametrize("register", range(0, 0x100, 4))
def test_access_widths(drive: Drive, register: int) -> None:
    """Registers are four bytes wide and aligned (4.2.2.2); any other access reads 0 and writes nothing."""
    device = Recorder()
    driver = drive(device)
    driver.start()
    for size in (1, 2, 8):
        assert driver.read(register, size) == 0
        driver.write(register, 0, size)
    for offset in (1, 2, 3):
        if register + offset + 4 <= 0x100:
            assert driver.read(register + offset) == 0
            driver.write(register + offset, 0)
    assert driver.read(STATUS) == RUNNING and device.resets == 0


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [(0, 1, 1), (1, 2, 0x0302), (0, 8, 0x0807060504030201), (7, 1, 8), (6, 4, 0x0807), (8, 4, 0), (0xEFC, 4, 0)],
)
def test_configuration_space_at_any_width(drive: Drive, offset: int, size: int, value: int) -> None:
    """Reads of any width; past the end there are zeros."""
    assert drive(Recorder()).read(lib.VIRTIO_MMIO_CONFIG + offset, size) == value


def test_configuration_writes(drive: Drive) -> None:
    """A write inside the space reaches the device, one across its end does not, a refused one stops the device."""
    device = Recorder()
    driver = drive(device)
    driver.write(lib.VIRTIO_MMIO_CONFIG + 4, 0xAABB, 2)
    driver.write(lib.VIRTIO_MMIO_CONFIG + 6, 0xFFFFFFFF, 4)
    assert device.space == b"\x01\x02\x03\x04\xbb\xaa\x07\x08"
    driver.write(lib.VIRTIO_MMIO_CONFIG, 0, 1)
    assert driver.needs_reset


def test_config_generation(drive: Drive) -> None:
    """A change of the configuration counts up ConfigGeneration and interrupts a running driver only (2.5.3)."""
    device = Recorder()
    driver = drive(device)
    before = driver.read(lib.VIRTIO_MMIO_CONFIG_GENERATION)
    device.config_changed()
    assert driver.read(lib.VIRTIO_MMIO_CONFIG_GENERATION) == before + 1
    assert driver.interrupts() == 0
    driver.start()
    device.config_changed()
    assert driver.interrupts() == 1
    assert driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) == lib.VIRTIO_MMIO_INT_CONFIG


def test_faults_do_not_flood_the_log(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that breaks a rule and resets the device all day long is reported a few times, and counted."""
    said: list[str] = []
    monkeypatch.setattr(log, "warning", lambda event, **facts: said.append(event))
    driver = drive(Recorder())
    for _ in range(50):
        driver.write(STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK)
        driver.write(STATUS, 0)
    assert (len(said), driver.transport.faults) == (LOGGED_FAULTS, 50)


def test_a_device_that_fails_to_start_leaves_nothing_open() -> None:
    """An exception of `bind` closes the transport's eventfds."""

    class Broken(Recorder):
        def bind(self, transport: VirtioMmio) -> None:
            raise ZeroDivisionError

    before = os.listdir("/proc/self/fd")
    with pytest.raises(ZeroDivisionError):
        VirtioMmio(Broken(), GuestMemory(), IoThread("test", print), base=0, gsi=0)
    assert os.listdir("/proc/self/fd") == before


VALUES = st.one_of(
    st.integers(0, 15), st.sampled_from([0x10000, 0x14000, 0x15000, 0xFFFFFFFF]), st.integers(0, 2**32 - 1)
)
REGISTERS = st.one_of(
    st.sampled_from([STATUS, STATUS, READY, NUM, SEL, lib.VIRTIO_MMIO_QUEUE_NOTIFY, lib.VIRTIO_MMIO_DRIVER_FEATURES]),
    st.integers(0, 0x40).map(lambda word: 4 * word),
    st.integers(0, 0xFF8),
)
ACCESSES = st.tuples(st.booleans(), REGISTERS, st.sampled_from([4, 4, 4, 1, 2, 8]), VALUES)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACCESSES, max_size=60), st.booleans())
def test_any_accesses(accesses: list[tuple[bool, int, int, int]], started: bool) -> None:
    """Any sequence of accesses leaves the device stopped, reset or running, its live queues where they were."""
    device = Recorder()
    driver = Driver(device)
    try:
        if started:
            driver.start()
        for write, register, size, value in accesses:
            live = driver.transport.status & DRIVER_OK
            before = [(queue.desc, queue.avail, queue.used, queue.size, queue.enabled) for queue in device.queues]
            if write:
                driver.write(register, value & (1 << 8 * size) - 1, size)
            else:
                assert 0 <= driver.read(register, size) < 1 << 64
            driver.io.run(3)
            status = driver.transport.status
            assert status & FEATURES_OK or not status & DRIVER_OK
            if live and status & DRIVER_OK:
                after = [(queue.desc, queue.avail, queue.used, queue.size, queue.enabled) for queue in device.queues]
                assert after == before
        driver.write(STATUS, 0)
        assert driver.read(STATUS) == 0
        assert driver.errors == []
    finally:
        driver.close()
