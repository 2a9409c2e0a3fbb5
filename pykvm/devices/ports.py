"""Lone ports of a PC: system control B (0x61), POST code (0x80), system control A (0x92). Layer: devices.

Source: Intel ICH9 data sheet (316972), 13.7 processor interface registers; IBM PS/2 technical reference.

Port 0x61 is answered by KVM itself, and an exit never comes here, when KVM_CREATE_PIT2 was called with
KVM_PIT_SPEAKER_DUMMY: the kernel's PIT knows the true output of counter 2. `SystemControlB` is for machines
without that.
"""

from __future__ import annotations

import time

from pykvm.core.outcome import Outcome
from pykvm.core.state import S64, U8, ListOf, Shape
from pykvm.devices.bytewide import ByteDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# -- port 0x61 ----------------------------------------------------------------------------------------------
TIMER2_GATE = 0x01
CONTROL_B_WRITABLE = 0x0F  # timer 2 gate, speaker data, and the enables of two NMI sources that never fire
REFRESH_TOGGLE = 0x10
TIMER2_OUT = 0x20
REFRESH_NS = 15_085  # one DRAM refresh of an AT, 18 counts of the 1.193182 MHz clock
TIMER2_NS = 10_000_000  # the count for which Linux (CAL_MS) and others arm counter 2 when they measure the TSC

# -- port 0x92 ----------------------------------------------------------------------------------------------
INIT_NOW, A20_GATE = 0x01, 0x02

POST_HISTORY = 16


class SystemControlB(ByteDevice):
    """Port 0x61: the gate of timer 2, its output, and the refresh toggle that old delay loops count.

    There is no PIT behind it. Its output is what a counter armed for 10 ms in mode 0 would show: low when the
    gate opens, high 10 ms later, so that calibration loops that poll it end and measure the right time.
    """

    name = "system control B"
    shape = Shape(1, control=U8, gate_age_ns=S64)

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self.reset()

    def reset(self) -> None:
        """Gate closed, speaker off."""
        self._control = 0
        self._gate_opened_ns = 0

    @property
    def _gate_age_ns(self) -> int:
        """How long ago the gate opened."""
        return self._clock_ns() - self._gate_opened_ns

    @_gate_age_ns.setter
    def _gate_age_ns(self, value: int) -> None:
        self._gate_opened_ns = self._clock_ns() - value

    def read_byte(self, offset: int) -> int:
        """The control bits, with the two that time moves."""
        if offset != 0:
            return 0xFF
        now = self._clock_ns()
        value = self._control
        if now // REFRESH_NS & 1:
            value |= REFRESH_TOGGLE
        if value & TIMER2_GATE and now - self._gate_opened_ns >= TIMER2_NS:
            value |= TIMER2_OUT
        return value

    def write_byte(self, offset: int, value: int) -> None:
        """Set the control bits; the gate's rising edge starts the count, and so does writing it again."""
        if offset == 0:
            self._control = value & CONTROL_B_WRITABLE
            if value & TIMER2_GATE:
                self._gate_opened_ns = self._clock_ns()


class PostCode(ByteDevice):
    """Port 0x80: firmware's progress codes, kept for the crash report (and Linux's way to wait a moment)."""

    name = "POST code"
    shape = Shape(1, codes=ListOf(U8, 0, POST_HISTORY))

    def __init__(self) -> None:
        self._codes: list[int] = []

    @property
    def codes(self) -> list[int]:
        """The last ones written, oldest first."""
        return self._codes

    def read_byte(self, offset: int) -> int:
        """The last code: the port is a spare page register of the DMA controller, which reads back."""
        codes = self._codes
        return codes[-1] if offset == 0 and codes else 0

    def write_byte(self, offset: int, value: int) -> None:
        """Note a code; a repetition of the last one is no progress and does not push out older ones."""
        codes = self._codes
        if offset == 0 and codes[-1:] != [value]:
            codes.append(value)
            del codes[:-POST_HISTORY]

    def reset(self) -> None:
        """Forget the codes."""
        self._codes.clear()


class SystemControlA(ByteDevice):
    """Port 0x92: fast A20 gate and fast INIT. A20 is only remembered: KVM guests always see all of memory."""

    name = "system control A"
    shape = Shape(1, a20=U8)

    def __init__(self) -> None:
        self._a20 = A20_GATE

    def read_byte(self, offset: int) -> int:
        """The A20 bit."""
        return self._a20 if offset == 0 else 0xFF

    def write_byte(self, offset: int, value: int) -> Outcome | None:
        """Set A20; INIT_NOW resets the machine."""
        if offset != 0:
            return None
        self._a20 = value & A20_GATE
        return Outcome.RESET if value & INIT_NOW else None

    def reset(self) -> None:
        """A20 on."""
        self._a20 = A20_GATE
