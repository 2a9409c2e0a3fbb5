"""Arguments and return address of a function called from the host, on the guest's stack. Layer: live objects.

Source: System V ABI, AMD64 supplement 3.2 (argument registers, stack alignment, red zone); i386 supplement 2.2.
"""

from __future__ import annotations

from pykvm.debug.bits import bitness
from pykvm.debug.code import stack_pointer
from pykvm.debug.linear import LinearMemory
from pykvm.errors import ConfigError, LinearAddressError, MachineStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.core.memory import GuestMemory
    from pykvm.x86.segments import CpuState

    Argument = int | bytes | bytearray | str

ARGUMENT_REGISTERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
RED_ZONE = 128  # bytes below RSP that a leaf function uses without moving it
ALIGNMENT = 16
MAX_COPIED = 64 << 10  # bytes passed by pointer in one argument: a kernel's stack is a few KiB


class Frame:
    """One call. `rsp` is what the function is entered with, `returned_rsp` what it leaves, `registers` its arguments.

    word  bytes in a machine word: 8 or 4
    """

    def __init__(self, memory: GuestMemory, state: CpuState, stack: int | None, return_address: int) -> None:
        self.word = bitness(state) // 8
        self.registers: dict[str, int] = {}
        self._return_address = return_address
        self._base = state.ss.base if self.word == 4 else 0
        self._stack = GuestStack(memory, state, stack_pointer(state)[0] - RED_ZONE if stack is None else stack)
        self._buffers: list[tuple[bytearray, int]] = []

    @property
    def rsp(self) -> int:
        """The stack pointer on entry: at the return address."""
        return self._stack.top - self._base

    @property
    def returned_rsp(self) -> int:
        """The stack pointer after the return."""
        return self.rsp + self.word

    def push(self, arguments: Sequence[Argument]) -> None:
        """Copies of buffers first, then the words that go by stack, then the return address.

        Raises ConfigError for an argument that cannot be passed, MachineStateError where there is no stack.
        """
        words = [self._word(each) for each in arguments]
        if self.word == 8:
            self.registers = dict(zip(ARGUMENT_REGISTERS, words, strict=False))
            words = words[len(ARGUMENT_REGISTERS) :]
        self._stack.push(b"".join(value.to_bytes(self.word, "little") for value in words), ALIGNMENT)
        self._stack.push(self._return_address.to_bytes(self.word, "little"))

    def _word(self, argument: Argument) -> int:
        if isinstance(argument, int):
            limit = 1 << 8 * self.word
            if not -limit // 2 <= argument < limit:
                raise ConfigError("arguments", f"{argument:#x} does not fit into {8 * self.word} bits")
            return argument % limit
        if not isinstance(argument, bytes | bytearray | str):
            raise ConfigError("arguments", f"{argument!r}: a guest function takes int, bytes, bytearray or str")
        data = argument.encode() + b"\0" if isinstance(argument, str) else bytes(argument)
        if len(data) > MAX_COPIED:
            raise ConfigError("arguments", f"{len(data)} bytes are too much for a kernel's stack")
        address = self._stack.push(data, ALIGNMENT)
        if isinstance(argument, bytearray):
            self._buffers.append((argument, address))
        return address - self._base

    def copy_back(self) -> None:
        """Give the caller's bytearrays what the function left in them."""
        for buffer, address in self._buffers:
            buffer[:] = self._stack.read(address, len(buffer))


class GuestStack:
    """Guest memory below a linear address, through the guest's page tables."""

    def __init__(self, memory: GuestMemory, state: CpuState, top: int) -> None:
        self._linear = LinearMemory(memory, lambda: state)
        self.top = top & (1 << bitness(state)) - 1

    def push(self, data: bytes, align: int = 1) -> int:
        """Store `data` below the top, at a multiple of `align`; its address. Raises MachineStateError."""
        self.top = (self.top - len(data)) // align * align
        try:
            self._linear.write(self.top, data)
        except LinearAddressError as problem:
            raise MachineStateError(
                f"no stack to call on ({problem}): run the guest until it has one, or give stack="
            ) from problem
        return self.top

    def read(self, address: int, length: int) -> bytes:
        """What is there now. Raises LinearAddressError."""
        return self._linear.read(address, length)
