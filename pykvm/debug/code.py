"""Reading and disassembling the guest's code and stack through its own page tables. Layer: debug.

Everything here is the guest's choice and may be nonsense: what cannot be read is left out, nothing raises.
iced-x86 is imported when the first instruction is decoded.
"""

from __future__ import annotations

from pykvm.debug.bits import bitness
from pykvm.x86.paging import walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pykvm.x86.paging import Readable, Walk
    from pykvm.x86.segments import CpuState

    class Memory(Readable, Protocol):
        """Guest physical memory: GuestMemory is one. Reads outside it raise ValueError or LookupError."""

        def read(self, gpa: int, length: int, /) -> bytes:
            """`length` bytes at `gpa`."""


MAX_INSTRUCTION = 15
_PAGE = 4096
_MASKS = {16: (1 << 16) - 1, 32: (1 << 32) - 1, 64: (1 << 64) - 1}


class Instruction:
    """One decoded instruction. `address` is its RIP, `text` is Intel syntax, `features` the CPUID bits it needs."""

    __slots__ = ("address", "features", "raw", "text", "valid")

    def __init__(
        self, address: int, raw: bytes, text: str, *, valid: bool = True, features: tuple[str, ...] = ()
    ) -> None:
        self.address = address
        self.raw = raw
        self.text = text
        self.valid = valid
        self.features = features

    @property
    def mnemonic(self) -> str:
        """The operation without its operands, prefixes kept: "rep movsb" is "rep movsb"."""
        words = self.text.split()
        prefixes = 0
        while prefixes < len(words) - 1 and words[prefixes] in ("rep", "repe", "repne", "lock"):
            prefixes += 1
        return " ".join(words[: prefixes + 1])


def translate(memory: Readable, state: CpuState, linear: int) -> Walk:
    """The page walk of a linear address with the CPU's control registers."""
    return walk(memory, linear, cr0=state.cr0, cr3=state.cr3, cr4=state.cr4, efer=state.efer)


def linear_rip(state: CpuState) -> int:
    """The linear address of the next instruction: CS.base + RIP, but RIP alone in 64-bit mode."""
    rip = state.gprs.get("rip", 0)
    if bitness(state) == 64:
        return rip & _MASKS[64]
    return (state.cs.base + rip) & _MASKS[32]


def stack_pointer(state: CpuState) -> tuple[int, int]:
    """(linear address of the top of the stack, size of a stack word in bytes)."""
    rsp = state.gprs.get("rsp", 0)
    if bitness(state) == 64:
        return rsp & _MASKS[64], 8
    width = 32 if state.ss.db else 16  # the SS descriptor's B flag, not the code segment's
    return (state.ss.base + (rsp & _MASKS[width])) & _MASKS[32], width // 8


def read_linear(memory: Memory, state: CpuState, linear: int, length: int) -> bytes:
    """Up to `length` bytes at `linear`: fewer where a page is not mapped, has no memory, or the addresses end."""
    end = min(linear + length, _MASKS[64 if bitness(state) == 64 else 32] + 1)
    found = bytearray()
    while linear < end:
        piece = min(_PAGE - linear % _PAGE, end - linear)
        gpa = translate(memory, state, linear).gpa
        if gpa is None:
            break
        try:
            found += memory.read(gpa, piece)
        except (ValueError, LookupError):
            break
        linear += piece
    return bytes(found)


def disassemble(code: bytes, bits: int, ip: int, count: int) -> list[Instruction]:
    """At most `count` instructions; the last one may be a rest that does not decode ("(bad)").

    Ends early where only zeroes follow: that is no code.
    """
    try:
        from iced_x86 import CpuidFeature, Decoder, DecoderError, Formatter, FormatterSyntax
    except ImportError:
        return [Instruction(ip, code[:MAX_INSTRUCTION], "(install iced-x86 to disassemble)", valid=False)]
    names = {value: name for name, value in vars(CpuidFeature).items() if isinstance(value, int)}
    formatter = Formatter(FormatterSyntax.NASM)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    formatter.uppercase_hex = False
    formatter.show_branch_size = False
    formatter.space_after_operand_separator = True
    decoder = Decoder(bits, code, ip=ip & _MASKS[bits])
    found: list[Instruction] = []
    for instruction in decoder:
        at = decoder.position - instruction.len
        if found and not any(code[at:]):
            break
        if instruction.is_invalid:
            rest = code[at : at + MAX_INSTRUCTION]
            short = decoder.last_error == DecoderError.NO_MORE_BYTES
            text = "(bad: its end cannot be read)" if short else "(bad)"
            found.append(Instruction(instruction.ip, rest[:8], text, valid=False))
            break
        features = tuple(names.get(each, "") for each in instruction.cpuid_features())
        raw = code[at : at + instruction.len]
        found.append(Instruction(instruction.ip, raw, formatter.format(instruction), features=features))
        if len(found) == count:
            break
    return found
