"""The device interface, with the example of the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from driver import EVENT_IDX, Driver

from pykvm._native import lib
from pykvm.virtio import device
from pykvm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.queue import Virtqueue


class Shout(VirtioDevice):
    """The example of pykvm.virtio.device."""

    device_id = 0x30
    queue_sizes = (64,)

    def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
        """Answer in capitals."""
        return chain.write(chain.read(4096).upper())


class Later(Shout):
    """A device that finishes its requests in another order."""

    waiting: list[tuple[Virtqueue, Chain]]

    def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
        """Keep the request."""
        self.waiting = [*getattr(self, "waiting", []), (queue, chain)]
        return None


Drive = "Callable[[VirtioDevice], Driver]"


def test_the_documentation_has_this_example() -> None:
    """README and docstring show the device that is tested here."""
    handler = "return chain.write(chain.read(4096).upper())"
    readme = Path(__file__).parents[3] / "README.md"
    assert handler in readme.read_text() and handler in (device.__doc__ or "")


def test_answers_a_request(drive: Drive) -> None:
    """A request's readable bytes come in, the answer lands in its writable buffers, the used ring says how much."""
    driver = drive(Shout())
    (queue,) = driver.start()
    first, second = queue.add([b"hello, ", b"world"], [8, 8])
    queue.kick()
    assert queue.used() == [(0, 12)]
    assert driver.memory.read(first, 8) + driver.memory.read(second, 4) == b"HELLO, WORLD"
    assert driver.interrupts() == 1
    assert driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) == lib.VIRTIO_MMIO_INT_VRING
    driver.write(lib.VIRTIO_MMIO_INTERRUPT_ACK, lib.VIRTIO_MMIO_INT_VRING)
    assert driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) == 0


def test_serves_thousands_of_requests_around_the_ring(drive: Drive) -> None:
    """The 16-bit indexes wrap and every request is answered once."""
    driver = drive(Shout())
    (queue,) = driver.start(size=4)
    for _ in range(70_000 // 2):
        queue.driver._free = 0x80000
        queue.free = 0
        queue.add([b"a"], [1])
        queue.add([b"b"])
        queue.kick()
        assert queue.used() == [(0, 1), (2, 0)]


def test_later_completion_out_of_order(drive: Drive) -> None:
    """A request may be completed after others, and after a reset it is dropped."""
    device = Later()
    driver = drive(device)
    (queue,) = driver.start()
    for _ in range(3):
        queue.add([b"x"], [1])
    queue.kick()
    assert queue.used() == []
    device.complete(*device.waiting[2], 1)
    device.complete(*device.waiting[0], 1)
    assert queue.used() == [(4, 1), (0, 1)]
    driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    device.complete(*device.waiting[1], 1)
    assert queue.used() == []


def test_event_index_suppresses_interrupts(drive: Drive) -> None:
    """With EVENT_IDX the driver is interrupted when used.idx passes used_event, and not before (2.7.10)."""
    driver = drive(Shout())
    (queue,) = driver.start(EVENT_IDX)
    driver.memory.write_uint(queue.avail + 4 + 2 * queue.size, 2, 1)  # used_event: tell me of the second
    queue.add([b"x"], [1])
    queue.kick()
    assert driver.interrupts() == 0
    queue.add([b"x"], [1])
    queue.kick()
    assert driver.interrupts() == 1
    assert driver.memory.read_u16(queue.used_ring + 4 + 8 * queue.size) == 2  # avail_event


def test_no_interrupt_flag(drive: Drive) -> None:
    """Without EVENT_IDX the driver's flag says whether it wants to be interrupted (2.7.7)."""
    driver = drive(Shout())
    (queue,) = driver.start()
    driver.memory.write_uint(queue.avail, 2, 1)
    queue.add([b"x"], [1])
    queue.kick()
    assert (queue.used(), driver.interrupts()) == ([(0, 1)], 0)


def test_other_exceptions_reach_the_machine() -> None:
    """A bug in a device is not the driver's fault: it goes to whoever waits for the machine."""

    class Broken(Shout):
        def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
            raise ZeroDivisionError

    driver = Driver(Broken())
    (queue,) = driver.start()
    queue.add([b"x"])
    queue.kick()
    assert [type(error) for error in driver.errors] == [ZeroDivisionError]
    assert not driver.needs_reset
    driver.close()
