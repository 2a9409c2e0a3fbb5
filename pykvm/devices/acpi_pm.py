"""ACPI fixed hardware: PM1 event and control block, PM timer, one GPE block, and their SCI. Layer: devices.

The blocks lie at the offsets that layout gives and the FADT names. There is no SMI command port: ACPI mode
is always on and SCI_EN reads one. Only S5 exists.

Source: ACPI specification 6.5, 4.8 (fixed and generic hardware).
"""

from __future__ import annotations

from _thread import allocate_lock
from time import monotonic_ns

from pykvm.core.device import Device
from pykvm.core.outcome import Outcome
from pykvm.core.state import LINE, U16, U64, Shape
from pykvm.x86.dsdt import S5_SLP_TYP
from pykvm.x86.layout import ACPI_PM_LENGTH, GPE0, GPE0_LENGTH, PM1_CONTROL, PM1_EVENT, PM_TIMER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.device import IrqLine
    from pykvm.core.state import State

# PM1 status and enable (4.8.3.1): the bits that this machine can set or that an OS may enable
TMR_STS, GBL_STS, PWRBTN_STS, SLPBTN_STS, RTC_STS = 1 << 0, 1 << 5, 1 << 8, 1 << 9, 1 << 10
ENABLE_BITS = TMR_STS | GBL_STS | PWRBTN_STS | SLPBTN_STS | RTC_STS

# PM1 control (4.8.3.2); GBL_RLS and SLP_EN are write-only
SCI_EN, BM_RLD, SLP_EN = 1 << 0, 1 << 1, 1 << 13
SLP_TYP_SHIFT, SLP_TYP_MASK = 10, 7 << 10
CONTROL_BITS = BM_RLD | SLP_TYP_MASK

PM_TIMER_HZ = 3_579_545
TIMER_BITS = 32  # TMR_VAL_EXT in the FADT
TIMER_MASK = (1 << TIMER_BITS) - 1
HALF_TURN = 1 << (TIMER_BITS - 1)  # ticks between two changes of the top bit, which set TMR_STS

PM1_STATUS, PM1_ENABLE = PM1_EVENT, PM1_EVENT + 2
GPE_HALF = GPE0_LENGTH // 2
GPE_STATUS, GPE_ENABLE = GPE0, GPE0 + GPE_HALF


