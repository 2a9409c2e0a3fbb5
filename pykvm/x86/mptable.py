"""The MP table: how kernels without ACPI find processors, IOAPIC and interrupt routes. Layer: x86.

The floating pointer lies in the first KiB of the EBDA, where it is searched for. The configuration table,
which it points to, lies at layout.MP_CONFIG, because the EBDA's one KiB has no room for more than 40
processors.

Source: Intel MultiProcessor Specification 1.4, chapter 4.
"""

from __future__ import annotations

import struct

from pykvm.errors import ConfigError
from pykvm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.x86.platform import Platform

MAX_APIC_ID = 254  # 8-bit fields, and 255 addresses every APIC

# Entry types (4.3) and their lengths: processor 20 bytes, all others 8
PROCESSOR, BUS, IOAPIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
# Interrupt types (table 4-11)
INT, NMI, _SMI, EXTINT = range(4)
CONFORMS = 0  # polarity and trigger as the bus has them
ACTIVE_HIGH_LEVEL = 0x0D

APIC_VERSION = 0x14
IOAPIC_VERSION = 0x11
ISA_BUS = 0
ALL_APICS = 0xFF

# What CPUID leaf 1 would say of the processor; only Pentium-era code reads these two
CPU_SIGNATURE = 0x600
CPU_FEATURES = 0x201  # FPU and on-chip APIC


def build_mptable(platform: Platform) -> tuple[tuple[int, bytes], ...]:
    """(GPA, bytes) of the floating pointer and of the configuration table.

    Processors whose APIC id is above 254 cannot be named in it and are left out. Raises ConfigError when
    there is nothing to describe: without an IOAPIC the specification has no interrupt routes.
    """
    if not platform.ioapic:
        raise ConfigError("irqchip", "an MP table needs an IOAPIC")
    config = _configuration(platform)
    return ((layout.EBDA, _floating_pointer()), (layout.MP_CONFIG, config))


def _floating_pointer() -> bytes:
    """4.1: version 1.4, a configuration table is present, virtual wire mode (no IMCR)."""
    return _with_checksum(struct.pack("<4sIBBBBB3x", b"_MP_", layout.MP_CONFIG, 1, 4, 0, 0, 0), 10)


def _configuration(platform: Platform) -> bytes:
    processors = [apic_id for apic_id in platform.apic_ids if apic_id <= MAX_APIC_ID]
    ioapic_id = next((each for each in range(ALL_APICS) if each not in processors), 0)
    entries = [
        struct.pack("<BBBBII8x", PROCESSOR, apic_id, APIC_VERSION, 1 | (n == 0) << 1, CPU_SIGNATURE, CPU_FEATURES)
        for n, apic_id in enumerate(processors)
    ]
    entries.append(struct.pack("<BB6s", BUS, ISA_BUS, b"ISA   "))
    entries.append(struct.pack("<BBBBI", IOAPIC, ioapic_id, IOAPIC_VERSION, 1, layout.IOAPIC))
    entries += _io_interrupts(ioapic_id)
    if platform.pic and processors:  # the 8259s reach the boot processor through LINT0
        entries.append(_interrupt(LOCAL_INTERRUPT, (EXTINT, CONFORMS), 0, (processors[0], 0)))
    entries.append(_interrupt(LOCAL_INTERRUPT, (NMI, CONFORMS), 0, (ALL_APICS, 1)))
    body = b"".join(entries)
    header = struct.pack("<4sHBB8s12s", b"PCMP", 44 + len(body), 4, 0, b"PYKVM   ", b"PC          ")
    header += struct.pack("<IHHIHBB", 0, 0, len(entries), layout.LAPIC, 0, 0, 0)  # no OEM table, no extension
    return _with_checksum(header + body, 7)


def _io_interrupts(ioapic_id: int) -> list[bytes]:
    """ISA interrupt n on pin n, but the timer on pin 2, whose own interrupt is the cascade and has no pin."""
    entries = []
    for irq in range(16):
        if irq == layout.PIT_PIN:
            continue
        pin = layout.PIT_PIN if irq == layout.IRQ_PIT else irq
        flags = ACTIVE_HIGH_LEVEL if irq == layout.IRQ_ACPI else CONFORMS
        entries.append(_interrupt(IO_INTERRUPT, (INT, flags), irq, (ioapic_id, pin)))
    return entries


def _interrupt(entry: int, kind_flags: tuple[int, int], irq: int, pin: tuple[int, int]) -> bytes:
    """One assignment: ISA interrupt `irq` arrives at `pin` (APIC id, input) (4.3.4, 4.3.5)."""
    return struct.pack("<BBHBBBB", entry, *kind_flags, ISA_BUS, irq, *pin)


def _with_checksum(data: bytes, at: int) -> bytes:
    """`data` with the byte `at`, zero so far, set so that all bytes sum to zero."""
    return data[:at] + bytes([-sum(data) & 0xFF]) + data[at + 1 :]
