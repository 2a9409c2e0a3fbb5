"""`pykvm top`: the machines of this host at work, refreshed. Layer: cli."""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import TYPE_CHECKING

from pykvm.cli.options import HelpWanted, Option, Parser
from pykvm.config import parse_float, parse_int
from pykvm.control.machines import rates, scan
from pykvm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from rich.table import Table

    Machine = dict[str, Any]

REASONS = 3  # the most frequent ones, in the table


def _interval(text: str) -> float:
    value = parse_float(text)
    if not 0.05 <= value <= 3600:
        raise ConfigError("interval", f"{text!r} is no number of seconds from 0.05 to 3600")
    return value


def _count(text: str) -> int:
    value = parse_int(text, "count")
    if value < 1:
        raise ConfigError("count", f"{text} is not positive")
    return value


PARSER = Parser(
    "pykvm top [OPTION...]",
    "Show the virtual machines of this host, other VMMs' too: CPU in the guest and outside, exits, memory,\n"
    "disk and network. Other users' machines only to root.",
    (
        Option("--interval", "S", "seconds between two samples (default 1)", default=1.0, convert=_interval),
        Option("--count", "N", "samples, then end (default: 1 with --json or where no terminal is, else until Ctrl-C)",
               convert=_count),
        Option("--json", "", "a line of JSON for each sample"),
    ),
    positionals=0,
    epilog="CPU is in CPUs: 1.00 is one CPU all the time. Exits come from pykvm itself, else from KVM's debugfs.",
)  # fmt: skip


def run(argv: list[str]) -> int:
    """Sample and show; the exit status."""
    try:
        values, _ = PARSER.parse(argv)
    except HelpWanted as wanted:
        print(wanted)
        return 0
    live = sys.stdout.isatty() and not values["json"]
    count = values["count"] or (None if live else 1)
    samples = _samples(values["interval"], count)
    if values["json"]:
        for machines in samples:
            print(json.dumps({"time": time.time(), "machines": machines}), flush=True)
        return 0
    if live:
        return _watch(samples)
    from rich.console import Console

    for machines in samples:
        Console(width=None if sys.stdout.isatty() else 160).print(table(machines))
    return 0


def _samples(interval_s: float, count: int | None) -> Iterator[list[Machine]]:
    before = {sample.pid: sample for sample in scan()}
    while count is None or count > 0:
        time.sleep(interval_s)
        now = {sample.pid: sample for sample in scan()}
        yield [rates(before.get(pid, sample), sample) for pid, sample in now.items()]
        before = now
        count = None if count is None else count - 1


def _watch(samples: Iterator[list[Machine]]) -> int:
    """On the terminal's other screen, which is left whatever ends us."""
    from rich.live import Live
    from rich.text import Text

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    machines: list[Machine] = []
    try:
        with Live(Text("looking for machines..."), screen=True, auto_refresh=False) as live:
            live.refresh()
            for machines in samples:
                live.update(table(machines), refresh=True)
    except KeyboardInterrupt:
        pass
    from rich.console import Console

    Console().print(table(machines))
    return 0


def table(machines: list[Machine]) -> Table:
    """For people."""
    from rich.table import Table

    title = f"{len(machines)} machine{'s' if len(machines) != 1 else ''}" if machines else "no machine runs"
    shown = Table(title=title, title_justify="left", expand=True)
    for heading in ("PID", "VMM", "guest"):
        shown.add_column(heading, overflow="ellipsis", no_wrap=True, justify="right" if heading == "PID" else "left")
    for heading in ("vCPUs", "CPU guest", "CPU outside", "RSS", "RAM", "disk r/w", "net rx/tx"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("exits/s", overflow="fold")
    for each in sorted(machines, key=lambda each: -(each["guest_cpus"] + each["outside_cpus"])):
        shown.add_row(*_row(each))
    return shown


def _row(machine: Machine) -> list[str]:
    kernel = machine["kernel"]
    return [
        str(machine["pid"]),
        _safe(machine["name"]),
        _safe(kernel.rpartition("/")[2] if kernel else ""),
        str(machine["vcpus"]),
        f"{machine['guest_cpus']:.2f}",
        f"{machine['outside_cpus']:.2f}",
        _size(machine["rss"]),
        _size(machine["memory"]),
        f"{_size(machine['disk_read_bytes_per_s'])}/{_size(machine['disk_written_bytes_per_s'])}",
        f"{_size(machine['net_rx_bytes_per_s'])}/{_size(machine['net_tx_bytes_per_s'])}"
        if machine["net_rx_bytes_per_s"] is not None
        else "-",
        _exits(machine["exits_per_s"]),
    ]


def _exits(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    ordered = sorted(found.items(), key=lambda item: -item[1])
    words = [f"{_safe(reason)} {count:.0f}" for reason, count in ordered[:REASONS] if count >= 0.5]
    return f"{sum(found.values()):.0f}" + (f": {', '.join(words)}" if words else "")


def _safe(text: str) -> str:
    """A process may call itself anything; rich would take brackets for markup."""
    from rich.markup import escape

    return escape("".join(each if each.isprintable() else "?" for each in text))


def _size(value: float | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"
