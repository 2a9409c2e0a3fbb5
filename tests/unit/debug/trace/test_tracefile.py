"""The reader of exit traces: sound files, cut ones, damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import traces
from hypothesis import given
from hypothesis import strategies as st

from pykvm._native import ffi, lib
from pykvm.debug.trace.tracefile import END, HEADER, IN_C, LAST, RECORD, WRITE, Record, TraceFile, pack_end
from pykvm.errors import UsageError


def test_the_layout_is_that_of_the_c_structure() -> None:
    """Every field that the reader unpacks has the offset and the size that C gives it."""
    kind = "struct pk_trace_record"
    raw = RECORD.pack(*range(1, len(Record._fields) + 1))
    native = ffi.new(f"{kind} *")
    ffi.memmove(native, raw, len(raw))
    assert RECORD.size == ffi.sizeof(kind)
    assert [getattr(native, name) for name in Record._fields] == list(range(1, len(Record._fields) + 1))
    flags = (lib.PK_TRACE_WRITE, lib.PK_TRACE_IN_C, lib.PK_TRACE_LAST, lib.PK_TRACE_END)
    assert flags == (WRITE, IN_C, LAST, END)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Records, comments and the number of vCPUs survive, and a complete file has no problems."""
    trace = TraceFile(traces.write(tmp_path / "t"))
    records = list(trace)
    assert (trace.vcpus, trace.meta["kernel"], trace.problems, trace.lost) == (2, "k.elf", [], 0)
    assert [record.address for record in records] == [0x3F8, 0x3FD, 0xD0000050, 0x5000, 0]
    assert [record.write for record in records] == [True, False, True, True, False]


def test_lost_records_are_told(tmp_path: Path) -> None:
    """What was lost is summed from the records, and taken from the end mark where that knows of more."""
    record = traces.pack(traces.IO, at=10, lost=3)
    trace = TraceFile(traces.write(tmp_path / "t", (record,), pack_end(1, 5, 0)))
    list(trace)
    assert trace.lost == 5
    trace = TraceFile(traces.write(tmp_path / "t", (record,), b""))
    list(trace)
    assert trace.lost == 3


def test_a_cut_file_is_read_up_to_its_end(tmp_path: Path) -> None:
    """Half a record and a missing end mark are said, and what was whole is there."""
    path = Path(traces.write(tmp_path / "t"))
    path.write_bytes(path.read_bytes()[: -RECORD.size - 20])
    trace = TraceFile(path)
    assert len(list(trace)) == len(traces.RECORDS) - 1
    assert any("middle of a record (44 bytes" in problem for problem in trace.problems)
    assert any("no end mark" in problem for problem in trace.problems)


def test_damaged_records_are_left_out(tmp_path: Path) -> None:
    """A vCPU that does not exist, an impossible size or flag: counted, not shown."""
    bad = (
        traces.pack(traces.IO, at=5, vcpu=2),
        traces.pack(traces.IO, at=5, size=9),
        traces.pack(traces.IO, at=5, flags=0x40),
        traces.pack(traces.IO, at=5, guest=1 << 63),
    )
    trace = TraceFile(traces.write(tmp_path / "t", traces.RECORDS + bad))
    assert len(list(trace)) == len(traces.RECORDS)
    assert trace.problems == ["4 damaged records are left out"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no exit trace"),
        (b"PYKVMTR\0", "is no exit trace"),
        (b"\x7fELF" + bytes(100), "is no exit trace"),
        (HEADER.pack(b"PYKVMTR\0", 2, 64, 1, 0, 0, 0, 0, 0), "version 2"),
        (HEADER.pack(b"PYKVMTR\0", 1, 32, 1, 0, 0, 0, 0, 0), "version 1"),
        (HEADER.pack(b"PYKVMTR\0", 1, 64, 0, 0, 0, 0, 0, 0), "0 vCPUs"),
        (HEADER.pack(b"PYKVMTR\0", 1, 64, 1, 0, 0xFFFFFFFF, 0, 0, 0), "is damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    """No trace, another version, absurd lengths: one line that names the file."""
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        TraceFile(tmp_path / "t")


def test_a_missing_file(tmp_path: Path) -> None:
    """The message is the system's, with the name."""
    with pytest.raises(UsageError, match="none: No such file"):
        TraceFile(tmp_path / "none")


@pytest.mark.parametrize("meta", [b"[1]", b"{", b"\xff\xfe", b"[" * 5000])
def test_damaged_comments_do_not_matter(tmp_path: Path, meta: bytes) -> None:
    """Comments that are no JSON object are told of; the records are read."""
    header = HEADER.pack(b"PYKVMTR\0", 1, 64, 2, 0, len(meta), 0, 0, 0)
    (tmp_path / "t").write_bytes(header + meta + traces.RECORDS[0])
    trace = TraceFile(tmp_path / "t")
    assert (len(list(trace)), trace.meta) == (1, {})
    assert "comments are damaged" in trace.problems[0]


@given(st.binary(max_size=400), st.integers(0, 400))
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, noise: bytes, cut: int) -> None:
    """Whatever overwrites a trace from some place on: it is read or refused."""
    path = tmp_path_factory.getbasetemp() / "noise"
    whole = Path(traces.write(path)).read_bytes()
    path.write_bytes(whole[:cut] + noise + whole[cut + len(noise) :])
    try:
        trace = TraceFile(path)
        assert all(record.vcpu < trace.vcpus for record in trace)
    except UsageError as error:
        assert str(path) in str(error)
