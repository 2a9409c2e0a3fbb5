"""`pykvm doctor`: what this host can do, and what to do about what is missing. Layer: cli."""

from __future__ import annotations

from pykvm.cli.options import HelpWanted, Option, Parser
from pykvm.control.probe import FAIL, NOTE, OK, HostReport, probe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXIT_USABLE, EXIT_UNUSABLE = 0, 4

PARSER = Parser(
    "pykvm doctor [--json]",
    "Looks at this host and runs tiny guests that measure it. Status 0: pykvm can run machines here; 4: it cannot.",
    (Option("--json", "", "print one JSON document instead of the tables"),),
    positionals=0,
)

_STYLES = {OK: "green", NOTE: "yellow", FAIL: "bold red"}


def run(argv: list[str]) -> int:
    """Print what `probe` finds; EXIT_USABLE or EXIT_UNUSABLE."""
    try:
        values, _ = PARSER.parse(argv)
    except HelpWanted as help_text:
        print(help_text)
        return EXIT_USABLE
    report = probe()
    if values["json"]:
        import json

        print(json.dumps(report.as_dict(), indent=2))
    else:
        from rich.console import Console

        show(report, Console(highlight=False))
    return EXIT_USABLE if report.usable else EXIT_UNUSABLE


def show(report: HostReport, console: Console) -> None:
    """The tables for people, as wide as the terminal."""
    console.print(_checks(report))
    if report.capabilities:
        console.print()
        console.print(_capabilities(report))
    console.print()
    if report.usable:
        notes = sum(check.state == NOTE for check in report.checks)
        console.print(f"pykvm can run machines here{_count(notes)}.")
    else:
        problems = ", ".join(check.name for check in report.checks if check.state == FAIL)
        console.print(f"[bold red]pykvm cannot run machines here: {problems}.")


def _count(notes: int) -> str:
    return f"; {notes} {'note' if notes == 1 else 'notes'} above" if notes else ""


def _checks(report: HostReport) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("this host", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what it has, and what to do")
    group = ""
    for check in report.checks:
        if check.group != group:
            if group:
                table.add_row()
            table.add_row(Text(check.group, style="bold"))
            group = check.group
        value = Text(check.value)
        if check.advice:
            value.append(f"\n-> {check.advice}", style="cyan")
        table.add_row(f"  {check.name}", Text(check.state, style=_STYLES[check.state]), value)
    return table


def _capabilities(report: HostReport) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("KVM_CAP_", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("what pykvm does with it")
    for each in report.capabilities:
        purpose = Text(each.purpose)
        if each.advice:
            purpose.append(f"\n-> {each.advice}", style="cyan")
        style = "" if each.value else _STYLES[FAIL if each.needed else NOTE]
        value = "unknown" if each.value is None else str(each.value)
        table.add_row(each.name, Text(value, style=style), purpose)
    return table
