"""Traces made by hand."""

from __future__ import annotations

from pathlib import Path

from pykvm._native import lib
from pykvm.debug.trace.tracefile import IN_C, LAST, RECORD, WRITE, pack_end, pack_header

START = 1_000_000_000
META = {"kernel": "k.elf", "regions": [["port", 0x3F8, 8, "COM1"], ["MMIO", 0xD0000000, 0x1000, "disk"]]}


def pack(
    reason: int, *, at: int, guest: int = 100, outside: int = 50, rip: int = 0, address: int = 0, value: int = 0,
    lost: int = 0, count: int = 1, vcpu: int = 0, size: int = 0, flags: int = 0,
) -> bytes:  # fmt: skip
    """One record; `at` is in ns after START."""
    return RECORD.pack(START + at, guest, outside, rip, address, value, lost, count, vcpu, reason, size, flags)


IO, MMIO, HLT = lib.KVM_EXIT_IO, lib.KVM_EXIT_MMIO, lib.KVM_EXIT_HLT
RECORDS = (
    pack(IO, at=1000, address=0x3F8, value=0x41, size=1, flags=WRITE | IN_C, rip=0x100010),
    pack(IO, at=2000, address=0x3FD, value=0x60, size=1, rip=0x100020),
    pack(MMIO, at=3000, address=0xD0000050, value=7, size=4, flags=WRITE, outside=5000, vcpu=1),
    pack(IO, at=4000, address=0x5000, value=0x10002, size=2, count=16, flags=WRITE),
    pack(HLT, at=9000, outside=0, flags=LAST),
)


def write(path: Path, records: tuple[bytes, ...] = RECORDS, end: bytes | None = None, meta: object = None) -> str:
    """A trace with an end mark; its path."""
    path.write_bytes(
        pack_header(2, START, 0, META if meta is None else meta)  # type: ignore[arg-type]
        + b"".join(records)
        + (pack_end(len(records), 0, START) if end is None else end)
    )
    return str(path)
