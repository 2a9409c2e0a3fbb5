"""16550A UART: one COM port of a PC. Layer: devices.

Source: Texas Instruments PC16550D data sheet (SNLS378), sections 8.1 to 8.9; the names are its own. What is
not modelled is time: a character is on the host's side as soon as the guest has written it, at any baud rate.

Three liberties, none of which a guest can tell from a well-timed sender at the other end of the cable:

- the sender never fills the receive FIFO beyond the trigger level, so that each character read makes a new
  edge on the (edge-triggered) interrupt line as it would at a real baud rate; characters below the trigger
  level raise the character time-out interrupt at once;
- the sender waits until somebody listens: until the receive interrupt is enabled or the line status register
  is polled. Drivers reset the FIFO while they start, and input typed ahead would be lost in there;
- the sender waits while the UART is in loopback mode.
"""

from __future__ import annotations

from _thread import allocate_lock

from pykvm.core.state import BOOL, LINE, U8, U16, ListOf, Shape
from pykvm.devices.bytewide import ByteDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pykvm.core.device import IrqLine
    from pykvm.core.state import State

    class FastConsole(Protocol):
        """The C side's short cut. Both switches start off and work on every vCPU before they return."""

        def enable_tx(self, on: bool) -> None:
            """Whether writes to offset 0 are appended to the ring instead of reaching `Serial.write`."""

        def enable_lsr(self, on: bool) -> None:
            """Whether reads of offset 5 are answered with LSR_IDLE instead of reaching `Serial.read`."""

        def drain(self) -> bytes:
            """Take all bytes out of the ring, oldest first."""


# -- register offsets (8.0, table II) ----------------------------------------------------------------------
RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

IER_RDI, IER_THRI, IER_RLSI, IER_MSI = 0x01, 0x02, 0x04, 0x08  # received data, THR empty, line status, modem

IIR_MODEM, IIR_NONE, IIR_THRE, IIR_RX_DATA, IIR_LINE, IIR_TIMEOUT = 0x00, 0x01, 0x02, 0x04, 0x06, 0x0C
IIR_FIFOS = 0xC0  # reads as one while the FIFOs are on

FCR_ENABLE, FCR_CLEAR_RX = 0x01, 0x02
RX_TRIGGERS = (1, 4, 8, 14)  # by bits 7:6 of FCR
FIFO_DEPTH = 16

LCR_DLAB = 0x80

MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10

LSR_DR, LSR_OE, LSR_PE, LSR_FE, LSR_BI = 0x01, 0x02, 0x04, 0x08, 0x10
LSR_THRE, LSR_TEMT, LSR_FIFO_ERROR = 0x20, 0x40, 0x80
LSR_IDLE = LSR_THRE | LSR_TEMT

MSR_DCTS, MSR_DDSR, MSR_TERI, MSR_DDCD = 0x01, 0x02, 0x04, 0x08
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
CABLE = MSR_CTS | MSR_DSR | MSR_DCD  # a terminal that is always there and always ready

DIVISOR_9600 = 12
POLLS_TO_LISTEN = 2  # LSR reads in a row with nothing in between; a writer reads it once for each character


