"""The format of exit traces, and their reader. Layer: debug, plain data.

All integers are little-endian. A file is a header, `meta_size` bytes of JSON (an object; what it says is a comment),
and records of `record_size` bytes, in the order of time for each vCPU but not across vCPUs:

    header, 64 bytes       magic "PYKVMTR\\0", u16 version (1), u16 record_size (64), u16 vcpus, u16 zero,
                           u32 meta_size, u32 zero, u64 start (CLOCK_MONOTONIC, ns), u64 start (Unix time, ns), zeros
    record, 64 bytes       u64 left (CLOCK_MONOTONIC, ns: when KVM_RUN returned), u64 ns in the guest before that,
                           u64 ns outside after it, u64 RIP (0: not known), u64 address, u64 value,
                           u32 records lost just before this one, u32 elements, u16 vCPU, u8 reason, u8 size, u8 flags,
                           3 zeros

`reason` is KVM's exit reason (<linux/kvm.h>); `address` is its port, GPA, MSR, hypercall number, event type, suberror,
vector or PC; `value` the first 8 bytes written, or those that a read was answered with; `elements` those of a
string instruction. Flags: 1 the guest wrote, 2 answered in C, 4 not entered again, so that the time outside is not
known. A record with flag 0x80 ends a complete file: its value is the number of records, its address that of the lost.
The native side of it is native/trace.h.
"""

from __future__ import annotations

import json
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from pykvm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAGIC = b"PYKVMTR\0"
VERSION = 1
HEADER = struct.Struct("<8s4H2I2Q24x")
RECORD = struct.Struct("<6Q2IHBBB3x")
WRITE, IN_C, LAST, END = 1, 2, 4, 0x80
MAX_META = 1 << 20
MAX_VCPUS = 4096
CHUNK = RECORD.size * 4096
MAX_ACCESS = 8  # bytes of one access


class Record(NamedTuple):
    """One exit; see the module for the fields."""

    left_ns: int
    guest_ns: int
    outside_ns: int
    rip: int
    address: int
    value: int
    lost: int
    elements: int
    vcpu: int
    reason: int
    size: int
    flags: int

    @property
    def write(self) -> bool:
        """Whether the guest wrote."""
        return bool(self.flags & WRITE)


def pack_header(vcpus: int, start_ns: int, unix_ns: int, meta: Mapping[str, object]) -> bytes:
    """A header with its JSON, padded so that the records begin at a multiple of their size."""
    text = json.dumps(meta).encode()
    text += b" " * (-len(text) % RECORD.size)
    return HEADER.pack(MAGIC, VERSION, RECORD.size, vcpus, 0, len(text), 0, start_ns, unix_ns) + text


def pack_end(records: int, lost: int, now_ns: int) -> bytes:
    """The record that ends a complete file."""
    return RECORD.pack(now_ns, 0, 0, 0, lost, records, 0, 0, 0, 0, 0, END)


class TraceFile:
    """A trace that is read as far as it is sound; what is wrong with the rest stands in `problems` afterwards.

    vcpus      how many the machine had
    start_ns   CLOCK_MONOTONIC of the start, from which people count
    meta       comments of the writer: kernel, command line, device names by address
    lost       records that the writer had to drop, as far as read

    Raises UsageError for a file that is no trace or of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.problems: list[str] = []
        self.lost = 0
        try:
            with open(self.path, "rb") as file:
                raw = file.read(HEADER.size)
                self._read_header(raw)
                self.meta = self._read_meta(file.read(self._meta_size))
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}") from None

    def _read_header(self, raw: bytes) -> None:
        if len(raw) < HEADER.size or not raw.startswith(MAGIC):
            raise UsageError(f"{self.path}: is no exit trace (pykvm start --trace FILE writes one)")
        _, version, size, self.vcpus, _, self._meta_size, _, self.start_ns, self.unix_ns = HEADER.unpack(raw)
        if version != VERSION or size != RECORD.size:
            raise UsageError(f"{self.path}: is a trace of version {version}; this pykvm reads version {VERSION}")
        if not 0 < self.vcpus <= MAX_VCPUS or self._meta_size > MAX_META:
            raise UsageError(f"{self.path}: is damaged: its header speaks of {self.vcpus} vCPUs")

    def _read_meta(self, text: bytes) -> dict[str, object]:
        try:
            meta = json.loads(text or b"{}")
        except (ValueError, RecursionError):
            meta = None
        if not isinstance(meta, dict):
            self.problems.append("its comments are damaged")
            return {}
        return meta

    def __iter__(self) -> Iterator[Record]:
        damaged, end, read = 0, None, 0
        try:
            with open(self.path, "rb") as file:
                file.seek(HEADER.size + self._meta_size)
                while chunk := file.read(CHUNK):
                    whole = len(chunk) // RECORD.size * RECORD.size
                    for fields in RECORD.iter_unpack(chunk[:whole]):
                        record = Record._make(fields)
                        if record.flags == END:
                            end = record
                        elif not self._is_sound(record):
                            damaged += 1
                        else:
                            self.lost += record.lost
                            read += 1
                            yield record
                    if whole != len(chunk):
                        self.problems.append(f"ends in the middle of a record ({len(chunk) - whole} bytes of it)")
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}") from None
        self._judge(damaged, end, read)

    def _judge(self, damaged: int, end: Record | None, read: int) -> None:
        if damaged:
            self.problems.append(f"{damaged} damaged records are left out")
        if end is None:
            self.problems.append("has no end mark: the writer still runs, or was killed")
            return
        self.lost = max(self.lost, end.address)
        if end.value != read + damaged:
            self.problems.append(f"holds {read + damaged} records of {end.value} that were written")

    def _is_sound(self, record: Record) -> bool:
        return (
            record.vcpu < self.vcpus
            and not record.flags & ~(WRITE | IN_C | LAST)
            and record.size <= MAX_ACCESS
            and record.left_ns >= record.guest_ns
            and record.outside_ns < 1 << 63
        )
