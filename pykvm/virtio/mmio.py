"""The virtio-mmio transport, version 2: registers, device status, notifications. Layer: virtio.

Source: virtio 1.2, 4.2 (Virtio Over MMIO), 2.1 (device status), 3.1 (initialization).

A notification is an ioeventfd: it wakes the I/O thread and never returns to the vCPU's Python thread. An interrupt is
an irqfd, edge-triggered; the two registers that an interrupt handler touches, InterruptStatus and InterruptACK, are
answered in C (PK_LOAD, PK_CLEAR).
"""

from __future__ import annotations

import os
import threading

from pykvm import log
from pykvm._native import ffi, lib
from pykvm.core.device import Device
from pykvm.core.wires import Wires
from pykvm.errors import KvmError
from pykvm.virtio.fault import DriverFault
from pykvm.virtio.queue import EVENT_IDX, INDIRECT_DESC, Virtqueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from pykvm._native import CData
    from pykvm.core.actions import ActionTable
    from pykvm.core.iothread import IoThread
    from pykvm.core.memory import GuestMemory
    from pykvm.core.outcome import Outcome
    from pykvm.core.state import Shape, State
    from pykvm.kvm.vm import VmFd
    from pykvm.virtio.device import VirtioDevice
    from pykvm.virtio.native import NativeLock

    T = TypeVar("T")

MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR = int.from_bytes(b"PYKV", "little")
NO_SHM = 0xFFFFFFFF  # 4.2.2.1: the length of a shared memory region that does not exist
VERSION_1 = 1 << lib.VIRTIO_F_VERSION_1

ACKNOWLEDGE, DRIVER = lib.VIRTIO_CONFIG_S_ACKNOWLEDGE, lib.VIRTIO_CONFIG_S_DRIVER
FEATURES_OK, DRIVER_OK = lib.VIRTIO_CONFIG_S_FEATURES_OK, lib.VIRTIO_CONFIG_S_DRIVER_OK
NEEDS_RESET = lib.VIRTIO_CONFIG_S_NEEDS_RESET
RING_BIT, CONFIG_BIT = lib.VIRTIO_MMIO_INT_VRING, lib.VIRTIO_MMIO_INT_CONFIG

QUEUE_ADDRESSES = {
    lib.VIRTIO_MMIO_QUEUE_DESC_LOW: ("desc", 0),
    lib.VIRTIO_MMIO_QUEUE_DESC_HIGH: ("desc", 32),
    lib.VIRTIO_MMIO_QUEUE_AVAIL_LOW: ("avail", 0),
    lib.VIRTIO_MMIO_QUEUE_AVAIL_HIGH: ("avail", 32),
    lib.VIRTIO_MMIO_QUEUE_USED_LOW: ("used", 0),
    lib.VIRTIO_MMIO_QUEUE_USED_HIGH: ("used", 32),
}
LOGGED_FAULTS = 10  # of one device; `faults` counts them all
SHM_REGISTERS = range(lib.VIRTIO_MMIO_SHM_LEN_LOW, lib.VIRTIO_MMIO_SHM_BASE_HIGH + 4)


