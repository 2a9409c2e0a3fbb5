"""What is said about the records of a trace: lines, sums, and Perfetto's JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import traces

from pykvm._native import lib
from pykvm.cli.trace import run
from pykvm.debug.symbols import Symbol, Symbols
from pykvm.debug.trace.describe import Names, describe
from pykvm.debug.trace.export import write_chrome
from pykvm.debug.trace.summary import Summary
from pykvm.debug.trace.tracefile import WRITE, Record, TraceFile
from pykvm.errors import UsageError

SYMBOLS = Symbols([Symbol("main", 0x100000, 0x18), Symbol("wait", 0x100020, 8)])


def make(reason: int, **fields: int) -> Record:
    """A record of which only `fields` matter."""
    values = dict.fromkeys(Record._fields, 0) | {"elements": 1, "reason": reason} | fields
    return Record(**values)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A sound trace."""
    return traces.write(tmp_path / "t")


def summary(path: str) -> Summary:
    """Its sums, with symbols."""
    trace = TraceFile(path)
    found = Summary(Names(trace, SYMBOLS))
    found.add_all(trace)
    return found


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (make(traces.IO, address=0x3F8, size=1, value=0x41, flags=WRITE), "IO out 0x3f8 1 byte = 0x41 (COM1)"),
        (make(traces.IO, address=0x80, size=4, elements=3, value=9), "IO in 0x80 4 bytes x 3 = 0x9..."),
        (make(traces.MMIO, address=0xD0000050, size=4, value=1), "MMIO read 0xd0000050 4 bytes = 0x1 (disk)"),
        (make(lib.KVM_EXIT_X86_WRMSR, address=0x1B, value=0x900), "X86_WRMSR 0x1b = 0x900"),
        (make(lib.KVM_EXIT_INTERNAL_ERROR, address=1), "INTERNAL_ERROR suberror 0x1"),
        (make(traces.HLT), "HLT"),
        (make(250), "reason 250"),
    ],
)
def test_describe(path: str, record: Record, said: str) -> None:
    """One exit in words, with the device's name."""
    assert describe(record, Names(TraceFile(path))) == said


def test_sums(path: str) -> None:
    """Reasons, places, times and the histogram add up."""
    found = summary(path)
    assert (found.total, found.in_c, found.guest_ns, found.outside_ns) == (5, 1, 500, 5150)
    assert {name: total.count for name, total in found.reasons.items()} == {"IO": 3, "MMIO": 1, "HLT": 1}
    assert found.places["page", 0xD0000000].outside_ns == 5000
    assert sum(found.histogram.values()) == 4  # the last exit has no time outside
    assert found.span_ns == 8100


def test_text_and_data_agree(path: str) -> None:
    """The tables name devices and code; the data survives JSON."""
    text, data = summary(path).text(), json.loads(json.dumps(summary(path).as_dict()))
    assert "COM1" in text and "main+0x10" in text and "disk" in text
    assert data["exits"] == 5
    assert {row["address"]: row["name"] for row in data["ports"]}["0x3f8"] == "COM1"


def test_nothing_to_sum(tmp_path: Path) -> None:
    """A trace without exits divides by nothing."""
    assert summary(traces.write(tmp_path / "t", ())).text() == "no exits\n"


def test_chrome_json(path: str, tmp_path: Path) -> None:
    """Each exit is two slices of its vCPU's thread that touch and do not overlap; process and threads have names."""
    output = tmp_path / "t.json"
    assert write_chrome(TraceFile(path), str(output), Names(TraceFile(path), SYMBOLS)) == 5
    document = json.loads(output.read_text())
    events = document["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"pykvm k.elf", "vCPU 0", "vCPU 1"}
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == 10
    for thread in (0, 1):
        end = 0.0
        for event in (each for each in slices if each["tid"] == thread):
            assert event["ts"] >= end and event["dur"] >= 0
            end = event["ts"] + event["dur"]
    assert slices[1]["name"] == "IO write COM1" and slices[1]["args"]["rip"] == "main+0x10"
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_the_export_is_whole_or_not_there(path: str, tmp_path: Path) -> None:
    """A folder that does not exist: one line."""
    with pytest.raises(UsageError, match=r"none/t\.json"):
        write_chrome(TraceFile(path), str(tmp_path / "none" / "t.json"))


def test_show_filters(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--vcpu, --reason and --limit choose the lines."""
    assert run(["show", path, "--vcpu", "1"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert run(["show", path, "--reason", "io", "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and "us outside C" in out


@pytest.mark.parametrize(
    "arguments", [["show"], ["export", "x"], ["nonsense"], ["show", "x", "--vcpu", "-1"], ["show", "x", "--what"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    """What cannot be meant is refused."""
    with pytest.raises(UsageError):
        run(arguments)


def test_an_unknown_reason_is_told_with_those_that_exist(path: str) -> None:
    """--reason names KVM's."""
    with pytest.raises(UsageError, match="MMIO"):
        run(["show", path, "--reason", "COFFEE"])
