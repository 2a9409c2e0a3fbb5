"""The state of a virtio transport and its queues in a snapshot. Layer: virtio.

Whoever takes a snapshot holds the transport's lock, after everything was served that the driver had made available.
Requests that a device keeps even so (`VirtioDevice.unfinished`) are saved as if it had not taken them: after the
restore they are found in the rings, as is what a rate limit kept back.
"""

from __future__ import annotations

from pykvm._native import lib
from pykvm.core.state import BOOL, U8, U16, U32, U64, Int, ListOf, Row, Shape
from pykvm.errors import SnapshotError
from pykvm.virtio.fault import DriverFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.state import State
    from pykvm.virtio.mmio import VirtioMmio
    from pykvm.virtio.queue import Virtqueue

VERSION = 1
MAX_QUEUES = 1024
# size, descriptor table, available and used ring, enabled, next_avail, next_used, signalled
QUEUE = Row(U16, U64, U64, U64, BOOL, U16, U16, U16)
FIELDS = {
    "device_id": U32,
    "status": U8,
    "driver_features": Int(0, (1 << 65) - 1),
    "feature_page": U32,
    "driver_page": U32,
    "queue_index": U32,
    "interrupt_status": U32,
    "generation": U32,
    "queues": ListOf(QUEUE, 0, MAX_QUEUES),
}


def shape_of(transport: VirtioMmio) -> Shape:
    """The transport's fields, and the device's own as device_*; its version counts both."""
    own = transport.device.shape
    fields = {f"device_{name}": kind for name, kind in own.fields.items()} if own is not None else {}
    return Shape(VERSION << 16 | (own.version if own is not None else 0), **FIELDS, **fields)


def save(transport: VirtioMmio) -> State:
    """Registers, queues, and the device's own state. Raises SnapshotError for a device that cannot be saved."""
    device = transport.device
    if device.shape is None:
        raise SnapshotError(f"{device.name} cannot be saved: leave it out, or detach it first")
    with transport.lock:
        own = {f"device_{name}": value for name, value in device.save().items()}
        return {
            "device_id": int(device.device_id),
            **{name: int(value) for name, value in transport.registers().items()},
            "queues": [_save_queue(queue, device.unfinished(queue)) for queue in transport.queues],
            **own,
        }


def _save_queue(queue: Virtqueue, unfinished: int) -> list[int | bool]:
    numbers = (queue.size, queue.desc, queue.avail, queue.used)
    next_avail = (queue.next_avail - unfinished) & 0xFFFF
    return [*map(int, numbers), queue.enabled, next_avail, queue.next_used, queue.signalled]


def restore(transport: VirtioMmio, state: State) -> None:
    """Continue from there; the guest's memory is in place. Raises SnapshotError for the state of another device."""
    device = transport.device
    if state["device_id"] != device.device_id or len(state["queues"]) != len(transport.queues):
        raise SnapshotError(f"{device.name}: the snapshot has another kind of virtio device there")
    if state["driver_features"] & ~transport.offered and state["status"] & lib.VIRTIO_CONFIG_S_FEATURES_OK:
        raise SnapshotError(
            f"{device.name}: the driver uses features that this device does not offer; give it what it had"
        )
    with transport.lock:
        transport.reset()
        transport.set_registers(state)
        for queue, row in zip(transport.queues, state["queues"], strict=True):
            transport.guarded(_restore_queue, queue, row, state["driver_features"])
        device.restore({name: state[f"device_{name}"] for name in device.shape.fields} if device.shape else {})
        if transport.live:
            transport.guarded(device.activate, state["driver_features"])
            transport.look_again()


def _restore_queue(queue: Virtqueue, row: list[int], features: int) -> None:
    size, queue.desc, queue.avail, queue.used, enabled, queue.next_avail, queue.next_used, queue.signalled = row
    if not 1 <= size <= queue.max_size:
        raise DriverFault(f"queue {queue.index} of {size} entries")
    queue.size = size
    if enabled:
        queue.enable(features)
