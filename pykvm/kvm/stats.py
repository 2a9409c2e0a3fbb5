"""KVM's binary statistics. Layer: kvm. KVM API documentation 4.133 (KVM_GET_STATS_FD)."""

from __future__ import annotations

import os

from pykvm._native import ffi


def read_stats(fd: int) -> dict[str, int | list[int]]:
    """Every statistic behind a stats fd (which is closed): a number, or the list of a histogram's buckets."""
    try:
        header = ffi.new("struct kvm_stats_header *")
        raw = os.pread(fd, ffi.sizeof("struct kvm_stats_header"), 0)
        ffi.memmove(header, raw, len(raw))
        step = ffi.sizeof("struct kvm_stats_desc") + header.name_size
        table = os.pread(fd, step * header.num_desc, header.desc_offset)
        values: dict[str, int | list[int]] = {}
        for at in range(0, len(table), step):
            name, size, offset = _descriptor(table[at : at + step])
            data = os.pread(fd, 8 * size, header.data_offset + offset)
            numbers = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
            values[name] = numbers[0] if size == 1 else numbers
        return values
    finally:
        os.close(fd)


def _descriptor(raw: bytes) -> tuple[str, int, int]:
    fixed = ffi.sizeof("struct kvm_stats_desc")
    descriptor = ffi.new("struct kvm_stats_desc *", {"name": 0})
    ffi.memmove(descriptor, raw, fixed)
    return raw[fixed:].split(b"\0", 1)[0].decode(), descriptor.size, descriptor.offset
