"""82093AA I/O APIC in user space, for machines whose local APICs alone are in the kernel. Layer: devices.

Source: Intel 82093AA data sheet (290566), chapter 3; the EOI register and version 0x20 are those of Intel's later
chipsets (ICH data sheets, "I/O APIC"). What it sends is an MSI (SDM vol. 3A, 11.11) for KVM_SIGNAL_MSI.

With KVM_CAP_SPLIT_IRQCHIP the kernel returns KVM_EXIT_IOAPIC_EOI for a level-triggered vector only if the GSI
routing table has an MSI route for it among the I/O APIC's pins, and irqfds on those pins need the route as well:
that is what `on_routes_changed` is for.
"""

from __future__ import annotations

from _thread import allocate_lock

from pykvm.core.device import Device
from pykvm.core.state import BOOL, U8, U32, U64, ListOf, Shape
from pykvm.x86.layout import IOAPIC_PINS, LAPIC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.state import State

    Message = tuple[int, int]  # MSI address and data
    Routes = tuple[Message | None, ...]  # by pin

# -- memory-mapped registers -----------------------------------------------------------------------------------
IOREGSEL, IOWIN, EOI = 0x00, 0x10, 0x40

# -- registers behind the window -------------------------------------------------------------------------------
IOAPICID, IOAPICVER, IOAPICARB, IOREDTBL = 0x00, 0x01, 0x02, 0x10
VERSION = 0x20 | (IOAPIC_PINS - 1) << 16

# -- redirection table entry -----------------------------------------------------------------------------------
VECTOR = 0xFF
DELIVERY_MODE_SHIFT = 8
FIXED, LOWEST_PRIORITY, SMI, NMI, INIT = 0, 1, 2, 4, 5  # 7 is ExtINT: there is no 8259 whose vector it could be
DELIVERY_MODES = (FIXED, LOWEST_PRIORITY, SMI, NMI, INIT)
LOGICAL = 1 << 11
REMOTE_IRR = 1 << 14
LEVEL = 1 << 15
MASKED = 1 << 16
DESTINATION_SHIFT = 56
WRITABLE = 0xFF << DESTINATION_SHIFT | 0x1_FFFF & ~(1 << 12 | REMOTE_IRR)  # bit 12, delivery status: always idle

# -- MSI format ------------------------------------------------------------------------------------------------
MSI_DESTINATION_SHIFT, MSI_LOGICAL = 12, 1 << 2
MSI_ASSERT, MSI_LEVEL = 1 << 14, 1 << 15


