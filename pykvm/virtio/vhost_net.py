"""A network device whose frames the host's kernel moves: /dev/vhost-net between tap and guest. Layer: virtio.

Source: <linux/vhost.h>. The kernel walks the queues of frames itself, with the eventfds of the transport for kicks and
interrupts: neither frame nor notification comes to this process. Set up here, at DRIVER_OK, are the table of guest
memory and the rings; the control queue and the configuration space stay pykvm's.
"""

from __future__ import annotations

import errno
import os

from pykvm._native import ffi, lib
from pykvm.errors import ConfigError, SnapshotError
from pykvm.virtio.fault import DriverFault
from pykvm.virtio.mmio import VERSION_1
from pykvm.virtio.net import RX, TX, Net
from pykvm.virtio.netbackend import net_bits
from pykvm.virtio.queue import EVENT_IDX, INDIRECT_DESC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm._native import CData
    from pykvm.virtio.mmio import VirtioMmio
    from pykvm.virtio.netbackend import NetBackend
    from pykvm.virtio.queue import Virtqueue

DEVICE = "/dev/vhost-net"
NO_BACKEND = -1
# what the kernel has to do with a frame itself; checksums and segments are the tap's
RING_FEATURES = VERSION_1 | EVENT_IDX | INDIRECT_DESC | net_bits("MRG_RXBUF")
ADVICE = {
    errno.ENOENT: "this kernel has no vhost_net: modprobe vhost_net",
    errno.ENODEV: "this kernel has no vhost_net: modprobe vhost_net",
    errno.EACCES: f"it needs read and write permission of {DEVICE} (group kvm)",
    errno.EPERM: f"it needs read and write permission of {DEVICE} (group kvm)",
}


