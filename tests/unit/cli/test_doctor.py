"""`pykvm doctor`: its tables, its JSON, its exit status."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pykvm.cli import doctor
from pykvm.control.capabilities import Capability
from pykvm.control.probe import FAIL, NOTE, OK, Check, HostReport
from pykvm.errors import UsageError


def report(*, usable: bool = True) -> HostReport:
    """A host with one thing of each state."""
    found = HostReport()
    found.checks = [
        Check("host", "processor", OK, "Test CPU"),
        Check("KVM", "module", NOTE, "kvm_pvm", advice="use `scripts/lab` " * 12),
        Check("KVM", "device", OK if usable else FAIL, "[not markup]", advice="" if usable else "load kvm_intel"),
    ]
    found.capabilities = [Capability("IRQCHIP", 1), Capability("NESTED_STATE", 0), Capability("GUEST_MEMFD", None)]
    return found


def shown(width: int, **options: bool) -> str:
    """What people see at this width."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    doctor.show(report(**options), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    """No line is wider than the terminal, and nothing is cut off: long advice wraps."""
    text = shown(width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert "…" not in text
    assert text.count("`scripts/lab`") + text.count("`scripts/lab`".replace("/", "/\n")) == 12


def test_values_are_no_markup() -> None:
    """Brackets in a value are shown as they are."""
    assert "[not markup]" in shown(80)


def test_last_line_is_the_verdict() -> None:
    """The reader who looks only at the last line knows."""
    assert shown(80).splitlines()[-1] == "pykvm can run machines here; 1 note above."
    assert shown(80, usable=False).splitlines()[-1] == "pykvm cannot run machines here: device."


def test_capability_values() -> None:
    """Values are shown, an unknown one as unknown, a missing one with its remedy."""
    lines = shown(100).splitlines()
    assert any(line.split()[:2] == ["IRQCHIP", "1"] for line in lines)
    assert any(line.split()[:2] == ["GUEST_MEMFD", "unknown"] for line in lines)
    assert any("nested=1" in line for line in lines)


@pytest.mark.parametrize(("usable", "status"), [(True, 0), (False, 4)])
def test_status_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], usable: bool, status: int
) -> None:
    """--json prints one document, and the exit status says whether machines can run."""
    monkeypatch.setattr(doctor, "probe", lambda: report(usable=usable))
    assert doctor.run(["--json"]) == status
    document = json.loads(capsys.readouterr().out)
    assert document["usable"] is usable
    assert document["checks"][0] == {
        "group": "host", "name": "processor", "state": "ok", "value": "Test CPU", "text": "Test CPU", "advice": "",
    }  # fmt: skip
    assert document["capabilities"][2]["value"] is None
    assert doctor.run([]) == status


def test_help_and_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    """--help explains and succeeds; an unknown option is a usage error."""
    assert doctor.run(["--help"]) == 0
    assert "--json" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--jsn"):
        doctor.run(["--jsn"])
