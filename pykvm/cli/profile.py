"""`pykvm profile`: boot a kernel as `pykvm start` does, and sample where it spends its time. Layer: cli."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pykvm.cli import start
from pykvm.cli.options import HelpWanted, Option, Parser
from pykvm.config import parse_float, parse_int
from pykvm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from typing import Any

    from pykvm.board import Pc
    from pykvm.debug.profile.sampler import Profiler

FORMS = (".svg", ".json", ".txt")


def _rate(text: str) -> float:
    value = parse_float(text)
    if not 0 < value <= 10_000:
        raise ConfigError("rate", f"{text!r} is no rate of 1 to 10000 samples a second")
    return value


def _rows(text: str) -> int:
    value = parse_int(text, "rows")
    if value < 1:
        raise ConfigError("rows", f"{text} is not positive")
    return value


def _output(text: str) -> str:
    if os.path.splitext(text)[1] not in FORMS:
        raise UsageError(f"--output: {text!r} is no FILE.svg (flame graph), .json (speedscope) or .txt (collapsed)")
    return text


OPTIONS = (
    Option("--output", "FILE", "flame graph FILE.svg, speedscope FILE.json, collapsed FILE.txt; repeatable",
           many=True, convert=_output),
    Option("--rate", "HZ", "samples a second of each vCPU (default 999)", default=999.0, convert=_rate),
    Option("--symbols", "FILE", "ELF file or System.map with the names (default: KERNEL, if it is an ELF file)"),
    Option("--rows", "N", "functions in the table (default 20)", default=20, convert=_rows),
)  # fmt: skip
PARSER = Parser(
    "pykvm profile [OPTION...] KERNEL",
    "Boot KERNEL as `pykvm start` does and say where its vCPUs were, by kicking them; needs no help of the guest.\n"
    "Callers are found by frame pointers (gcc -fno-omit-frame-pointer); a leaf may still hide its caller.",
    (*OPTIONS, *start.OPTIONS),
    positionals=1,
    epilog="Exit status as for `pykvm start`.",
)


def run(argv: list[str]) -> int:
    """Boot, sample, report; the exit status is the run's."""
    try:
        values, _ = PARSER.parse(argv)
    except HelpWanted as wanted:
        print(wanted)
        return 0
    symbols = None
    if values["symbols"] is not None:
        from pykvm.cli.trace import read_symbols

        symbols = read_symbols(values["symbols"])

    def make(pc: Pc) -> _Observer:
        if symbols is not None:
            pc.symbols = symbols
        return _Observer(pc, pc.profile(values["rate"]), values)

    return start.run(argv, PARSER, [make])


class _Observer:
    """Watches one run; writes the files and gives the table at its end."""

    def __init__(self, pc: Pc, profiler: Profiler, values: dict[str, Any]) -> None:
        self._pc = pc
        self._profiler = profiler
        self._values = values

    def close(self) -> None:
        """End sampling."""
        self._profiler.close()

    def text(self) -> str:
        """Write the files; the table."""
        profile, symbols = self._profiler.profile, self._pc.symbols
        boot = self._pc.boot_config
        title = f"{os.path.basename(boot.kernel or 'guest') if boot is not None else 'guest'}, {profile.total} samples"
        for path in self._values["output"]:
            if path.endswith(".svg"):
                from pykvm.debug.profile.flamegraph import render

                _write_whole(path, render(profile.named(symbols), title))
            else:
                _write_whole(
                    path, profile.speedscope(symbols, title) if path.endswith(".json") else profile.collapsed(symbols)
                )
        wrote = "".join(f"\nwrote {path}" for path in self._values["output"])
        return f"profile: {profile.text(symbols, self._values['rows'])}{wrote}".rstrip()


def _write_whole(path: str, text: str) -> None:
    from pykvm.debug.wholefile import whole_file

    with whole_file(path) as file:
        file.write(text)
