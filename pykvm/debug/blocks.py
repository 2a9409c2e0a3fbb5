"""Basic blocks of an ELF kernel's functions. Layer: debug.

A block starts at a function's start, at a branch's target, and after a branch. Calls do not end one. Only functions
with a type and a size are looked at (compilers and `.type name, @function` give them): assembler without may be
anything, also code of another width.
"""

from __future__ import annotations

import os
from io import BytesIO

from pykvm.errors import ConfigError, ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from pykvm.debug.symbols import Symbol

MAX_BLOCKS = 1 << 20
EM_386, EM_X86_64 = "EM_386", "EM_X86_64"


class Block:
    """[address, address + size) in function `symbol`, at `gpa` once loaded; `instructions` are where each starts."""

    __slots__ = ("address", "gpa", "instructions", "size", "symbol")

    def __init__(self, address: int, size: int, gpa: int, symbol: Symbol, instructions: Sequence[int]) -> None:
        self.address = address
        self.size = size
        self.gpa = gpa
        self.symbol = symbol
        self.instructions = instructions

    def __repr__(self) -> str:
        return f"<Block {self.address:#x} +{self.size:#x} {self.symbol.name}>"


class Code:
    """The loadable segments of an ELF file. Raises ImageError for one that is none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise ImageError(self.path, f"cannot read: {error.strerror}") from error
        if not data.startswith(b"\x7fELF"):
            raise ImageError(self.path, "is no ELF file: its functions are unknown")
        from elftools.elf.elffile import ELFFile

        try:
            elf = ELFFile(BytesIO(data))
            self.bits = {EM_386: 32, EM_X86_64: 64}[elf["e_machine"]]
            headers = [segment.header for segment in elf.iter_segments("PT_LOAD")]
            self._loads = [(h.p_vaddr, h.p_paddr, data[h.p_offset : h.p_offset + h.p_filesz]) for h in headers]
        except Exception as problem:  # pyelftools raises whatever its parts do
            raise ImageError(self.path, f"is no sound x86 ELF file: {problem}") from problem

    def at(self, address: int, size: int) -> tuple[bytes, int] | None:
        """(the bytes, the GPA that they are loaded at) of linear addresses as the file was linked, or None."""
        for linear, gpa, data in self._loads:
            offset = address - linear
            if offset >= 0 and offset + size <= len(data):
                return data[offset : offset + size], gpa + offset
        return None

    @property
    def span(self) -> tuple[int, int]:
        """The lowest linear address and the first one after the last."""
        return min(linear for linear, _, _ in self._loads), max(linear + len(data) for linear, _, data in self._loads)


def find_blocks(code: Code, functions: Iterable[Symbol], bits: int) -> list[Block]:
    """The blocks of these functions, sorted. Raises ConfigError when there are too many."""
    found: dict[int, Block] = {}
    for symbol in functions:
        place = code.at(symbol.address, symbol.size) if symbol.size else None
        if place is not None:
            for block in _blocks_of(*place, symbol, bits):
                found.setdefault(block.address, block)
        if len(found) > MAX_BLOCKS:
            raise ConfigError("coverage", f"more than {MAX_BLOCKS} basic blocks: name the functions")
    return [found[address] for address in sorted(found)]


def _blocks_of(data: bytes, gpa: int, symbol: Symbol, bits: int) -> list[Block]:
    from iced_x86 import Decoder, FlowControl

    straight = (FlowControl.NEXT, FlowControl.CALL, FlowControl.INDIRECT_CALL, FlowControl.INTERRUPT)
    branches = (FlowControl.CONDITIONAL_BRANCH, FlowControl.UNCONDITIONAL_BRANCH)
    start, end = symbol.address, symbol.address + len(data)
    leaders, starts = {start}, []
    decoder, after_branch = Decoder(bits, data, ip=start), False
    for each in decoder:
        if each.is_invalid:
            end = each.ip
            break
        starts.append(each.ip)
        if after_branch and not _is_padding(each):
            leaders.add(each.ip)
            after_branch = False
        if each.flow_control in branches and start <= each.near_branch_target < end:
            leaders.add(each.near_branch_target)
        after_branch = after_branch or each.flow_control not in straight
    return _cut(sorted(leaders & set(starts)), starts, end, gpa - start, symbol)


def _is_padding(each: Any) -> bool:
    from iced_x86 import Code as Opcode
    from iced_x86 import Mnemonic

    return bool(each.mnemonic == Mnemonic.NOP or each.code == Opcode.INT3)


def _cut(leaders: list[int], starts: list[int], end: int, to_gpa: int, symbol: Symbol) -> list[Block]:
    blocks = []
    for address, following in zip(leaders, [*leaders[1:], end], strict=True):
        inside = [each for each in starts if address <= each < following]
        blocks.append(Block(address, following - address, address + to_gpa, symbol, inside))
    return blocks