class Serial(ByteDevice):
    """One UART, 8 byte-wide registers.

    `sink` gets what the guest sends, in order, on the vCPU's thread and under the device's lock. `irq` is the
    interrupt line, which OUT2 gates as on every PC; `out2_gates_irq=False` is for guests that never set OUT2
    because they know only emulators without the gate. `on_rx_space`, when set, is called without the lock as
    soon as the guest has made room after `receive` had to turn characters away.

    `fast` lets C handle the two hot registers as long as the guest cannot tell: THR while a write has no side
    effect, LSR while it reads LSR_IDLE.
    """

    shape = Shape(
        1,
        **dict.fromkeys(("ier", "fcr", "lcr", "mcr", "scr", "trigger", "errors", "lines", "deltas", "polls"), U8),
        **dict.fromkeys(("thre", "timeout", "listening", "starved"), BOOL),
        divisor=U16,
        rx=ListOf(U16, 0, FIFO_DEPTH),
        irq=LINE,
    )

    def __init__(
        self,
        irq: IrqLine,
        sink: Callable[[bytes], None],
        *,
        fast: FastConsole | None = None,
        name: str = "serial",
        out2_gates_irq: bool = True,
    ) -> None:
        self.name = name
        self.on_rx_space: Callable[[], None] | None = None
        self._irq = irq
        self._sink = sink
        self._fast = fast
        # What the fast path may do; without one they shorten the way through this class.
        self._plain_tx = self._plain_lsr = False
        self._irq_gate = MCR_OUT2 if out2_gates_irq else 0
        self._lock = allocate_lock()
        self._rx: list[int] = []  # characters, each with its LSR error bits shifted left by 8
        self._power_on()
        self._settle()

    def _power_on(self) -> None:
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = 0
        self._divisor = DIVISOR_9600
        self._rx.clear()
        self._trigger = 1
        self._errors = 0  # OE, PE, FE, BI as LSR shows them until it is read
        self._thre = False  # a THRE interrupt is due; only ever set while IER_THRI is
        self._timeout = True  # characters below the trigger level interrupt
        self._lines = CABLE
        self._deltas = 0  # the low half of MSR
        self._listening = False
        self._polls = 0
        self._starved = False  # `receive` turned bytes away

    # -- the host's side ------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> int:
        """Offer characters to the guest; returns how many were taken (from the front), possibly none."""
        with self._lock:
            taken = data[: self._room()]
            self._rx.extend(taken)
            self._starved = len(taken) < len(data)
            self._settle()
            return len(taken)

    def receive_break(self) -> bool:
        """Send a break condition (Linux: SysRq); False when the UART is in loopback and does not hear it."""
        with self._lock:
            if self._mcr & MCR_LOOP:
                return False
            self._push(LSR_BI << 8)
            self._settle()
            return True

    def flush(self) -> None:
        """Pass what is in the fast path's ring on to the sink."""
        if self._fast is not None:
            with self._lock:
                self._drain(self._fast)

    def reset(self) -> None:
        """Master reset; what the guest has sent is delivered, what it has not read is lost."""
        with self._lock:
            if self._fast is not None:
                self._drain(self._fast)
            starved = self._starved
            self._power_on()
            self._starved = starved
            self._settle()

    def save(self) -> State:
        """The registers and what waits in the receiver; what the guest has sent is delivered first."""
        with self._lock:
            if self._fast is not None:
                self._drain(self._fast)
            return self.shape.take(self)

    def restore(self, state: State) -> None:
        """Continue from them."""
        with self._lock:
            if self._fast is not None:
                self._drain(self._fast)
            self.shape.put(self, state)
            self._settle()

    # -- the guest's side -----------------------------------------------------------------------------------

    def read_byte(self, offset: int) -> int:
        """Read a register."""
        if offset == LSR and self._plain_lsr:
            return LSR_IDLE
        with self._lock:
            value = self._read_lsr() if offset == LSR else self._read_register(offset)
            hungry = self._settle()
        if hungry and self.on_rx_space is not None:
            self.on_rx_space()
        return value

    def write_byte(self, offset: int, value: int) -> None:
        """Write a register."""
        with self._lock:
            if offset == THR and not self._lcr & LCR_DLAB:
                self._transmit(value)
                if self._plain_tx:
                    return
            else:
                self._write_register(offset, value)
            hungry = self._settle()
        if hungry and self.on_rx_space is not None:
            self.on_rx_space()

    def _read_register(self, offset: int) -> int:
        self._polls = 0
        if offset == RBR:
            return self._divisor & 0xFF if self._lcr & LCR_DLAB else self._read_rbr()
        if offset == IER:
            return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
        if offset == IIR:
            cause = self._cause()
            if cause == IIR_THRE:
                self._thre = False  # table IV: reading IIR acknowledges THRE, if it is the source shown
            return cause | (IIR_FIFOS if self._fcr & FCR_ENABLE else 0)
        if offset == MSR:
            value = self._lines | self._deltas
            self._deltas = 0
            return value
        return {LCR: self._lcr, MCR: self._mcr, SCR: self._scr}.get(offset, 0xFF)

    def _read_rbr(self) -> int:
        if not self._rx:
            return 0
        value = self._rx.pop(0) & 0xFF
        self._surface()
        if 0 < len(self._rx) < self._trigger:
            # 8.4.1: reading a character clears the time-out and restarts its timer. Ours expires at once, but
            # the line has to fall in between: an interrupt handler may take one character per edge.
            self._timeout = False
            self._lower_irq()
            self._timeout = True
        return value

    def _read_lsr(self) -> int:
        value = LSR_IDLE | self._errors
        if self._rx:
            value |= LSR_DR
        elif self._starved:
            self._polls += 1
            if self._polls >= POLLS_TO_LISTEN:
                self._listening = True
        if self._fcr & FCR_ENABLE and (
            self._errors & (LSR_PE | LSR_FE | LSR_BI) or any(each >> 8 for each in self._rx)
        ):
            value |= LSR_FIFO_ERROR
        self._errors = 0
        return value

    def _write_register(self, offset: int, value: int) -> None:
        self._polls = 0
        if offset == IER and not self._lcr & LCR_DLAB:
            # Enabling the THRE interrupt while THR is empty raises it, also when it was acknowledged before.
            if (value ^ self._ier) & IER_THRI:
                self._thre = bool(value & IER_THRI)
            self._ier = value & 0x0F
            if value & IER_RDI:
                self._listening = True
        elif offset == DLL:
            self._divisor = self._divisor & 0xFF00 | value
        elif offset == DLM:
            self._divisor = self._divisor & 0xFF | value << 8
        elif offset == FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self._lcr = value
        elif offset == MCR:
            self._mcr = value & 0x1F
            self._set_lines()
        elif offset == SCR:
            self._scr = value

    def _write_fcr(self, value: int) -> None:
        if not value & FCR_ENABLE:
            value = 0  # 8.5: the other bits are programmed only together with bit 0
        if value & FCR_CLEAR_RX or (value ^ self._fcr) & FCR_ENABLE:
            self._rx.clear()
            self._listening = bool(self._ier & IER_RDI)
        self._fcr = value
        self._trigger = RX_TRIGGERS[value >> 6]

    def _transmit(self, value: int) -> None:
        self._polls = 0
        if self._mcr & MCR_LOOP:
            self._push(value)
        else:
            if self._fast is not None:
                self._drain(self._fast)
            self._sink(value.to_bytes(1, "little"))
        if self._ier & IER_THRI:
            # Writing THR acknowledges the interrupt; THR is empty again at once: a new interrupt, a new edge.
            self._thre = False
            self._lower_irq()
            self._thre = True

    def _set_lines(self) -> None:
        """Recompute the modem inputs, which loopback connects to the outputs (8.6, bit 4), and deltas."""
        lines, mcr = CABLE, self._mcr
        if mcr & MCR_LOOP:
            lines = MSR_CTS if mcr & MCR_RTS else 0
            lines |= MSR_DSR if mcr & MCR_DTR else 0
            lines |= MSR_RI if mcr & MCR_OUT1 else 0
            lines |= MSR_DCD if mcr & MCR_OUT2 else 0
        changed = lines ^ self._lines
        if self._lines & ~lines & MSR_RI == 0:
            changed &= ~MSR_RI  # TERI: the trailing edge only
        self._deltas |= changed >> 4
        self._lines = lines

    # -- receiver -------------------------------------------------------------------------------------------

    def _room(self) -> int:
        """How many characters the sender may send now."""
        if not self._listening or self._mcr & MCR_LOOP:
            return 0
        return max(self._trigger - len(self._rx), 0)

    def _push(self, entry: int) -> None:
        """Take a character from the shift register. On overrun a FIFO keeps the old, RBR alone the new."""
        depth = FIFO_DEPTH if self._fcr & FCR_ENABLE else 1
        if len(self._rx) < depth:
            self._rx.append(entry)
        else:
            self._errors |= LSR_OE
            if depth == 1:
                self._rx[0] = entry
        self._surface()

    def _surface(self) -> None:
        """Errors of a character show in LSR when it is the next to be read (8.4)."""
        if self._rx and self._rx[0] > 0xFF:
            self._errors |= self._rx[0] >> 8
            self._rx[0] &= 0xFF

    # -- interrupts and the fast path -----------------------------------------------------------------------

    def _cause(self) -> int:
        """The pending enabled interrupt of the highest priority, as IIR names it (table IV)."""
        ier = self._ier
        if ier & IER_RLSI and self._errors:
            return IIR_LINE
        if ier & IER_RDI and self._rx:
            if len(self._rx) >= self._trigger:
                return IIR_RX_DATA
            if self._timeout:
                return IIR_TIMEOUT
        if self._thre:
            return IIR_THRE
        if ier & IER_MSI and self._deltas:
            return IIR_MODEM
        return IIR_NONE

    def _lower_irq(self) -> None:
        """Let the line fall for a moment, unless another cause holds it; `_settle` raises it again."""
        if self._cause() == IIR_NONE:
            self._irq.set(False)

    def _settle(self) -> bool:
        """Bring short cuts and interrupt line in step with the registers; True: tell the sender."""
        held = self._starved and not self._listening  # then polling has to be seen
        lsr = not (held or self._rx or self._errors)
        if lsr is not self._plain_lsr:
            self._plain_lsr = lsr
            if self._fast is not None:
                self._fast.enable_lsr(lsr)
        tx = not (held or self._lcr & LCR_DLAB or self._mcr & MCR_LOOP or self._ier & IER_THRI)
        if tx is not self._plain_tx:
            self._plain_tx = tx
            if self._fast is not None:
                self._fast.enable_tx(tx)
                self._drain(self._fast)
        # Only now: the interrupt handler must not meet an LSR from before.
        self._irq.set(self._mcr & self._irq_gate == self._irq_gate and self._cause() != IIR_NONE)
        if self._starved and not self._rx and self._room():  # not for each character: it wakes a thread
            self._starved = False
            return True
        return False

    def _drain(self, fast: FastConsole) -> None:
        data = fast.drain()
        if data:
            self._sink(data)
