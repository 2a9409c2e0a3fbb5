"""ACPI fixed hardware: events, sleep, timer, SCI."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.core.device import IrqLine
from pykvm.core.outcome import Outcome
from pykvm.devices.acpi_pm import AcpiPm
from pykvm.x86.layout import ACPI_PM_LENGTH

STATUS, ENABLE, CONTROL, TIMER, GPE_STATUS, GPE_ENABLE = 0, 2, 4, 8, 16, 18
TMR, PWRBTN = 1 << 0, 1 << 8
SECOND = 1_000_000_000
HALF_TURN_NS = (1 << 31) * SECOND // 3_579_545 + 1


class Board:
    """An AcpiPm with a clock that stands still until it is moved, and a list of calls to make later."""

    def __init__(self) -> None:
        self.now_ns = 5 * SECOND
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.edges: list[bool] = []
        self.sci = IrqLine(9, lambda gsi, level: self.edges.append(level))
        self.pm = AcpiPm(self.sci, clock_ns=lambda: self.now_ns, call_later=lambda *call: self.later.append(call))

    def fire(self) -> None:
        """Make the one pending call, when it is due."""
        ((seconds, call),) = self.later
        self.later.clear()
        self.now_ns += int(seconds * SECOND) + 1000
        call()


@pytest.fixture
def board() -> Board:
    """A board at power-on."""
    return Board()


def test_acpi_mode_is_always_on(board: Board) -> None:
    """SCI_EN reads one and cannot be cleared: the FADT names no SMI command port."""
    assert board.pm.read(CONTROL, 2) == 1
    board.pm.write(CONTROL, 2, 0)
    assert board.pm.read(CONTROL, 2) == 1


def test_sleep_type_of_s5_powers_off(board: Board) -> None:
    """The one-line power-off of small kernels: outw(0x604, 0x2000)."""
    assert board.pm.write(CONTROL, 2, 0x2000) == Outcome.POWER_OFF


def test_linux_writes_type_and_enable_apart(board: Board) -> None:
    """First SLP_TYP, which is kept, then SLP_TYP with SLP_EN, which powers off and reads zero."""
    assert board.pm.write(CONTROL, 2, 0x0001) is None
    assert board.pm.write(CONTROL, 2, 0x2001) == Outcome.POWER_OFF
    assert board.pm.read(CONTROL, 2) == 0x0001


@pytest.mark.parametrize("sleep_type", range(1, 8))
def test_other_sleep_types_do_nothing(board: Board, sleep_type: int) -> None:
    """Only S5 is in the DSDT."""
    assert board.pm.write(CONTROL, 2, 0x2000 | sleep_type << 10) is None
    assert board.pm.read(CONTROL, 2) == sleep_type << 10 | 1


def test_sleep_enable_in_a_byte_write(board: Board) -> None:
    """The high byte alone carries type and enable."""
    assert board.pm.write(CONTROL + 1, 1, 0x20) == Outcome.POWER_OFF


def test_power_button_raises_the_sci_until_cleared(board: Board) -> None:
    """Level-triggered: high while an enabled status bit is set, low as soon as it is written with a one."""
    board.pm.write(ENABLE, 2, PWRBTN)
    board.pm.press_power_button()
    assert board.sci.level is True
    assert board.pm.read(STATUS, 2) == PWRBTN
    board.pm.write(STATUS, 2, PWRBTN)
    assert board.pm.read(STATUS, 2) == 0
    assert board.edges == [True, False]


def test_power_button_waits_for_its_enable_bit(board: Board) -> None:
    """A press before the OS listens is not lost, and disabling takes the line down."""
    board.pm.press_power_button()
    assert board.edges == []
    board.pm.write(ENABLE, 2, PWRBTN)
    assert board.sci.level is True
    board.pm.write(ENABLE, 2, 0)
    assert board.sci.level is False


def test_writing_zero_clears_no_status(board: Board) -> None:
    """Status bits are write-one-to-clear, byte by byte."""
    board.pm.press_power_button()
    board.pm.write(STATUS, 2, 0)
    board.pm.write(STATUS, 1, 0xFF)
    assert board.pm.read(STATUS, 2) == PWRBTN
    board.pm.write(STATUS + 1, 1, 0xFF)
    assert board.pm.read(STATUS, 2) == 0


def test_event_block_is_one_32_bit_register_too(board: Board) -> None:
    """Status in the low half, enable in the high half; undefined enable bits stay zero."""
    board.pm.press_power_button()
    board.pm.write(STATUS, 4, 0xFFFF_0000)
    assert board.pm.read(STATUS, 4) == 0x0721_0100


def test_timer_counts_at_its_rate(board: Board) -> None:
    """3.579545 MHz from zero at power-on."""
    assert board.pm.read(TIMER, 4) == 0
    board.now_ns += SECOND
    assert board.pm.read(TIMER, 4) == 3_579_545
    board.now_ns += 2_000_000
    assert board.pm.read(TIMER, 4) == 3_586_704


def test_timer_wraps_at_32_bits(board: Board) -> None:
    """As TMR_VAL_EXT in the FADT promises."""
    board.now_ns += 2 * HALF_TURN_NS
    assert board.pm.read(TIMER, 4) < 16


@pytest.mark.parametrize(("offset", "size", "shift"), [(8, 1, 0), (9, 1, 8), (10, 2, 16), (11, 1, 24), (8, 2, 0)])
def test_timer_can_be_read_in_parts(board: Board, offset: int, size: int, shift: int) -> None:
    """Narrow reads give their part of the count, and writes do not change it."""
    board.now_ns += 1000 * SECOND
    board.pm.write(TIMER, 4, 0)
    assert board.pm.read(offset, size) == board.pm.read(TIMER, 4) >> shift & (1 << 8 * size) - 1


def test_timer_carry_sets_its_status(board: Board) -> None:
    """TMR_STS follows each change of bit 31, once, and stays cleared until the next one."""
    assert board.pm.read(STATUS, 2) == 0
    board.now_ns += HALF_TURN_NS
    assert board.pm.read(STATUS, 2) == TMR
    board.pm.write(STATUS, 2, TMR)
    assert board.pm.read(STATUS, 2) == 0
    board.now_ns += HALF_TURN_NS
    assert board.pm.read(STATUS, 2) == TMR


def test_timer_carry_interrupts_by_itself(board: Board) -> None:
    """With TMR_EN set the SCI comes without any access, and again at each following carry."""
    board.pm.write(ENABLE, 2, TMR)
    for _ in range(2):
        board.fire()
        assert board.sci.level is True
        board.pm.write(STATUS, 2, TMR)
        assert board.sci.level is False


def test_toggling_the_timer_enable_piles_up_no_calls(board: Board) -> None:
    """A guest cannot make the host remember more than one future call."""
    for _ in range(1000):
        board.pm.write(ENABLE, 2, TMR)
        board.pm.write(ENABLE, 2, 0)
    assert len(board.later) == 1
    board.fire()
    assert board.sci.level is False and board.later == []


def test_timer_works_without_calls_later() -> None:
    """Then the carry shows when the guest next looks."""
    now = [0]
    pm = AcpiPm(IrqLine(9, lambda gsi, level: None), clock_ns=lambda: now[0])
    pm.write(ENABLE, 2, TMR)
    now[0] = HALF_TURN_NS
    assert pm.read(STATUS, 2) == TMR


def test_general_purpose_events(board: Board) -> None:
    """An event raises the SCI if enabled, in either byte, and is cleared by a one."""
    board.pm.write(GPE_ENABLE, 1, 0x02)
    board.pm.write(GPE_ENABLE + 1, 1, 0x80)
    board.pm.raise_gpe(3)
    assert board.sci.level is False
    board.pm.raise_gpe(1)
    board.pm.raise_gpe(15)
    assert board.pm.read(GPE_STATUS, 4) == 0x8002_800A
    assert board.sci.level is True
    board.pm.write(GPE_STATUS, 2, 0x8002)
    assert board.pm.read(GPE_STATUS, 2) == 0x0008
    assert board.sci.level is False


@pytest.mark.parametrize("event", [-1, 16])
def test_events_that_do_not_exist_are_refused(board: Board, event: int) -> None:
    """The block has sixteen."""
    with pytest.raises(ValueError, match="does not exist"):
        board.pm.raise_gpe(event)


def test_reset_returns_to_power_on(board: Board) -> None:
    """Events are forgotten, the line is down, the timer starts again."""
    board.pm.write(ENABLE, 2, PWRBTN)
    board.pm.press_power_button()
    board.pm.raise_gpe(0)
    board.now_ns += SECOND
    board.pm.reset()
    assert board.sci.level is False
    assert [board.pm.read(offset, 4) for offset in range(0, ACPI_PM_LENGTH, 4)] == [0, 1, 0, 0, 0]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, ACPI_PM_LENGTH - 1), st.sampled_from([1, 2, 4, 8]), st.binary()))
)
def test_any_access_is_harmless(accesses: list[tuple[bool, int, int, bytes]]) -> None:
    """No sequence of accesses raises, leaves a register too wide, or ends the run but by S5."""
    board = Board()
    for is_write, offset, size, data in accesses:
        if offset + size > ACPI_PM_LENGTH:
            continue
        if is_write:
            value = int.from_bytes(data[:size], "little")
            assert board.pm.write(offset, size, value) in (None, Outcome.POWER_OFF)
        assert 0 <= board.pm.read(offset, size) < 1 << 8 * size
        board.now_ns += HALF_TURN_NS // 3
    assert len(board.later) <= 1