class IoApic(Device):
    """24 pins. `send_msi(address, data)` delivers; it and `on_routes_changed` are called under the device's lock.

    `on_routes_changed(routes)` gets the message of every pin whenever one changes: None for a pin that must not
    deliver, that is a masked one, unless its last interrupt still waits for its EOI. It is called before a message
    of the new routes is sent.
    """

    name = "ioapic"
    shape = Shape(
        1,
        select=U8,
        id=U32,
        entries=ListOf(U64, IOAPIC_PINS, IOAPIC_PINS),
        lines=ListOf(BOOL, IOAPIC_PINS, IOAPIC_PINS),
    )

    def __init__(
        self,
        send_msi: Callable[[int, int], None],
        on_routes_changed: Callable[[Routes], None] | None = None,
    ) -> None:
        self._send_msi = send_msi
        self._on_routes_changed = on_routes_changed
        self._lock = allocate_lock()
        self._lines = [False] * IOAPIC_PINS
        self._routes: Routes = (None,) * IOAPIC_PINS
        self._power_on()

    def _power_on(self) -> None:
        self._select = 0
        self._id = 0
        self._entries = [MASKED] * IOAPIC_PINS

    @property
    def routes(self) -> Routes:
        """The message of each pin, as `on_routes_changed` last had it."""
        return self._routes

    def reset(self) -> None:
        """Mask every pin. The levels of the lines are their devices' affair and stay."""
        with self._lock:
            self._power_on()
            self._update_routes()

    def save(self) -> State:
        """Registers and the levels of the pins."""
        with self._lock:
            return self.shape.take(self)

    def restore(self, state: State) -> None:
        """Continue from them: what was sent already is in the local APICs, nothing is sent again."""
        with self._lock:
            self.shape.put(self, state)
            self._routes = ()  # KVM may have those of another life
            self._update_routes()

    # -- the machine's side ---------------------------------------------------------------------------------

    def set_irq(self, pin: int, level: bool) -> None:
        """Drive a pin; `level` is True for asserted, whatever polarity the guest has programmed."""
        if not 0 <= pin < IOAPIC_PINS:
            return
        with self._lock:
            rising = level and not self._lines[pin]
            self._lines[pin] = level
            if _is_level(self._entries[pin]):
                self._deliver_level(pin)
            elif rising and not self._entries[pin] & MASKED:
                self._send(pin)

    def eoi(self, vector: int) -> None:
        """A local APIC ended the level-triggered interrupt `vector`; lines still asserted interrupt again."""
        with self._lock:
            for pin, entry in enumerate(self._entries):
                if entry & REMOTE_IRR and entry & VECTOR == vector:
                    self._entries[pin] = entry & ~REMOTE_IRR
                    if entry & MASKED:
                        self._update_routes()
                    self._deliver_level(pin)

    # -- the guest's side -----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Registers are 32 bits wide; a narrower read gets its part, and what is no register reads as 0."""
        with self._lock:
            register = {IOREGSEL: self._select, IOWIN: self._read_window()}.get(offset & ~3, 0)
        return register >> (8 * (offset & 3)) & (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Writes of other than 32 bits are cut or extended with zeros, as the in-kernel I/O APIC does."""
        if offset == EOI:
            self.eoi(value & VECTOR)
            return
        with self._lock:
            if offset == IOREGSEL:
                self._select = value & 0xFF
            elif offset == IOWIN:
                self._write_window(value & 0xFFFF_FFFF)

    def _read_window(self) -> int:
        pin, high = divmod(self._select - IOREDTBL, 2)
        if 0 <= pin < IOAPIC_PINS:
            return self._entries[pin] >> (32 * high) & 0xFFFF_FFFF
        return {IOAPICID: self._id, IOAPICVER: VERSION, IOAPICARB: self._id}.get(self._select, 0)

    def _write_window(self, value: int) -> None:
        if self._select == IOAPICID:
            self._id = value & 0x0F00_0000
            return
        pin, high = divmod(self._select - IOREDTBL, 2)
        if not 0 <= pin < IOAPIC_PINS:
            return
        entry = self._entries[pin]
        other_half = entry & (0xFFFF_FFFF << (0 if high else 32))
        entry = (other_half | value << (32 * high)) & WRITABLE | entry & REMOTE_IRR
        if not _is_level(entry):
            entry &= ~REMOTE_IRR  # how kernels end an interrupt on an I/O APIC without an EOI register
        self._entries[pin] = entry
        self._update_routes()
        self._deliver_level(pin)

    # -- delivery -------------------------------------------------------------------------------------------

    def _deliver_level(self, pin: int) -> None:
        """Send the interrupt of an asserted level-triggered pin, unless masked or still in service."""
        entry = self._entries[pin]
        if self._lines[pin] and _is_level(entry) and not entry & (MASKED | REMOTE_IRR):
            self._entries[pin] = entry | REMOTE_IRR
            self._send(pin)

    def _send(self, pin: int) -> None:
        message = _message(self._entries[pin])
        if message is not None:
            self._send_msi(*message)

    def _update_routes(self) -> None:
        routes = tuple(None if entry & (MASKED | REMOTE_IRR) == MASKED else _message(entry) for entry in self._entries)
        if routes != self._routes:
            self._routes = routes
            if self._on_routes_changed is not None:
                self._on_routes_changed(routes)


def _is_level(entry: int) -> bool:
    """Whether the pin is level-triggered; SMI, NMI and INIT are edges, whatever the trigger bit says (3.2.4)."""
    return bool(entry & LEVEL) and entry >> DELIVERY_MODE_SHIFT & 7 in (FIXED, LOWEST_PRIORITY)


def _message(entry: int) -> Message | None:
    """The MSI of a redirection entry; None for delivery modes that are reserved or need an 8259."""
    mode = entry >> DELIVERY_MODE_SHIFT & 7
    if mode not in DELIVERY_MODES:
        return None
    address = LAPIC | entry >> DESTINATION_SHIFT << MSI_DESTINATION_SHIFT
    if entry & LOGICAL:
        address |= MSI_LOGICAL
    data = entry & VECTOR | mode << DELIVERY_MODE_SHIFT
    if _is_level(entry):
        data |= MSI_LEVEL | MSI_ASSERT
    return address, data
