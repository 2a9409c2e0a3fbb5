"""A virtio driver for tests: handshake and split rings, as a guest does them, on a transport without a VM."""

from __future__ import annotations

import os
import select
import struct
from typing import TYPE_CHECKING

from pykvm._native import lib
from pykvm.core.iothread import IoThread
from pykvm.core.memory import GuestMemory
from pykvm.virtio.mmio import VirtioMmio
from pykvm.virtio.queue import INDIRECT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.virtio.device import VirtioDevice

VERSION_1 = 1 << lib.VIRTIO_F_VERSION_1
INDIRECT_DESC = 1 << lib.VIRTIO_RING_F_INDIRECT_DESC
EVENT_IDX = 1 << lib.VIRTIO_RING_F_EVENT_IDX
NEXT, WRITE = lib.VRING_DESC_F_NEXT, lib.VRING_DESC_F_WRITE
RAM = 1 << 20
RINGS = 0x10000  # queue n's rings at RINGS + n * 0x8000
BUFFERS = 0x80000


class Queue:
    """One ring, driver side. `add` offers a chain, `used` takes back what the device finished."""

    def __init__(self, driver: Driver, index: int, size: int) -> None:
        self.driver, self.index, self.size = driver, index, size
        self.desc = RINGS + index * 0x8000
        self.avail, self.used_ring = self.desc + 0x4000, self.desc + 0x5000
        self.free = 0
        self.avail_idx = self.seen = 0

    def descriptor(self, at: int, gpa: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Write descriptor `at` of the table, whatever it says."""
        self.driver.memory.write(self.desc + 16 * at, struct.pack("<QIHH", gpa, length, flags, following))

    def offer(self, head: int) -> None:
        """Put a head into the available ring."""
        memory = self.driver.memory
        memory.write_uint(self.avail + 4 + 2 * (self.avail_idx % self.size), 2, head)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        memory.write_uint(self.avail + 2, 2, self.avail_idx)

    def add(self, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> list[int]:
        """Offer a chain of buffers; the GPAs of the writable ones."""
        memory, parts, places = self.driver.memory, [], []
        for data in readable:
            gpa = self.driver.allocate(len(data))
            memory.write(gpa, data)
            parts.append((gpa, len(data), 0))
        for length in writable:
            places.append(self.driver.allocate(length))
            parts.append((places[-1], length, WRITE))
        head = self.free
        for i, (gpa, length, flags) in enumerate(parts):
            last = i == len(parts) - 1
            at = (head + i) % self.size
            self.descriptor(at, gpa, length, flags | (0 if last else NEXT), 0 if last else (at + 1) % self.size)
        self.free = (head + len(parts)) % self.size
        self.offer(head)
        return places

    def add_indirect(self, parts: Sequence[tuple[int, int, int]], flags: int = INDIRECT) -> None:
        """Offer one indirect descriptor; parts are (gpa, length, WRITE or 0)."""
        table = self.driver.allocate(16 * len(parts))
        for i, (gpa, length, kind) in enumerate(parts):
            more = NEXT if i < len(parts) - 1 else 0
            self.driver.memory.write(table + 16 * i, struct.pack("<QIHH", gpa, length, kind | more, i + 1))
        self.descriptor(self.free, table, 16 * len(parts), flags)
        self.offer(self.free)
        self.free = (self.free + 1) % self.size

    def used(self) -> list[tuple[int, int]]:
        """(head, bytes written) of each chain finished since the last call."""
        memory, found = self.driver.memory, []
        while self.seen != memory.read_u16(self.used_ring + 2):
            at = self.used_ring + 4 + 8 * (self.seen % self.size)
            found.append((memory.read_u32(at), memory.read_u32(at + 4)))
            self.seen = (self.seen + 1) & 0xFFFF
        return found

    def kick(self) -> None:
        """Notify the device, and serve the notification here and now."""
        self.driver.kick(self.index)


class Driver:
    """A device on a transport with 1 MiB of RAM and no I/O thread running: notifications are served in the test."""

    def __init__(self, device: VirtioDevice, memory: GuestMemory | None = None) -> None:
        self.memory = memory or GuestMemory()
        if not self.memory.slots:
            self.memory.add(0, RAM)
        self.errors: list[BaseException] = []
        self.io = StillIo("test", self.errors.append)
        self.transport = VirtioMmio(device, self.memory, self.io, base=0xD0000000, gsi=16)
        self.queues: list[Queue] = []
        self._free = BUFFERS

    def allocate(self, length: int) -> int:
        """Room for a buffer."""
        gpa, self._free = self._free, self._free + (length + 15) // 16 * 16
        assert self._free <= RAM
        return gpa

    def read(self, register: int, size: int = 4) -> int:
        """Read a register."""
        return self.transport.read(register, size)

    def write(self, register: int, value: int, size: int = 4) -> None:
        """Write a register."""
        self.transport.write(register, size, value)

    def features(self) -> int:
        """What the device offers."""
        value = 0
        for page in (0, 1):
            self.write(lib.VIRTIO_MMIO_DEVICE_FEATURES_SEL, page)
            value |= self.read(lib.VIRTIO_MMIO_DEVICE_FEATURES) << 32 * page
        return value

    def negotiate(self, features: int | None = None) -> None:
        """Up to FEATURES_OK, by default with everything offered but EVENT_IDX."""
        wanted = self.features() & ~EVENT_IDX if features is None else features | VERSION_1
        status = lib.VIRTIO_CONFIG_S_ACKNOWLEDGE | lib.VIRTIO_CONFIG_S_DRIVER
        self.write(lib.VIRTIO_MMIO_STATUS, status)
        for page in (0, 1):
            self.write(lib.VIRTIO_MMIO_DRIVER_FEATURES_SEL, page)
            self.write(lib.VIRTIO_MMIO_DRIVER_FEATURES, wanted >> 32 * page & 0xFFFFFFFF)
        self.write(lib.VIRTIO_MMIO_STATUS, status | lib.VIRTIO_CONFIG_S_FEATURES_OK)

    def setup_queue(self, index: int, size: int | None = None, **addresses: int) -> Queue:
        """Tell the device where queue `index` is, and that it is ready."""
        self.write(lib.VIRTIO_MMIO_QUEUE_SEL, index)
        queue = Queue(self, index, size or min(self.read(lib.VIRTIO_MMIO_QUEUE_NUM_MAX), 64))
        self.write(lib.VIRTIO_MMIO_QUEUE_NUM, queue.size)
        places = {"desc": queue.desc, "avail": queue.avail, "used": queue.used_ring} | addresses
        for name, register in (
            ("desc", lib.VIRTIO_MMIO_QUEUE_DESC_LOW),
            ("avail", lib.VIRTIO_MMIO_QUEUE_AVAIL_LOW),
            ("used", lib.VIRTIO_MMIO_QUEUE_USED_LOW),
        ):
            self.write(register, places[name] & 0xFFFFFFFF)
            self.write(register + 4, places[name] >> 32)
        self.write(lib.VIRTIO_MMIO_QUEUE_READY, 1)
        return queue

    def start(self, features: int | None = None, size: int | None = None) -> list[Queue]:
        """The whole handshake (3.1.1): all queues, DRIVER_OK."""
        self.negotiate(features)
        self.queues = [self.setup_queue(index, size) for index in range(len(self.transport.queues))]
        self.write(lib.VIRTIO_MMIO_STATUS, self.transport.status | lib.VIRTIO_CONFIG_S_DRIVER_OK)
        self.io.run()
        return self.queues

    def kick(self, index: int) -> None:
        """Write QueueNotify and let the device serve it, what it begins beside other things to its end."""
        self.write(lib.VIRTIO_MMIO_QUEUE_NOTIFY, index)
        self.io.run()
        while getattr(self.transport.device, "in_flight", 0):
            self.io.run(wait_ms=1000)

    @property
    def needs_reset(self) -> bool:
        """Whether the device stopped."""
        return bool(self.read(lib.VIRTIO_MMIO_STATUS) & lib.VIRTIO_CONFIG_S_NEEDS_RESET)

    def interrupts(self) -> int:
        """Interrupts raised since the last call (the irqfd's count)."""
        try:
            return os.eventfd_read(self.transport.call)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Give everything back."""
        self.transport.close()
        self.memory.close()


class StillIo(IoThread):
    """An I/O thread without a thread: `run` does in the test what is ready."""

    def sibling(self, name: str) -> IoThread:
        """No second thread either."""
        return self

    def add_reader(self, fd: int, callback: object) -> None:
        """Remember the callback."""
        self._readers[fd] = callback  # type: ignore[assignment]

    def add_handler(self, fd: int, handler: object) -> None:
        """Nothing waits in C here: the reader serves, and calls C itself."""

    def remove_reader(self, fd: int) -> None:
        """Forget it."""
        self._readers.pop(fd, None)

    def add_writer(self, fd: int, callback: object) -> None:
        """Remember the callback."""
        self._writers[fd] = callback  # type: ignore[assignment]

    def remove_writer(self, fd: int) -> None:
        """Forget it."""
        self._writers.pop(fd, None)

    def call_soon(self, callback: object) -> None:
        """Remember it for the next `run`."""
        self._soon.append(callback)  # type: ignore[arg-type]

    def run(self, rounds: int = 100, wait_ms: int = 0) -> None:
        """Call what is ready and what was asked for soon, until nothing is left or `rounds` are over.

        `wait_ms`: how long to wait for the first to become ready.
        """
        for number in range(rounds):
            poll = select.poll()
            for fd in {*self._readers, *self._writers}:
                poll.register(fd, self._events(fd))
            ready = poll.poll(0 if number else wait_ms)
            soon, self._soon = self._soon, []
            if not ready and not soon:
                return
            for fd, events in ready:
                if events != select.POLLOUT and fd in self._readers:
                    self._call(self._readers[fd])
                if events != select.POLLIN and fd in self._writers:
                    self._call(self._writers[fd])
            for callback in soon:
                self._call(callback)
