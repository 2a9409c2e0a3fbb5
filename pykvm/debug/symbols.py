"""Names of guest addresses: from ELF files, from System.map or from a Linux guest's kallsyms. Layer: debug, plain data.

    symbols = Symbols.from_elf("kernel.elf")
    symbols["main"], symbols.resolve("main+0x10")   # name -> address
    symbols.describe(0x100123)                      # address -> "main+0x23"
    symbols.line(0x100123)                          # -> ("kernel.c", 42) with DWARF (gcc -g), else None

Addresses are the linear (virtual) ones that the file was linked for, plus `bias` (KASLR, position-independent images).
"""

from __future__ import annotations

from bisect import bisect_right

from pykvm.errors import ImageError, SymbolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator
    from typing import Self

    from pykvm.debug.elfsymbols import Lines

    Line = tuple[str, int]  # file, line number

UNSIZED_REACH = 1 << 16  # how far after a symbol of unknown size, with none behind it, an address is still called by it
MAX_LISTED = 1 << 23  # symbols in one list; a large Linux kernel has 250,000


class Symbol:
    """One name. `size` is 0 where the source does not tell; `kind` is func, object or other."""

    __slots__ = ("address", "kind", "name", "size")

    def __init__(self, name: str, address: int, size: int = 0, kind: str = "other") -> None:
        self.name = name
        self.address = address
        self.size = size
        self.kind = kind

    def __repr__(self) -> str:
        return f"<Symbol {self.name} {self.address:#x} +{self.size:#x}>"