class AcpiPm(Device):
    """The fixed hardware.

    `sci` is level-triggered. `clock_ns` is what the timer counts. `call_later(seconds, function)` serves
    the one event that comes without an access, the timer's carry; without it that sets its status bit only
    when looked at.
    """

    name = "acpi_pm"
    length = ACPI_PM_LENGTH
    shape = Shape(
        1, elapsed_ns=U64, turns=U64, status=U16, enable=U16, control=U16, gpe_status=U16, gpe_enable=U16, sci=LINE
    )

    def __init__(
        self,
        sci: IrqLine,
        *,
        clock_ns: Callable[[], int] = monotonic_ns,
        call_later: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        self._sci = sci
        self._clock_ns = clock_ns
        self._call_later = call_later
        self._lock = allocate_lock()
        self._carry_due = False  # at most one call is pending: a guest that toggles TMR_EN makes no more
        self._power_on()

    def _power_on(self) -> None:
        self._origin_ns = self._clock_ns()
        self._turns = 0
        self._status = self._enable = 0
        self._control = SCI_EN
        self._gpe_status = self._gpe_enable = 0

    # -- the host's side -----------------------------------------------------------------------------------

    def press_power_button(self) -> None:
        """The user asks the OS to shut down; from any thread. Nothing happens unless the OS listens."""
        with self._lock:
            self._status |= PWRBTN_STS
            self._update_sci()

    def raise_gpe(self, event: int) -> None:
        """Signal general-purpose event 0 to 15 (the DSDT holds its method in \\_GPE); from any thread."""
        if not 0 <= event < 8 * GPE_HALF:
            raise ValueError(f"general-purpose event {event} does not exist")
        with self._lock:
            self._gpe_status |= 1 << event
            self._update_sci()

    # -- the guest's side ----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """`size` bytes of the blocks; the timer is sampled once, whatever the width of the access."""
        ticks = self._ticks()
        if offset == PM_TIMER and size == 4:
            return ticks & TIMER_MASK
        with self._lock:
            self._carry(ticks)
            block = (
                self._status << 8 * PM1_STATUS
                | self._enable << 8 * PM1_ENABLE
                | self._control << 8 * PM1_CONTROL
                | (ticks & TIMER_MASK) << 8 * PM_TIMER
                | self._gpe_status << 8 * GPE_STATUS
                | self._gpe_enable << 8 * GPE_ENABLE
            )
        return block >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> Outcome | None:
        """Byte by byte: status bits are cleared by ones, SLP_EN with the type of S5 powers off."""
        outcome = None
        with self._lock:
            self._carry(self._ticks())
            for index in range(size):
                at, byte = offset + index, value >> 8 * index & 0xFF
                outcome = outcome or self._write_byte(at, byte)
            self._update_sci()
            self._plan_carry()
        return outcome

    def _write_byte(self, at: int, byte: int) -> Outcome | None:
        if PM1_STATUS <= at < PM1_ENABLE:
            self._status &= ~(byte << 8 * (at - PM1_STATUS))
        elif PM1_ENABLE <= at < PM1_CONTROL:
            self._enable = _replace(self._enable, at - PM1_ENABLE, byte) & ENABLE_BITS
        elif PM1_CONTROL <= at < PM1_CONTROL + 2:
            return self._write_control(at - PM1_CONTROL, byte)
        elif GPE_STATUS <= at < GPE_ENABLE:
            self._gpe_status &= ~(byte << 8 * (at - GPE_STATUS))
        elif GPE_ENABLE <= at < GPE_ENABLE + GPE_HALF:
            self._gpe_enable = _replace(self._gpe_enable, at - GPE_ENABLE, byte)
        return None

    def _write_control(self, index: int, byte: int) -> Outcome | None:
        self._control = _replace(self._control, index, byte) & CONTROL_BITS | SCI_EN
        if not byte << 8 * index & SLP_EN:
            return None
        sleep_type = (self._control & SLP_TYP_MASK) >> SLP_TYP_SHIFT
        return Outcome.POWER_OFF if sleep_type == S5_SLP_TYP else None

    def reset(self) -> None:
        """Power-on state; the timer starts at zero."""
        with self._lock:
            self._power_on()
            self._update_sci()

    @property
    def _elapsed_ns(self) -> int:
        """What the timer has counted, in ns: it stands still between save and restore."""
        return self._clock_ns() - self._origin_ns

    @_elapsed_ns.setter
    def _elapsed_ns(self, value: int) -> None:
        self._origin_ns = self._clock_ns() - value

    def save(self) -> State:
        """The registers and the timer's count."""
        with self._lock:
            return self.shape.take(self)

    def restore(self, state: State) -> None:
        """Go on counting from there."""
        with self._lock:
            self.shape.put(self, state)
            self._plan_carry()

    # -- inside --------------------------------------------------------------------------------------------

    def _update_sci(self) -> None:
        self._sci.set(bool(self._status & self._enable or self._gpe_status & self._gpe_enable))

    def _ticks(self) -> int:
        """Ticks since power-on, not wrapped."""
        return (self._clock_ns() - self._origin_ns) * PM_TIMER_HZ // 1_000_000_000

    def _carry(self, ticks: int) -> None:
        """Set TMR_STS if the timer's top bit has changed since this was last called."""
        turns = ticks // HALF_TURN
        if turns != self._turns:
            self._turns = turns
            self._status |= TMR_STS

    def _plan_carry(self) -> None:
        if self._call_later is None or self._carry_due or not self._enable & TMR_STS:
            return
        self._carry_due = True
        left = HALF_TURN - self._ticks() % HALF_TURN
        self._call_later(left / PM_TIMER_HZ, self._on_carry)

    def _on_carry(self) -> None:
        with self._lock:
            self._carry_due = False
            self._carry(self._ticks())
            self._update_sci()
            self._plan_carry()


def _replace(register: int, index: int, byte: int) -> int:
    """`register` with its byte `index` replaced."""
    return register & ~(0xFF << 8 * index) | byte << 8 * index
