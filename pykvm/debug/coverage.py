"""Which basic blocks of a guest were executed, by breakpoints that go when they are hit. Layer: debug.

The first execution of a block costs an exit, later ones nothing: a guest soon runs at full speed. Blocks are planted by
the physical addresses of the ELF file's segments, so that a kernel which sets up its page tables later is covered, too.
"""

from __future__ import annotations

from pykvm.debug.blocks import Block, Code, find_blocks
from pykvm.debug.covexport import drcov, lcov
from pykvm.debug.symbols import Symbols
from pykvm.debug.wholefile import whole_file
from pykvm.errors import ConfigError, DebugUnsupported, GuestAddressError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from pykvm.core.outcome import Outcome
    from pykvm.core.vcpu import Vcpu
    from pykvm.debug.breakpoints import Breakpoint, Debugger
    from pykvm.debug.symbols import Symbol


class Coverage:
    """What `Machine.coverage` gives.

    blocks   every basic block, by address
    hit      the addresses of those that were executed
    skipped  blocks that could not be watched: shorter than a breakpoint, or not in guest memory
    """

    def __init__(
        self,
        debugger: Debugger,
        elf: str | os.PathLike[str],
        functions: Iterable[str] | None,
        bits: int | None,
    ) -> None:
        code = Code(elf)
        self.path = code.path
        self.span = code.span
        self.symbols = Symbols.from_elf(elf)
        self.blocks: dict[int, Block] = {}
        self.hit: set[int] = set()
        self.skipped: list[Block] = []
        self._debugger = debugger
        self._points: dict[int, Breakpoint] = {}
        self._plant(find_blocks(code, self._chosen(functions), bits or code.bits))

    def _chosen(self, names: Iterable[str] | None) -> list[Symbol]:
        if names is not None:
            return [self.symbols.symbol(name) for name in names]
        chosen = [each for each in self.symbols if each.kind == "func" and each.size]
        if not chosen:
            raise ConfigError("coverage", f"{self.path} has no functions: it may be stripped")
        return chosen

    def _plant(self, blocks: list[Block]) -> None:
        room = len(self._debugger.support.trap.code)
        watched: list[Block] = []
        for block in blocks:
            self.blocks[block.address] = block
            # a trap that is longer would reach into the next block, which somebody may jump to
            (watched if block.size >= room else self.skipped).append(block)
        try:
            for block in watched:
                self._watch(block)
        except BaseException:
            self.stop()
            raise
        self._debugger.sync()

    def _watch(self, block: Block) -> None:
        try:
            point = self._debugger.plant(block.address, block.gpa, self._on_hit)
        except (GuestAddressError, DebugUnsupported):
            self.skipped.append(block)
            return
        self._points[block.address] = point

    def _on_hit(self, vcpu: Vcpu, point: Breakpoint) -> Outcome | None:
        self.hit.add(point.address)
        self._points.pop(point.address, None)
        return None

    def stop(self) -> None:
        """Take what was not hit out of guest memory; the results stay."""
        while self._points:
            _, point = self._points.popitem()
            point.remove()

    @property
    def percent(self) -> float:
        """Of the blocks that could be watched, how many were executed."""
        watched = len(self.blocks) - len(self.skipped)
        return 100 * len(self.hit) / watched if watched else 0.0

    def functions(self) -> dict[str, tuple[int, int]]:
        """Function name -> (blocks executed, blocks watched)."""
        counts: dict[str, tuple[int, int]] = {}
        skipped = {block.address for block in self.skipped}
        for block in self.blocks.values():
            if block.address not in skipped:
                hit, known = counts.get(block.symbol.name, (0, 0))
                counts[block.symbol.name] = (hit + (block.address in self.hit), known + 1)
        return counts

    def write_lcov(self, path: str | os.PathLike[str]) -> None:
        """Lines and functions in lcov's tracefile format, for genhtml. Needs DWARF (gcc -g): ConfigError without."""
        self._write(path, lcov(self).encode())

    def write_drcov(self, path: str | os.PathLike[str]) -> None:
        """Blocks in DynamoRIO's drcov format, for lighthouse, Binary Ninja, Ghidra."""
        self._write(path, drcov(self))

    def _write(self, path: str | os.PathLike[str], data: bytes) -> None:
        with whole_file(path, text=False) as file:
            file.write(data)

    def check_lines(self) -> None:
        """Raises ConfigError where the file has no line numbers, which lcov needs."""
        if not any(self.symbols.line(address) for address in self.blocks):
            raise ConfigError("coverage", f"{self.path} has no line numbers: compile it with -g, or write drcov")

    def write(self, path: str) -> None:
        """lcov into a file whose name ends in .info, drcov into any other."""
        if path.endswith(".info"):
            self.write_lcov(path)
        else:
            self.write_drcov(path)

    def __repr__(self) -> str:
        return f"<Coverage {len(self.hit)} of {len(self.blocks)} blocks, {len(self.skipped)} not watched>"