class VirtioMmio(Device):
    """One virtio device in its window of MMIO registers.

    `lock` guards device and queues; `kicks[i]` is the eventfd that a notification of queue i writes, `call` the one
    that raises the interrupt, for back ends in other processes; `wires` has both: who gave them closes them.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        io: IoThread,
        *,
        base: int,
        gsi: int,
        wires: Wires | None = None,
    ) -> None:
        self.device = device
        self.name = device.name
        self.kind = f"virtio {type(device).__name__}"  # in snapshots
        self.memory = memory
        self.io = io.sibling(f"pykvm-{device.name}"[:15]) if device.own_thread else io
        self.base = base
        self.gsi = gsi
        self.lock: threading.RLock | NativeLock = threading.RLock()
        make_queue: type[Virtqueue] = Virtqueue
        if device.native:
            from pykvm.virtio.native import NativeLock, NativeQueue

            self.lock, make_queue = NativeLock(), NativeQueue
        self.queues = [make_queue(index, size, memory) for index, size in enumerate(device.queue_sizes)]
        self._own_wires = wires is None
        self.wires = wires or Wires(len(self.queues))
        self.kicks, self.call = self.wires.kicks, self.wires.call
        self._vm: VmFd | None = None
        self.faults = 0
        self._word: CData = ffi.new("uint32_t *")  # InterruptStatus
        self._on_ready = {index: self._handler(queue) for index, queue in enumerate(self.queues)}
        self._generation = 0
        self._forget()
        try:
            device.bind(self)
        except BaseException:
            self._close_eventfds()
            raise
        for index, kick in enumerate(self.kicks):
            if self._is_ours(index):
                self.io.add_reader(kick, self._on_ready[index])

    @property
    def interrupt_status(self) -> CData:
        """The register InterruptStatus, a uint32_t * for atomic operations."""
        return self._word

    def _is_ours(self, index: int) -> bool:
        """Whether the queue is served here, and not by a back end."""
        return not self.device.external and index not in self.device.outside

    @property
    def _constant_bits(self) -> int:
        """What InterruptStatus always shows: a back end's interrupts do not pass here."""
        return RING_BIT if self.device.external or self.device.outside else 0

    def _forget(self) -> None:
        self.status = 0
        self.driver_features = 0
        self._feature_page = self._driver_page = self._queue_index = 0
        self._word[0] = self._constant_bits

    @property
    def offered(self) -> int:
        """Feature bits that the device offers; of a device with a back end the latter's, with those of its rings."""
        if self.device.external:
            return int(self.device.features)
        return int(self.device.features | VERSION_1 | INDIRECT_DESC | EVENT_IDX)

    # -- the machine's side -------------------------------------------------------------------------------------

    def connect(self, vm: VmFd) -> None:
        """Wire the eventfds to a VM (a new one after a machine reset)."""
        self._vm = vm
        issued = set(vm.issued)
        self.wires.connect(vm, self.gsi, self.base + lib.VIRTIO_MMIO_QUEUE_NOTIFY)
        if not self.device.external and not self.device.outside:
            vm.issued = issued  # nobody else has the wires: the next machine may have them (core.spare)

    def answer_in_c(self, actions: ActionTable) -> None:
        """Let C answer the registers of the interrupt handler."""
        actions.load(self.base + lib.VIRTIO_MMIO_INTERRUPT_STATUS, self._word, mmio=True)
        actions.clear(self.base + lib.VIRTIO_MMIO_INTERRUPT_ACK, self._word, keep=self._constant_bits, mmio=True)

    def reset(self) -> None:
        """Device reset, by the driver (status 0) or with the machine (2.4)."""
        with self.lock:
            self.device.reset()
            if self.device.throttle is not None:
                self.device.throttle.reset()
            for queue in self.queues:
                queue.reset()
            self._forget()

    # -- snapshots ----------------------------------------------------------------------------------------------

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """What `save` gives: registers, queues, and what the device adds."""
        from pykvm.virtio.saved import shape_of

        return shape_of(self)

    def hold(self) -> None:
        """Serve and finish what was made available, then nothing until `release`, on the same thread.

        The vCPUs are paused.
        """
        self.lock.__enter__()
        try:
            if self.live and self.device.shape is not None:
                for queue in () if self.device.external else self.queues:
                    self.guarded(self._drain, queue)
            self.device.freeze()
            self.guarded(self.device.settle)
        except BaseException:
            self.release()
            raise

    def _drain(self, queue: Virtqueue) -> None:
        if queue.enabled and queue.pending():
            self.device.on_notify(queue)

    def release(self) -> None:
        """Undo `hold`."""
        self.device.thaw()
        self.lock.__exit__(None, None, None)

    def check_snapshot(self, *, to_file: bool) -> None:
        """The device's answer."""
        self.device.check_snapshot(to_file=to_file)

    def save(self) -> State:
        """See pykvm.virtio.saved."""
        from pykvm.virtio.saved import save

        return save(self)

    def restore(self, state: State) -> None:
        """See pykvm.virtio.saved."""
        from pykvm.virtio.saved import restore

        restore(self, state)

    def registers(self) -> dict[str, int]:
        """The registers that the driver has written, and InterruptStatus."""
        return {
            "status": self.status,
            "driver_features": self.driver_features,
            "feature_page": self._feature_page,
            "driver_page": self._driver_page,
            "queue_index": self._queue_index,
            "interrupt_status": self._word[0],
            "generation": self._generation,
        }

    def set_registers(self, state: State) -> None:
        """Set them, without any of the effects of writing."""
        self.status, self.driver_features = state["status"], state["driver_features"]
        self._feature_page, self._driver_page = state["feature_page"], state["driver_page"]
        self._queue_index, self._generation = state["queue_index"], state["generation"]
        self._word[0] = state["interrupt_status"]

    def look_again(self) -> None:
        """Serve what may have been made available, and interrupt: one that was on its way may not have come through.

        A driver finds nothing new after an interrupt too many; without one that it waits for it waits for ever.
        """
        self._lower()
        for queue in self.queues:
            if queue.enabled and not self.device.external:
                self.notify(queue.index)
        self._raise(RING_BIT)

    def _lower(self) -> None:
        """Let the next edge be one: a kernel worker makes it, and the state may have been saved in the middle of it."""
        if self._vm is not None:
            try:
                self._vm.irq_line(self.gsi, False)
            except KvmError:
                pass  # ENXIO: the IOAPIC is in user space, an interrupt a message

    def close(self) -> None:
        """Release everything; the machine's I/O thread has ended."""
        if self.device.own_thread:
            self.io.close()
        for kick in self.kicks:
            self.io.remove_reader(kick)
        self.device.close()
        for queue in self.queues:
            queue.release()
        self._close_eventfds()

    def _close_eventfds(self) -> None:
        self.kicks = []
        if self._own_wires:
            self.wires.close()

    # -- notifications and interrupts ---------------------------------------------------------------------------

    def _handler(self, queue: Virtqueue) -> Callable[[], None]:
        def ready() -> None:
            os.eventfd_read(self.kicks[queue.index])
            with self.lock:
                if queue.enabled and self.live:
                    self.guarded(self.device.on_notify, queue)

        return ready

    def guarded(self, function: Callable[..., T], *arguments: object) -> T | None:
        """function(*arguments), under `lock`; a DriverFault in it stops the device, and None is the result."""
        try:
            return function(*arguments)
        except DriverFault as fault:
            self.needs_reset(str(fault))
            return None

    @property
    def live(self) -> bool:
        """Whether queues may be served: the driver said DRIVER_OK, and nothing stopped the device since."""
        return self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK

    def notify(self, index: int) -> None:
        """Serve a queue (again) soon, as if the driver had notified it; from any thread."""
        os.eventfd_write(self.kicks[index], 1)

    def interrupt(self, queue: Virtqueue) -> None:
        """Raise the used-buffer interrupt, if the driver wants to hear of what `queue` got."""
        if queue.should_interrupt():
            self._raise(RING_BIT)

    def config_changed(self) -> None:
        """Raise the configuration-change interrupt (4.2.2.1, ConfigGeneration)."""
        with self.lock:
            self._generation = (self._generation + 1) & 0xFFFFFFFF
            if self.status & DRIVER_OK:
                self._raise(CONFIG_BIT)

    def needs_reset(self, why: str) -> None:
        """Stop the device until the driver resets it (2.1.2); said once a life of the device."""
        with self.lock:
            if self.status & NEEDS_RESET:
                return
            self.status |= NEEDS_RESET
            self.faults += 1
            self.device.stop()
            if self.faults <= LOGGED_FAULTS:  # a driver may break a rule and reset the device all day long
                log.warning("virtio device stopped", device=self.name, reason=why)
            if self.status & DRIVER_OK:
                self._raise(CONFIG_BIT)

    def _raise(self, bit: int) -> None:
        lib.pk_word_or(self._word, bit)
        os.eventfd_write(self.call, 1)

    # -- registers (4.2.2) --------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A register (four bytes wide, else 0), or the configuration space at any width."""
        with self.lock:
            if offset >= lib.VIRTIO_MMIO_CONFIG:
                at = offset - lib.VIRTIO_MMIO_CONFIG
                return int.from_bytes(self.device.config()[at : at + size], "little")
            return self._read_register(offset) if size == 4 and not offset % 4 else 0

    def _read_register(self, offset: int) -> int:
        queue = self._queue()
        if offset == lib.VIRTIO_MMIO_DEVICE_FEATURES:
            return self.offered >> 32 * self._feature_page & 0xFFFFFFFF if self._feature_page < 2 else 0
        if offset in SHM_REGISTERS:
            return NO_SHM
        values = {
            lib.VIRTIO_MMIO_MAGIC_VALUE: MAGIC,
            lib.VIRTIO_MMIO_VERSION: VERSION,
            lib.VIRTIO_MMIO_DEVICE_ID: self.device.device_id,
            lib.VIRTIO_MMIO_VENDOR_ID: VENDOR,
            lib.VIRTIO_MMIO_QUEUE_NUM_MAX: queue.max_size if queue else 0,
            lib.VIRTIO_MMIO_QUEUE_READY: int(queue.enabled) if queue else 0,
            lib.VIRTIO_MMIO_INTERRUPT_STATUS: self._word[0],
            lib.VIRTIO_MMIO_STATUS: self.status,
            lib.VIRTIO_MMIO_CONFIG_GENERATION: self._generation,
        }
        return int(values.get(offset, 0))

    def write(self, offset: int, size: int, value: int) -> Outcome | None:
        """A register (four bytes wide, else ignored), or the configuration space at any width."""
        with self.lock:
            if offset >= lib.VIRTIO_MMIO_CONFIG:
                at = offset - lib.VIRTIO_MMIO_CONFIG
                if at + size <= len(self.device.config()):
                    self.guarded(self.device.write_config, at, value.to_bytes(size, "little"))
            elif size == 4 and not offset % 4:
                self.guarded(self._write_register, offset, value)
        return None

    def _write_register(self, offset: int, value: int) -> None:
        if offset == lib.VIRTIO_MMIO_STATUS:
            self._write_status(value)
        elif offset == lib.VIRTIO_MMIO_QUEUE_NOTIFY:  # the ioeventfds take what names a queue of four bytes
            if value < len(self.queues):
                self.notify(value)
        elif offset == lib.VIRTIO_MMIO_INTERRUPT_ACK:
            lib.pk_word_and(self._word, ~value & 0xFFFFFFFF | self._constant_bits)
        elif offset == lib.VIRTIO_MMIO_DEVICE_FEATURES_SEL:
            self._feature_page = value
        elif offset == lib.VIRTIO_MMIO_DRIVER_FEATURES_SEL:
            self._driver_page = value
        elif offset == lib.VIRTIO_MMIO_DRIVER_FEATURES:
            self._write_features(value)
        elif offset == lib.VIRTIO_MMIO_QUEUE_SEL:
            self._queue_index = value
        else:
            self._write_queue(offset, value)

    def _queue(self) -> Virtqueue | None:
        return self.queues[self._queue_index] if self._queue_index < len(self.queues) else None

    def _write_features(self, value: int) -> None:
        if self.status & FEATURES_OK:
            raise DriverFault("features written after FEATURES_OK (2.2.1)")
        if self._driver_page < 2:
            shift = 32 * self._driver_page
            self.driver_features = self.driver_features & ~(0xFFFFFFFF << shift) | value << shift
        elif value:
            self.driver_features |= 1 << 64  # a bit that nobody offers: FEATURES_OK is refused

    def _write_queue(self, offset: int, value: int) -> None:
        queue = self._queue()
        if queue is None or self.status & DRIVER_OK:
            return  # the queues are frozen: a live one whose rings moved is no queue (CVE-2026-5747)
        if offset == lib.VIRTIO_MMIO_QUEUE_READY:
            if value & 1 and not queue.enabled:
                if not self.status & FEATURES_OK:
                    raise DriverFault(f"queue {queue.index} set up before FEATURES_OK (3.1.1)")
                queue.enable(self.driver_features)
            elif not value & 1:
                queue.release()
        elif not queue.enabled:
            if offset == lib.VIRTIO_MMIO_QUEUE_NUM:
                queue.size = value
            elif offset in QUEUE_ADDRESSES:
                name, shift = QUEUE_ADDRESSES[offset]
                setattr(queue, name, getattr(queue, name) & ~(0xFFFFFFFF << shift) | value << shift)

    # -- device status (2.1, 3.1.1) -----------------------------------------------------------------------------

    def _write_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        value &= 0xFF
        if self.status & ~value & ~NEEDS_RESET:
            raise DriverFault(f"status goes back from {self.status:#x} to {value:#x} (2.1.1)")
        new = value & ~self.status & ~NEEDS_RESET
        if new & FEATURES_OK and not self._features_agreed():
            new &= ~FEATURES_OK  # the driver reads it back and gives up (3.1.1, step 6)
        if new & DRIVER_OK and not (self.status | new) & FEATURES_OK:
            raise DriverFault("DRIVER_OK without FEATURES_OK (3.1.1)")
        self.status |= new
        if new & DRIVER_OK and not self.status & NEEDS_RESET:
            self.device.activate(self.driver_features)
            for queue in self.queues:
                if queue.enabled and not self.device.external:
                    self.notify(queue.index)  # what was made available before DRIVER_OK

    def _features_agreed(self) -> bool:
        return not self.driver_features & ~self.offered and bool(self.driver_features & VERSION_1)
