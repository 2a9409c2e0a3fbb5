"""The stack frame of a function that the host calls, against the System V ABI; no guest needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm import ConfigError, GuestMemory
from pykvm.testing.call import _value
from pykvm.testing.callframe import ARGUMENT_REGISTERS, RED_ZONE, Frame
from pykvm.x86.segments import CpuState
from pykvm.x86.states import long_mode, protected_flat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.testing.callframe import Argument

RIP = 0x123456
MIB = 1 << 20
ARGUMENTS = st.lists(st.integers(-(1 << 31), (1 << 32) - 1) | st.binary(max_size=40) | st.text(max_size=9), max_size=12)


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    """16 MiB of RAM."""
    ram = GuestMemory()
    ram.add(0, 16 * MIB)
    yield ram
    ram.close()


def state_of(memory: GuestMemory, bits: int, rsp: int) -> CpuState:
    """A CPU in long or protected mode with this stack pointer."""
    state = long_mode(memory, RIP) if bits == 64 else protected_flat(memory, RIP)
    state.gprs["rsp"] = rsp
    return state


@pytest.mark.parametrize("bits", [64, 32])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=ARGUMENTS, rsp=st.integers(8 * MIB, 9 * MIB))
def test_a_frame_is_as_the_abi_wants(memory: GuestMemory, bits: int, arguments: list[Argument], rsp: int) -> None:
    """Return address at the stack pointer, arguments aligned behind it or in registers, copies where pointers say."""
    word = bits // 8
    frame = Frame(memory, state_of(memory, bits, rsp), None, RIP)
    frame.push(arguments)
    assert memory.read_uint(frame.rsp, word) == RIP
    assert (frame.rsp + word) % 16 == 0
    assert frame.returned_rsp == frame.rsp + word <= rsp - RED_ZONE
    registers = [frame.registers[name] for name in ARGUMENT_REGISTERS if name in frame.registers]
    assert len(registers) == (min(len(arguments), 6) if bits == 64 else 0)
    on_stack = len(arguments) - len(registers)
    words = registers + [memory.read_uint(frame.returned_rsp + word * n, word) for n in range(on_stack)]
    for argument, passed in zip(arguments, words, strict=True):
        if isinstance(argument, int):
            assert passed == argument % (1 << bits)
        else:
            data = argument.encode() + b"\0" if isinstance(argument, str) else bytes(argument)
            assert memory.read(passed, len(data)) == data
            assert passed % 16 == 0 and frame.rsp < passed <= rsp - RED_ZONE - len(data)


def test_numbers_that_do_not_fit_are_refused(memory: GuestMemory) -> None:
    """32-bit code takes no 64-bit number in one argument."""
    frame = Frame(memory, state_of(memory, 32, 8 * MIB), None, RIP)
    with pytest.raises(ConfigError, match="does not fit into 32 bits"):
        frame.push([1 << 32])


@pytest.mark.parametrize(
    ("returns", "word", "value"),
    [
        (None, 8, 0x8877665544332211),
        (None, 4, 0x44332211),
        ("u64", 4, 0xDDCCBBAA44332211),
        ("i64", 8, 0x8877665544332211 - (1 << 64)),
        ("u32", 8, 0x44332211),
        ("i8", 8, 0x11),
        ("u16", 4, 0x2211),
        ("bool", 8, True),
        ("void", 8, 0),
    ],
)
def test_results(returns: str | None, word: int, value: int) -> None:
    """A result is as wide and signed as the C function's type; 32-bit code returns 64 bits in EDX:EAX."""
    assert _value(0x8877665544332211, 0xFFFFFFFFDDCCBBAA, returns, word) == value


def test_negative_results() -> None:
    """The sign is the type's own highest bit."""
    assert _value(0xFF, 0, "i8", 8) == -1
    assert _value(0xFFFFFFFF, 0, "i32", 8) == -1
    assert _value(0xFFFFFFFF, 0, "u32", 8) == 0xFFFFFFFF
