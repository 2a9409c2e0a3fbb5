"""What is told of the machines of a failed test: sections of pytest's report, and files. Layer: programs.

The guest may be in any state: what cannot be found out is said to be so, and never hides the test's own failure.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import pytest

    from pykvm.board import Pc
    from pykvm.core.outcome import Outcome
    from pykvm.testing.machines import Machines

CONSOLE_LINES = 30
BOOT_LINES = 5
MAX_VCPUS = 8  # whose place is shown
MAX_CALLERS = 8
MAX_NAME = 120


def tell(machines: Machines, report: pytest.TestReport) -> None:
    """Add a section for each machine, and save its artifacts if that is asked for."""
    named = list(machines.named)
    if machines.booted_as is not None and not named:
        named.append(("boot", machines.booted_as))
    config = machines.item.config
    option, snapshot = config.getoption("--pykvm-artifacts"), config.getoption("--pykvm-artifact-snapshots")
    for name, machine in named:
        text = describe(machine)
        if machines.booted_as is not None and machine is not machines.booted_as:
            text += "".join(f"\n{row}" for row in _console(machines.booted_as, BOOT_LINES, "before the fork"))
        if option:
            folder = config.invocation_params.dir / option / folder_name(report.nodeid) / name.replace(" ", "-")
            text += f"\nartifacts: {save(machine, folder, snapshot=snapshot)}"
        report.sections.append((f"pykvm {name}", text))


def explain_outcomes(op: str, left: object, right: object) -> list[str]:
    """The lines that pytest shows for `left op right`."""
    from pykvm.core.outcome import Outcome

    assert isinstance(left, Outcome) and isinstance(right, Outcome)
    lines = [f"{left!r} {op} {right!r}"]
    if left.detail:
        lines.append(f"it is {left.kind} because: {left.detail}")
    if left.report is not None:
        lines += [f"crash: {left.report.title}", *left.report.advice]
    elif left.kind == "DEBUG_EXIT" == right.kind:
        lines.append(f"debug-exit code {left.code:#x} instead of {right.code:#x}")
    return lines


# -- text --------------------------------------------------------------------------------------------------------


def describe(machine: Pc) -> str:
    """Outcome, place of each vCPU, exits, crash report and the console's end; pauses the machine."""
    try:
        was = "running" if machine.running else "paused"
        machine.pause()
        outcome = machine.outcome
        lines = [f"outcome: {outcome}" if outcome is not None else f"the guest was {was}"]
        lines += [_place(machine, index) for index in range(min(len(machine.vcpus), MAX_VCPUS))]
        lines[2:2] = _callers(machine)
        lines.append(_exits(machine))
        if outcome is not None and outcome.report is not None:
            lines += ["", outcome.report.text().rstrip()]
        return "\n".join(lines + _console(machine, CONSOLE_LINES, "console"))
    except Exception as problem:
        return f"the machine cannot be examined: {problem}"


def _place(machine: Pc, index: int) -> str:
    from pykvm.debug.code import linear_rip

    rip = linear_rip(machine.vcpus[index].capture_state())
    name = machine.symbols.locate(rip)
    return f"vCPU {index}: rip {rip:#x}" + ("" if name == hex(rip) else f", {name}")


def _callers(machine: Pc) -> list[str]:
    """Who called what vCPU 0 is in, as far as frame pointers and symbols tell."""
    callers: list[str] = []
    for frame in machine.backtrace()[1 : MAX_CALLERS + 1]:
        if frame.text.startswith("0x"):  # no symbol: the code has no frame pointers
            break
        callers.append(f"  called from {frame.text}")
    return callers


def _exits(machine: Pc) -> str:
    from pykvm.debug.stats import collect_stats

    stats = collect_stats(machine)
    if machine.config.stats:
        return stats.text().rstrip()
    counts = sorted(stats.reasons.items(), key=lambda each: -each[1])
    return "exits: " + (", ".join(f"{name} {count}" for name, count in counts) or "none")


def _console(machine: Pc, most: int, what: str) -> list[str]:
    from pykvm.debug.report import printable_tail

    rows = printable_tail(machine.console.data, most)
    if not rows:
        return [f"{what}: the guest printed nothing"]
    return [f"{what}, last {len(rows)} lines:", *(f"  | {row}" for row in rows)]


# -- files -------------------------------------------------------------------------------------------------------


def folder_name(nodeid: str) -> str:
    """A file name for a test: readable, and different for different tests."""
    plain = re.sub(r"[^\w.=-]+", "-", nodeid).strip("-")
    if len(plain) <= MAX_NAME:
        return plain
    return f"{plain[:MAX_NAME]}-{hashlib.sha256(nodeid.encode()).hexdigest()[:8]}"


def save(machine: Pc, folder: Path, *, snapshot: bool) -> str:
    """Write what is known of a machine into `folder`; the folder's name, or what went wrong."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "console.log").write_bytes(machine.console.data)
        _write_json(folder / "machine.json", machine_state(machine))
        outcome = machine.outcome
        if outcome is not None and outcome.report is not None:
            (folder / "crash.txt").write_text(outcome.report.text())
            _write_json(folder / "crash.json", outcome.report.as_dict())
        if snapshot:
            machine.save(str(folder / "snapshot.pykvm"))
    except Exception as problem:
        return f"{folder} (incomplete: {problem})"
    return str(folder)


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


def machine_state(machine: Pc) -> dict[str, object]:
    """Outcome, exits and the registers of every vCPU, ready for JSON."""
    from pykvm.debug.stats import collect_stats

    return {
        "outcome": _outcome_dict(machine.outcome),
        "stats": collect_stats(machine).as_dict(),
        "vcpus": [_vcpu_dict(machine, index) for index in range(len(machine.vcpus))],
    }


def _outcome_dict(outcome: Outcome | None) -> dict[str, object] | None:
    if outcome is None:
        return None
    return {"kind": outcome.kind, "code": outcome.code, "detail": outcome.detail, "vcpu": outcome.vcpu}


def _vcpu_dict(machine: Pc, index: int) -> dict[str, object]:
    from pykvm.debug.bits import describe_mode, describe_segment
    from pykvm.debug.code import linear_rip
    from pykvm.x86.segments import SEGMENT_NAMES

    state = machine.vcpus[index].capture_state()
    return {
        "index": index,
        "mode": describe_mode(state),
        "at": machine.symbols.locate(linear_rip(state)),
        "registers": {name: hex(value) for name, value in state.gprs.items()},
        "control": {name: hex(getattr(state, name)) for name in ("cr0", "cr2", "cr3", "cr4", "efer")},
        "segments": {
            name: {
                "selector": hex(getattr(state, name).selector),
                "base": hex(getattr(state, name).base),
                "limit": hex(getattr(state, name).limit),
                "attributes": describe_segment(getattr(state, name)),
            }
            for name in SEGMENT_NAMES
        },
        "tables": {
            name: {"base": hex(getattr(state, name).base), "limit": hex(getattr(state, name).limit)}
            for name in ("gdt", "idt")
        },
    }
