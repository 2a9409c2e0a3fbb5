"""A crash report as text of at most 100 columns. Layer: debug."""

from __future__ import annotations

from pykvm.debug.bits import describe_segment, flag_names
from pykvm.x86.segments import SEGMENT_NAMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.debug.report import CrashReport
    from pykvm.x86.paging import Walk

WIDTH = 100
_WORDS_PER_LINE = {8: 4, 4: 8, 2: 8}
_LOW_GPRS = ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp")
_HIGH_GPRS = tuple(f"r{n}" for n in range(8, 16))


def render(report: CrashReport) -> str:
    """All sections, separated by empty lines; sections without content are left out."""
    sections = [
        _head(report),
        _titled("This state cannot be entered", report.guest_checks),
        _registers(report),
        _segments(report),
        _code(report),
        _walk("Page walk of the instruction pointer", report.walk),
        _walk("Page walk of CR2 (the last page fault)", report.fault_walk) if report.fault_walk else [],
        _stack(report),
        _console(report),
        _exits(report),
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _wrap(text: str, indent: str = "  ") -> list[str]:
    from textwrap import wrap

    return wrap(text, WIDTH - 4, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _titled(title: str, lines: list[str]) -> list[str]:
    return [title, *(row for line in lines for row in _wrap(line))] if lines else []


def _head(report: CrashReport) -> list[str]:
    lines = [*_wrap(report.title, ""), *(row for each in report.reason.details for row in _wrap(each))]
    where = f"  at {report.state.cs.selector:#06x}:{report.state.gprs.get('rip', 0):#x}"
    lines.append(f"{where}, ring {report.cpl}, {report.mode}")
    if report.code:
        first = report.code[0]
        raw = (report.reason.instruction or first.raw)[: len(first.raw)]
        shown = f"{first.text}  [{raw.hex(' ')}]"
        if len(lines[-1]) + len(shown) + 3 <= WIDTH:
            lines[-1] += f":  {shown}"
        else:
            lines += _wrap(shown, "    ")
    for advice in report.advice:
        lines += ["", *_wrap(advice)]
    return lines


def _registers(report: CrashReport) -> list[str]:
    state, gprs = report.state, report.state.gprs
    # 64-bit values everywhere if any upper half is in use
    wide = report.bits == 64 or any(gprs.get(f"r{name}", 0) >> 32 for name in (*_LOW_GPRS, "ip"))
    letter, digits = ("r", 16) if wide else ("e", 8)
    cells = [f"{letter + name:>4} {gprs.get('r' + name, 0):0{digits}x}" for name in _LOW_GPRS]
    if report.bits == 64 or any(gprs.get(name, 0) for name in _HIGH_GPRS):
        cells += [f"{name:>4} {gprs.get(name, 0):0{digits}x}" for name in _HIGH_GPRS]
    flags = gprs.get("rflags", 0)
    lines = ["Registers", *(" " + "  ".join(cells[at : at + 4]) for at in range(0, len(cells), 4))]
    lines += _wrap(
        f"{letter + 'ip':>4} {gprs.get('rip', 0):0{digits}x}  {letter}flags {flags:08x} "
        f"[{' '.join(flag_names('rflags', flags)) or '-'}]",
        " ",
    )
    for name in ("cr0", "cr4", "efer"):
        value = getattr(state, name)
        lines += _wrap(f"{name:>4} {value:08x} [{' '.join(flag_names(name, value)) or '-'}]", " ")
    lines.append(f"  cr2 {state.cr2:0{digits}x}   cr3 {state.cr3:0{digits}x}")
    return lines


def _segments(report: CrashReport) -> list[str]:
    state = report.state
    lines = ["Segments   base             limit"]
    for name in SEGMENT_NAMES:
        segment = getattr(state, name)
        where = f"{segment.selector:04x}  {segment.base:016x} {segment.limit:08x}"
        lines.append(f"  {name:>3} {where}  {describe_segment(segment)}")
    for name in ("gdt", "idt"):
        table = getattr(state, name)
        lines.append(f"  {name:>3}       {table.base:016x} {table.limit:08x}")
    return lines


def _code(report: CrashReport) -> list[str]:
    if not report.code:
        return ["Code", f"  nothing can be read at {report.rip:#x}"]
    digits = {16: 4, 32: 8, 64: 16}[report.bits]
    lines = [f"Code ({report.bits}-bit, linear {report.rip:#x})"]
    for position, each in enumerate(report.code):
        mark = ">" if position == 0 else " "
        lines.append(f"{mark} {each.address:0{digits}x}  {each.raw.hex(' '):<32} {each.text}".rstrip()[:WIDTH])
    return lines


def _walk(title: str, walk: Walk) -> list[str]:
    lines = [f"{title} ({'paging is off' if walk.mode == 'none' else f'{walk.mode} paging'})"]
    for level in walk.levels:
        lines.append(f"  {level.name:<5} at {level.gpa:#012x}: {level.value:016x}  {level.flags}")
    if walk.gpa is None:
        lines.append(f"  {walk.linear:#x} {walk.reason}")
    elif walk.mode == "none":
        lines.append(f"  {walk.linear:#x} is its physical address")
    else:
        rights = "r" + ("w" if walk.writable else "-") + ("x" if walk.executable else "-")
        who = "user" if walk.user else "supervisor"
        lines.append(f"  {walk.linear:#x} -> physical {walk.gpa:#x}, {_size(walk.page_size)} page, {rights}, {who}")
    return lines


def _size(page_size: int) -> str:
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if page_size >> shift:
            return f"{page_size >> shift} {unit}"
    return f"{page_size} bytes"


def _stack(report: CrashReport) -> list[str]:
    size = report.stack_word_size
    title = f"Stack ({report.state.ss.selector:#06x}:{report.state.gprs.get('rsp', 0):#x})"
    if not report.stack:
        return [title, f"  nothing can be read at {report.stack_address:#x}"]
    per_line = _WORDS_PER_LINE[size]
    lines = [title]
    for at in range(0, len(report.stack), per_line):
        words = " ".join(f"{word:0{size * 2}x}" for word in report.stack[at : at + per_line])
        lines.append(f"  {report.stack_address + at * size:0{16 if size == 8 else 8}x}: {words}")
    return lines


def _console(report: CrashReport) -> list[str]:
    width, lines = WIDTH - 6, []
    for line in report.console:
        pieces = [line[at : at + width] for at in range(0, len(line), width)] or [""]
        lines += [f"  {'>' if n else '|'} {piece}".rstrip() for n, piece in enumerate(pieces)]
    return ["Console, last lines", *lines] if lines else []


def _exits(report: CrashReport) -> list[str]:
    if not report.exits:
        return []
    ordered = sorted(report.exits.items(), key=lambda item: (-item[1], item[0]))
    return ["Exits", *_wrap(", ".join(f"{name} {count}" for name, count in ordered))]