class VhostNet(Net):
    """A network interface on a tap, served by the host's kernel; parameters as of Net.

    It stays with its tap, and a machine with it can neither be forked nor saved: what the kernel does with the queues
    leaves no trace here. There is no rate limit (a tap has tc), and `frames`, `bytes` and `dropped` count nothing (the
    tap itself does).

    Raises ConfigError.
    """

    outside = (RX, TX)
    shape = None  # type: ignore[assignment]

    def __init__(self, tap: NetBackend, *, mac: str | None = None, mtu: int | None = None, link: bool = True) -> None:
        self._vhost = -1
        self._running = False
        self._base = {RX: 0, TX: 0}  # where the kernel goes on in the available ring
        super().__init__(tap, mac=mac, mtu=mtu, link=link, native=False)
        try:
            if not tap.is_plain:
                raise ConfigError("vhost", f"{tap.name} has no virtio header (IFF_VNET_HDR), which vhost-net needs")
            self._error_event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        try:
            self._vhost = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
            self._call("SET_OWNER", ffi.NULL)
            offered = ffi.new("uint64_t *")
            self._call("GET_FEATURES", offered)
        except OSError as error:
            advice = ADVICE.get(error.errno or 0, "")
            what = f"{DEVICE} cannot be used: {error.strerror}"
            raise ConfigError("vhost", f"{what}: {advice}" if advice else what) from None
        if missing := RING_FEATURES & ~offered[0]:
            raise ConfigError("vhost", f"{DEVICE} of this kernel lacks features {missing:#x}")

    def _call(self, name: str, argument: CData) -> None:
        """The ioctl VHOST_`name`. Raises OSError."""
        result = lib.pk_ioctl(self._vhost, getattr(lib, f"VHOST_{name}"), argument)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    # -- life ---------------------------------------------------------------------------------------------------

    def bind(self, transport: VirtioMmio) -> None:
        """Hear of what the kernel finds wrong with the rings."""
        super().bind(transport)
        self.io.add_reader(self._error_event, self._on_error)

    def _on_error(self) -> None:
        os.eventfd_read(self._error_event)
        with self.transport.lock:
            if self._running:
                self.transport.needs_reset("the kernel (vhost-net) found a broken rule in a queue, or a bad address")

    def activate(self, features: int) -> None:
        """Hand memory and queues to the kernel."""
        self._agree(features)
        self._base = {RX: 0, TX: 0}
        if self.link:
            self._start()

    def _start(self) -> None:
        try:
            self._call("SET_FEATURES", ffi.new("uint64_t *", self.negotiated & RING_FEATURES))
            self._call("SET_MEM_TABLE", self._memory_table())
            for index in self.outside:
                if self.queues[index].enabled:
                    self._set_queue(self.queues[index])
        except OSError as error:
            raise DriverFault(f"the kernel (vhost-net) does not take the queues: {error.strerror}") from None
        self._running = True

    def _memory_table(self) -> CData:
        """Every slot that the guest may write: rings and buffers elsewhere are the kernel's to refuse."""
        slots = [slot for slot in self.memory.slots if not slot.readonly]
        return ffi.new("struct vhost_memory *", (len(slots), 0, [(slot.gpa, slot.size, slot.hva, 0) for slot in slots]))

    def _set_queue(self, queue: Virtqueue) -> None:
        index = queue.index
        rings = [self._hva(gpa) for gpa in (queue.desc, queue.used, queue.avail)]
        self._call("SET_VRING_NUM", ffi.new("struct vhost_vring_state *", (index, queue.size)))
        self._call("SET_VRING_BASE", ffi.new("struct vhost_vring_state *", (index, self._base[index])))
        self._call("SET_VRING_ADDR", ffi.new("struct vhost_vring_addr *", (index, 0, *rings, 0)))
        self._set_file("SET_VRING_CALL", index, self.transport.call)
        self._set_file("SET_VRING_ERR", index, self._error_event)
        self._set_file("SET_VRING_KICK", index, self.transport.kicks[index])
        self._set_file("NET_SET_BACKEND", index, self.backend.fd)

    def _set_file(self, name: str, index: int, fd: int) -> None:
        self._call(name, ffi.new("struct vhost_vring_file *", (index, fd)))

    def _hva(self, gpa: int) -> int:
        """The queue's own checks have found each ring to be in one slot."""
        slot = self.memory.slot_at(gpa)
        assert slot is not None
        return slot.hva + gpa - slot.gpa

    def stop(self) -> None:
        """The kernel lets go of the queues: when this returns it touches neither rings nor buffers any more."""
        running, self._running = self._running, False
        if not running:
            return
        for index in self.outside:
            if self.queues[index].enabled:
                state = ffi.new("struct vhost_vring_state *", (index, 0))
                self._set_file("NET_SET_BACKEND", index, NO_BACKEND)
                self._call("GET_VRING_BASE", state)
                self._base[index] = state.num

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out, as the guest sees it; from any thread. What it sends waits while it is out."""
        with self.transport.lock:
            if up == self.link:
                return
            self.link = up
            self.backend.set_link(up)
            if not up:
                self.stop()
            elif self.transport.live:
                self.transport.guarded(self._start)
                for index in self.outside:
                    self.transport.notify(index)
            self.config_changed()

    def plug(self, backend: NetBackend | None) -> None:
        """Not this one. Raises ConfigError."""
        if backend is not None:
            backend.close()
        raise ConfigError("net", f"{self.name} is served by vhost-net: it stays with its tap")

    def twin(self) -> Net:
        """Not of this one. Raises SnapshotError."""
        raise SnapshotError(f"{self.name} cannot be forked: leave it out, or its vhost")

    def recipe(self) -> tuple[str, dict[str, object]]:
        """Not of this one. Raises SnapshotError."""
        raise SnapshotError(f"{self.name} cannot be saved to a file: leave it out, or its vhost")

    def close(self) -> None:
        """Close the kernel's end, then the tap."""
        if hasattr(self, "io"):
            self.io.remove_reader(self._error_event)
        for fd in (self._vhost, getattr(self, "_error_event", -1)):
            if fd >= 0:
                os.close(fd)
        self._vhost = self._error_event = -1
        super().close()
