"""Coverage as lcov and drcov files. Layer: debug.

Sources: geninfo(1), "FILES"; DynamoRIO's drcov, file version 2 with module table version 2.
"""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.debug.coverage import Coverage

BLOCK = struct.Struct("<IHH")  # offset from the module's base, size, module
MAX_SIZE = 0xFFFF


def drcov(coverage: Coverage) -> bytes:
    """The executed blocks. One longer than the format's 16 bits is cut in pieces."""
    base, end = coverage.span
    entries = []
    for address in sorted(coverage.hit):
        block = coverage.blocks[address]
        for offset in range(0, block.size, MAX_SIZE):
            entries.append(BLOCK.pack(address + offset - base, min(block.size - offset, MAX_SIZE), 0))
    head = (
        "DRCOV VERSION: 2\nDRCOV FLAVOR: drcov\nModule Table: version 2, count 1\n"
        "Columns: id, base, end, entry, checksum, timestamp, path\n"
        f"  0, {base:#018x}, {end:#018x}, {base:#018x}, 0x00000000, 0x00000000, {os.path.abspath(coverage.path)}\n"
        f"BB Table: {len(entries)} bbs\n"
    )
    return head.encode() + b"".join(entries)


def lcov(coverage: Coverage) -> str:
    """Lines with 1 when a block with code of theirs was executed, else 0; functions likewise."""
    coverage.check_lines()
    lines: dict[str, dict[int, int]] = {}
    functions: dict[str, dict[str, tuple[int, int]]] = {}
    skipped = {block.address for block in coverage.skipped}
    for block in coverage.blocks.values():
        hit = int(block.address in coverage.hit)
        for address in block.instructions if block.address not in skipped else ():
            place = coverage.symbols.line(address)
            if place is not None:
                counts = lines.setdefault(place[0], {})
                counts[place[1]] = max(counts.get(place[1], 0), hit)
        place = coverage.symbols.line(block.symbol.address)
        if place is not None and block.address == block.symbol.address:
            functions.setdefault(place[0], {})[block.symbol.name] = (place[1], hit)
    out = ["TN:"]
    for file in sorted(lines):
        out += _record(file, lines[file], functions.get(file, {}))
    return "\n".join([*out, ""])


def _record(file: str, lines: dict[int, int], functions: dict[str, tuple[int, int]]) -> list[str]:
    record = [f"SF:{file}"]
    record += [f"FN:{line},{name}" for name, (line, _) in functions.items()]
    record += [f"FNDA:{hit},{name}" for name, (_, hit) in functions.items()]
    record += [f"FNF:{len(functions)}", f"FNH:{sum(hit for _, hit in functions.values())}"]
    record += [f"DA:{line},{lines[line]}" for line in sorted(lines)]
    return [*record, f"LF:{len(lines)}", f"LH:{sum(lines.values())}", "end_of_record"]
