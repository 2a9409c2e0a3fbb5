"""The MP table, parsed as the MultiProcessor Specification 1.4 says."""

from __future__ import annotations

import struct
from collections import Counter

import pytest

from pykvm.errors import ConfigError
from pykvm.x86 import layout
from pykvm.x86.mptable import build_mptable
from pykvm.x86.platform import Platform


def parse(platform: Platform) -> tuple[bytes, list[bytes]]:
    """(header, entries) of the configuration table that the floating pointer leads to."""
    (pointer_gpa, pointer), (config_gpa, config) = build_mptable(platform)
    assert pointer_gpa == layout.EBDA
    assert pointer[:4] == b"_MP_" and len(pointer) == 16 * pointer[8] and pointer[9] == 4
    assert sum(pointer) & 0xFF == 0
    assert struct.unpack_from("<I", pointer, 4)[0] == config_gpa
    assert config[:4] == b"PCMP" and sum(config) & 0xFF == 0
    length, revision = struct.unpack_from("<HB", config, 4)
    assert (length, revision) == (len(config), 4)
    entries, at = [], 44
    while at < length:
        size = 20 if config[at] == 0 else 8
        entries.append(config[at : at + size])
        at += size
    assert at == length
    count, lapic = struct.unpack_from("<HI", config, 34)
    assert (count, lapic) == (len(entries), 0xFEE0_0000)
    return config[:44], entries


@pytest.mark.parametrize("cpus", [1, 2, 40, 41, 64, 254])
def test_table_names_every_processor_and_fits(cpus: int) -> None:
    """One boot processor, all enabled, and the table ends inside the BIOS area."""
    _, entries = parse(Platform(range(cpus)))
    processors = [each for each in entries if each[0] == 0]
    assert [each[1] for each in processors] == list(range(cpus))
    assert [each[3] for each in processors] == [3] + [1] * (cpus - 1)
    gpa, config = build_mptable(Platform(range(cpus)))[1]
    assert gpa >= layout.BIOS_AREA and gpa + len(config) <= layout.BIOS_AREA_END


@pytest.mark.parametrize("apic_ids", [range(1), range(64), range(254), (0, 1, 4, 5), (3, 2, 1, 0)])
def test_apic_ids_are_unique(apic_ids: range | tuple[int, ...]) -> None:
    """The IOAPIC's id is no processor's, and its interrupts arrive at it."""
    _, entries = parse(Platform(apic_ids))
    (ioapic,) = [each for each in entries if each[0] == 2]
    assert ioapic[1] not in apic_ids and ioapic[1] != 0xFF
    assert struct.unpack("<BBI", ioapic[2:]) == (0x11, 1, 0xFEC0_0000)
    assert {each[6] for each in entries if each[0] == 3} == {ioapic[1]}


def test_isa_interrupts_have_one_pin_each() -> None:
    """The timer is on pin 2, the cascade has none, the SCI is level-triggered and active high."""
    _, entries = parse(Platform())
    routes = {each[5]: (each[7], struct.unpack_from("<H", each, 2)[0]) for each in entries if each[0] == 3}
    assert routes == {irq: (2 if irq == 0 else irq, 0x0D if irq == 9 else 0) for irq in range(16) if irq != 2}
    assert len({pin for pin, _ in routes.values()}) == 15


@pytest.mark.parametrize(("pic", "expected"), [(True, [(3, 0), (1, 1)]), (False, [(1, 1)])])
def test_local_interrupts_follow_the_pic(pic: bool, expected: list[tuple[int, int]]) -> None:
    """NMI on LINT1; the 8259's interrupt on LINT0 only where there is one."""
    _, entries = parse(Platform(pic=pic))
    assert [(each[1], each[7]) for each in entries if each[0] == 4] == expected


def test_processors_that_eight_bits_cannot_name_are_left_out() -> None:
    """255 addresses all APICs and is nobody's id."""
    _, entries = parse(Platform([0, 254, 255, 300]))
    assert Counter(each[1] for each in entries if each[0] == 0) == {0: 1, 254: 1}


def test_no_table_without_an_ioapic() -> None:
    """There is nothing it could route."""
    with pytest.raises(ConfigError, match="IOAPIC"):
        build_mptable(Platform(ioapic=False))