class Symbols:
    """A table of symbols, from any number of files.

    A name that occurs several times (static functions) means its first one: `all_named` gives each. Constants (ELF's
    SHN_ABS) have a name but are no address of anything: `find` leaves them out.
    """

    def __init__(self, symbols: Iterable[Symbol] = (), *, constants: Iterable[Symbol] = ()) -> None:
        self._named: dict[str, list[Symbol]] = {}
        self._placed: list[Symbol] = []
        self._starts: list[int] | None = None  # of _placed, sorted with it when first asked
        self._lines: list[Lines] = []
        self._add(symbols, placed=True)
        self._add(constants, placed=False)

    # -- sources ------------------------------------------------------------------------------------------------

    @classmethod
    def from_elf(cls, path: str | os.PathLike[str], bias: int = 0) -> Self:
        """The .symtab of an ELF file (or its .dynsym). Raises ImageError for a file that is no sound ELF."""
        from pykvm.debug.elfsymbols import read_elf

        symbols, constants, lines = read_elf(path, bias)
        table = cls(symbols, constants=constants)
        table._lines.append(lines)
        return table

    @classmethod
    def from_map(cls, text: str, *, source: str = "kallsyms", bias: int = 0) -> Self:
        """/proc/kallsyms or System.map of a Linux guest: lines of `address type name [module]`.

        `source` is for messages. Raises ImageError for a line of another form, and where every address is hidden.
        """
        return cls(_parse_map(text, source, bias))

    def add(self, other: Symbols) -> None:
        """Take in the symbols of another table (a module, a user program); names known before keep their meaning."""
        for same in other._named.values():
            for each in same:
                self._named.setdefault(each.name, []).append(each)
        self._placed += other._placed
        self._lines += other._lines
        self._starts = None

    def _add(self, symbols: Iterable[Symbol], *, placed: bool) -> None:
        for each in symbols:
            self._named.setdefault(each.name, []).append(each)
            if placed:
                self._placed.append(each)

    # -- name -> address ----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(map(len, self._named.values()))

    def __iter__(self) -> Iterator[Symbol]:
        for same in self._named.values():
            yield from same

    def __contains__(self, name: object) -> bool:
        return name in self._named

    def __getitem__(self, name: str) -> int:
        """The address of `name`. Raises SymbolError, with the names that look like it."""
        return self.symbol(name).address

    def get(self, name: str, default: int | None = None) -> int | None:
        """The address of `name`, or `default`."""
        same = self._named.get(name)
        return same[0].address if same else default

    def symbol(self, name: str) -> Symbol:
        """The symbol `name`. Raises SymbolError."""
        same = self._named.get(name)
        if not same:
            raise SymbolError(name, self._near(name))
        return same[0]

    def all_named(self, name: str) -> list[Symbol]:
        """Every symbol of this name."""
        return list(self._named.get(name, ()))

    def resolve(self, where: str | int) -> int:
        """An address from what a person writes: 0x100000, "0x100000", "main", "main+0x10", "main-8".

        Raises SymbolError.
        """
        if isinstance(where, int):
            return where
        text = where.strip()
        if text in self._named:  # before the operators: C++ and Rust names may hold them
            return self[text]
        for sign, factor in (("+", 1), ("-", -1)):
            name, found, offset = text.rpartition(sign)
            number = _number(offset)
            if found and name and number is not None:
                return self.resolve(name) + factor * number
        number = _number(text)
        return self[text] if number is None else number

    def _near(self, name: str) -> list[str]:
        if not self._named:
            return []
        from difflib import get_close_matches

        same_length = [each for each in self._named if abs(len(each) - len(name)) <= 2]
        return get_close_matches(name, same_length[:20000], 3)

    # -- address -> name ----------------------------------------------------------------------------------------

    def find(self, address: int) -> tuple[Symbol, int] | None:
        """The symbol that `address` is in, and the offset from its start; None when it is in none.

        A symbol of known size ends there; one without (an assembler label, a line of kallsyms) at the next symbol.
        """
        starts = self._sorted()
        at = bisect_right(starts, address)
        for index in range(at - 1, max(at - 17, -1), -1):  # a few, as labels stand inside of functions
            symbol = self._placed[index]
            if address - symbol.address < symbol.size or (symbol.size and address == symbol.address):
                return symbol, address - symbol.address
        if at and not self._placed[at - 1].size and (at < len(starts) or address - starts[-1] < UNSIZED_REACH):
            return self._placed[at - 1], address - starts[at - 1]
        return None

    def _sorted(self) -> list[int]:
        if self._starts is None:
            # among those of one address the function comes last: it is found first
            self._placed.sort(key=lambda each: (each.address, each.kind == "func", each.size > 0))
            self._starts = [each.address for each in self._placed]
        return self._starts

    def describe(self, address: int) -> str:
        """ "main+0x23", "main" at its start, or the bare "0x100123" where no symbol is."""
        found = self.find(address)
        if found is None:
            return hex(address)
        symbol, offset = found
        return f"{symbol.name}+{offset:#x}" if offset else symbol.name

    def line(self, address: int) -> Line | None:
        """(source file, line) of the instruction at `address` by DWARF, None where the file says nothing."""
        for lines in self._lines:
            found = lines.find(address)
            if found is not None:
                return found
        return None

    def locate(self, address: int) -> str:
        """`describe` and, where DWARF knows, the line: "main+0x23 (kernel.c:42)"."""
        line = self.line(address)
        return f"{self.describe(address)} ({line[0]}:{line[1]})" if line else self.describe(address)


def _number(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None


def _parse_map(text: str, source: str, bias: int) -> Iterator[Symbol]:
    lines = text.splitlines()
    if len(lines) > MAX_LISTED:
        raise ImageError(source, f"has more than {MAX_LISTED} lines")
    hidden = True
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) not in (3, 4) or len(words[1]) != 1:
            raise ImageError(source, f"line {number} is not of the form 'address type name [module]'")
        try:
            address = int(words[0], 16)
        except ValueError:
            raise ImageError(source, f"line {number}: {words[0][:20]!r} is no hexadecimal address") from None
        hidden = hidden and not address
        kind = "func" if words[1] in "tTwW" else "object" if words[1] in "bBdDrRvVgGsS" else "other"
        if words[1] not in "aAuU":  # absolute: offsets into per-CPU areas; undefined
            yield Symbol(words[2], address + bias, kind=kind)
    if hidden and lines:
        raise ImageError(source, "hides the addresses: read it as root, with /proc/sys/kernel/kptr_restrict at 0 or 1")
