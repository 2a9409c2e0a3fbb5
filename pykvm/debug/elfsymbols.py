"""Symbol tables and DWARF line tables of ELF files, by pyelftools. Layer: debug.

The file is whatever a build left there: everything that pyelftools trips over becomes one ImageError for symbols, and
"no line known" for DWARF. Symbols are decoded here in one go, because pyelftools takes seconds for a Linux kernel's.

Source: System V gABI, chapter 4 "Symbol Table"; DWARF 5, section 6.2 "Line Number Information".
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from io import BytesIO

from pykvm.debug.symbols import MAX_LISTED, Symbol
from pykvm.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pykvm.debug.symbols import Line

MAX_FILE = 2 << 30
KINDS = {1: "object", 2: "func"}  # STT_OBJECT, STT_FUNC; STT_NOTYPE is what assembler labels have
STT_SECTION, STT_FILE, STT_TLS = 3, 4, 6
SHN_UNDEF, SHN_ABS, SHN_COMMON = 0, 0xFFF1, 0xFFF2
SHF_ALLOC = 2
ENTRY = {32: struct.Struct("<IIIBBH"), 64: struct.Struct("<IBBHQQ")}  # Elf32_Sym, Elf64_Sym
MASK = {32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}


def read_elf(path: str | os.PathLike[str], bias: int = 0) -> tuple[list[Symbol], list[Symbol], Lines]:
    """(symbols with an address, constants, line tables) of a file. Raises ImageError."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE:
                raise ImageError(name, "is too large for a kernel")
            data = file.read()
    except OSError as error:
        raise ImageError(name, f"cannot read: {error.strerror}") from error
    if not data.startswith(b"\x7fELF"):
        raise ImageError(name, "has no symbols: it is no ELF file (give the ELF that it was made from)")
    from elftools.elf.elffile import ELFFile

    try:
        elf = ELFFile(BytesIO(data))
        symbols, constants = _read_symbols(elf, name, bias)
    except ImageError:
        raise
    except Exception as problem:  # pyelftools raises whatever its parts do: ELFError, KeyError, struct.error, ...
        raise ImageError(name, f"is a damaged ELF file: {problem}") from problem
    return symbols, constants, Lines(elf, bias)


def _read_symbols(elf: Any, path: str, bias: int) -> tuple[list[Symbol], list[Symbol]]:
    bits = elf.elfclass
    if not elf.little_endian:
        raise ImageError(path, "is no x86 file: it is big-endian")
    section = elf.get_section_by_name(".symtab") or elf.get_section_by_name(".dynsym")
    if section is None:
        return [], []
    entry = ENTRY[bits]
    table, names = section.data(), elf.get_section(section["sh_link"]).data()
    if len(table) // entry.size > MAX_LISTED:
        raise ImageError(path, f"has more than {MAX_LISTED} symbols")
    placed: list[Symbol] = []
    constants: list[Symbol] = []
    loaded = [bool(each["sh_flags"] & SHF_ALLOC) for each in elf.iter_sections()]
    for fields in entry.iter_unpack(table[: len(table) // entry.size * entry.size]):
        if bits == 64:
            name_at, info, _, index, value, size = fields
        else:
            name_at, value, size, info, _, index = fields
        kind, name = info & 15, _string(names, name_at)
        if not name or index in (SHN_UNDEF, SHN_COMMON) or kind in (STT_SECTION, STT_FILE, STT_TLS):
            continue
        if index == SHN_ABS:
            constants.append(Symbol(name, value, size))
        elif index < len(loaded) and loaded[index]:
            placed.append(Symbol(name, value + bias & MASK[bits], size, KINDS.get(kind, "other")))
    return placed, constants


def _string(table: bytes, at: int) -> str:
    end = table.find(b"\0", at)
    return table[at : end if end >= 0 else at].decode("utf-8", "replace") if at < len(table) else ""


class Lines:
    """The line tables of one file, each read when an address of its compilation unit is asked for."""

    def __init__(self, elf: Any, bias: int) -> None:
        self._elf = elf
        self._bias = bias
        self._dwarf: Any = None
        self._starts: list[int] = []
        self._rows: list[Line | None] = []  # None: a gap
        self._read_units: set[int] = set()
        self._all_read = False

    def find(self, address: int) -> Line | None:
        """(file, line) of `address`; None without DWARF for it."""
        try:
            self._read_unit_of(address - self._bias)
        except Exception:  # damaged debugging information is as good as none
            return None
        at = bisect_right(self._starts, address - self._bias) - 1
        return self._rows[at] if at >= 0 else None

    def _read_unit_of(self, address: int) -> None:
        if self._dwarf is None:
            if not self._elf.has_dwarf_info():
                return
            self._dwarf = self._elf.get_dwarf_info()
        ranges = self._dwarf.get_aranges()
        unit = ranges.cu_offset_at_addr(address) if ranges is not None else None
        if unit is not None:
            self._take([self._dwarf.get_CU_at(unit)])
        elif ranges is None and not self._all_read:
            self._all_read = True  # no index: all of them, once
            self._take(list(self._dwarf.iter_CUs()))

    def _take(self, units: list[Any]) -> None:
        new = [unit for unit in units if unit.cu_offset not in self._read_units]
        if not new:
            return
        rows: dict[int, Line | None] = dict(zip(self._starts, self._rows, strict=True))
        for unit in new:
            self._read_units.add(unit.cu_offset)
            program = self._dwarf.line_program_for_CU(unit)
            if program is not None:
                _add_rows(program, rows)
        self._starts = sorted(rows)
        self._rows = [rows[start] for start in self._starts]


def _add_rows(program: Any, rows: dict[int, Line | None]) -> None:
    names: dict[int, str] = {}
    for entry in program.get_entries():
        state = entry.state
        if state is None:
            continue
        if state.end_sequence:
            rows.setdefault(state.address, None)
            continue
        if state.file not in names:
            names[state.file] = _file_name(program, state.file)
        rows[state.address] = (names[state.file], state.line)


def _file_name(program: Any, index: int) -> str:
    """A file of the line table: DWARF 5 counts from 0, older versions from 1."""
    files = program["file_entry"]
    at = index if program["version"] >= 5 else index - 1
    return str(files[at].name.decode("utf-8", "replace")) if 0 <= at < len(files) else "?"
