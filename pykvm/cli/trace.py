"""`pykvm trace`: what a trace of exits holds. Layer: cli."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.cli.options import HelpWanted, Option, Parser
from pykvm.cli.terminal import say
from pykvm.config import parse_int
from pykvm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pykvm.debug.symbols import Symbols
    from pykvm.debug.trace.tracefile import Record, TraceFile

USAGE = """usage: pykvm trace show|stats|export FILE [OPTION...]      a trace that pykvm start --trace FILE wrote
       pykvm trace [OPTION...] attach PID                 follow a process that uses KVM: QEMU, pykvm, ...
       pykvm trace [OPTION...] -- COMMAND [ARGUMENT...]   run a command and follow it

`pykvm trace VERB --help` says more."""


def _count(text: str) -> int:
    value = parse_int(text, "number")
    if value < 0:
        raise ConfigError("number", f"{text} is negative")
    return value


SYMBOLS = Option("--symbols", "FILE", "name code by this ELF file, or by a System.map")
VCPU = Option("--vcpu", "N", "exits of this vCPU alone", convert=_count)
REASON = Option("--reason", "NAME", "exits of this reason alone: IO, MMIO, HLT, ...")
SHOW = Parser(
    "pykvm trace show FILE [OPTION...]",
    "Print each exit: seconds, vCPU, what it was, where the guest was, time in the guest before and outside after.",
    (SYMBOLS, VCPU, REASON, Option("--limit", "N", "only the first N", convert=_count)),
    positionals=1,
)
STATS = Parser(
    "pykvm trace stats FILE [OPTION...]",
    "Sum up a trace: reasons, ports, pages, code, and how long exits took outside the guest.",
    (
        SYMBOLS,
        VCPU,
        REASON,
        Option("--rows", "N", "rows of each table (default 10)", default=10, convert=_count),
        Option("--json", "", "one JSON document instead of tables"),
    ),
    positionals=1,
)
EXPORT = Parser(
    "pykvm trace export FILE OUTPUT [OPTION...]",
    "Write OUTPUT as JSON that https://ui.perfetto.dev and chrome://tracing load: a timeline of the vCPUs.",
    (SYMBOLS,),
    positionals=2,
)


def run(argv: list[str]) -> int:
    """One of the verbs; the exit status."""
    verb = argv[0] if argv else ""
    try:
        if verb in VERBS:
            parser, function = VERBS[verb]
            values, rest = parser.parse(argv[1:])
            if len(rest) < parser.positionals:
                raise UsageError(f"usage: {parser.usage}")
            return function(values, rest)
        if verb in ("", "-h", "--help"):
            print(USAGE)
            return 0 if verb else 2
        from pykvm.cli.follow import run as follow

        return follow(argv)
    except HelpWanted as wanted:
        print(wanted)
        return 0


def read_symbols(path: str) -> Symbols:
    """Those of an ELF file or a System.map. Raises ImageError."""
    from pykvm.debug.symbols import Symbols
    from pykvm.errors import ImageError

    try:
        with open(path, "rb") as file:
            start = file.read(4)
            if start != b"\x7fELF":
                return Symbols.from_map((start + file.read()).decode(errors="replace"), source=path)
    except OSError as error:
        raise ImageError(path, f"cannot read: {error.strerror}") from None
    return Symbols.from_elf(path)


def _chosen(trace: TraceFile, values: dict[str, Any]) -> Iterator[Record]:
    from pykvm.kvm.exits import reason_names

    wanted = None
    if values["reason"] is not None:
        numbers = {name: number for number, name in reason_names().items()}
        wanted = numbers.get(values["reason"].upper().removeprefix("KVM_EXIT_"))
        if wanted is None:
            raise UsageError(f"--reason: {values['reason']!r} is none of {', '.join(sorted(numbers))}")
    for record in trace:
        if (values["vcpu"] is None or record.vcpu == values["vcpu"]) and (wanted is None or record.reason == wanted):
            yield record


def _warn(trace: TraceFile) -> None:
    if trace.lost:
        say(f"{trace.path}: {trace.lost} exits were lost while tracing: they came faster than the file took them")
    if trace.problems:
        say(f"{trace.path}: {'; '.join(trace.problems)}")


def _show(values: dict[str, Any], rest: list[str]) -> int:
    from itertools import islice

    from pykvm.debug.trace.describe import Names, describe
    from pykvm.debug.trace.tracefile import IN_C, LAST, TraceFile

    trace = TraceFile(rest[0])
    names = Names(trace, read_symbols(values["symbols"]) if values["symbols"] else None)
    for record in islice(_chosen(trace, values), values["limit"]):
        seconds = (record.left_ns - trace.start_ns) / 1e9
        code = f"rip {names.code(record.rip)}" if record.rip else ""
        outside = "-" if record.flags & LAST else f"{record.outside_ns / 1000:.1f}"
        times = f"{record.guest_ns / 1000:.1f} us guest, {outside} us outside"
        marks = (" C" if record.flags & IN_C else "") + (f" [{record.lost} lost before]" if record.lost else "")
        print(f"{seconds:12.6f} vcpu{record.vcpu} {describe(record, names):<48} {code:<28} {times}{marks}")
    _warn(trace)
    return 0


def _stats(values: dict[str, Any], rest: list[str]) -> int:
    from pykvm.debug.trace.describe import Names
    from pykvm.debug.trace.summary import Summary
    from pykvm.debug.trace.tracefile import TraceFile

    trace = TraceFile(rest[0])
    summary = Summary(Names(trace, read_symbols(values["symbols"]) if values["symbols"] else None))
    summary.add_all(_chosen(trace, values))
    if values["json"]:
        import json

        print(json.dumps({**summary.as_dict(), "lost": trace.lost, "problems": trace.problems}, indent=2))
        return 0
    print(summary.text(values["rows"]), end="")
    _warn(trace)
    return 0


def _export(values: dict[str, Any], rest: list[str]) -> int:
    from pykvm.debug.trace.describe import Names
    from pykvm.debug.trace.export import write_chrome
    from pykvm.debug.trace.tracefile import TraceFile

    trace = TraceFile(rest[0])
    names = Names(trace, read_symbols(values["symbols"]) if values["symbols"] else None)
    count = write_chrome(trace, rest[1], names)
    _warn(trace)
    say(f"{count} exits in {rest[1]}: open it at https://ui.perfetto.dev")
    return 0


VERBS = {"show": (SHOW, _show), "stats": (STATS, _stats), "export": (EXPORT, _export)}
