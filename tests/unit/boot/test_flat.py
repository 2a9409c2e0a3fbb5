"""Flat binaries in three modes."""

from __future__ import annotations

import pytest
from builders import CODE, MIB, file, guest_ram, options
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.boot.flat import load_flat
from pykvm.boot.image import Boot, Module
from pykvm.errors import ConfigError, ImageError
from pykvm.x86.guest_checks import check_guest_state
from pykvm.x86.segments import CR0_PE, EFER_LMA


def test_default_is_real_mode_at_1000_0() -> None:
    """CS=0x1000:IP=0 with all segments alike and SP=0x8000, as kvmtool starts a flat image."""
    with guest_ram() as memory:
        boot = load_flat(memory, file(CODE), options())
        state = boot.state
        assert (state.cs.selector, state.cs.base, state.gprs["rip"]) == (0x1000, 0x10000, 0)
        assert {each.selector for each in state.data_segments} == {0x1000}
        assert state.gprs["rsp"] == 0x8000
        assert memory.read(0x10000, len(CODE)) == CODE
        assert (boot.protocol, boot.entry, check_guest_state(state)) == ("flat-real", 0x10000, [])


@pytest.mark.parametrize(("size", "ss"), [(0x7000, 0x1000), (0x7001, 0), (0x20000, 0)])
def test_the_stack_never_lies_in_the_image(size: int, ss: int) -> None:
    """An image that reaches kvmtool's stack gets one below it, in segment 0."""
    with guest_ram() as memory:
        state = load_flat(memory, file(b"\x90" * size), options()).state
        top = state.ss.base + state.gprs["rsp"]
        assert state.ss.selector == ss
        assert top <= 0x10000 or top - 0x1000 >= 0x10000 + size


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_wide_modes_load_at_1_mib(mode: str) -> None:
    """Protected and long mode images are entered at their first byte at 1 MiB."""
    with guest_ram() as memory:
        boot = load_flat(memory, file(CODE), options(mode=mode))
        assert (boot.protocol, boot.entry, boot.state.gprs["rip"]) == (f"flat-{mode}", MIB, MIB)
        assert boot.state.cr0 & CR0_PE
        assert bool(boot.state.efer & EFER_LMA) == (mode == "long")
        assert memory.read(MIB, len(CODE)) == CODE
        assert check_guest_state(boot.state) == []


def test_addresses_are_the_callers() -> None:
    """load_addr and entry move the image and the entry point; in real mode the entry is an IP."""
    with guest_ram() as memory:
        real = load_flat(memory, file(CODE), options(load_addr=0x7C00, entry=2))
        assert (real.state.cs.selector, real.state.gprs["rip"], real.entry) == (0x7C0, 2, 0x7C02)
        wide = load_flat(memory, file(CODE), options(mode="long", load_addr=2 * MIB, entry=2 * MIB + 2))
        assert wide.state.gprs["rip"] == wide.entry == 2 * MIB + 2
        assert memory.read(0x7C00, 5) == memory.read(2 * MIB, 5) == CODE


@pytest.mark.parametrize(
    ("data", "extra", "reason"),
    [
        (b"", {}, "is empty"),
        (bytes(17 * MIB), {"mode": "long"}, "is larger than the guest's memory"),
        (bytes(15 * MIB + 1), {"mode": "long"}, "is not all RAM"),
        (bytes(0x90000), {}, "is not all RAM"),
        (CODE, {"load_addr": 0xFFFF8}, "is not all RAM"),
        (CODE, {"load_addr": -16}, "is not all RAM"),
        (CODE, {"load_addr": 1 << 70, "mode": "long"}, "is not all RAM"),
        (CODE, {"load_addr": 0x7C01}, "no real-mode segment"),
        (CODE, {"load_addr": MIB}, "no real-mode segment"),
        (CODE, {"entry": 0x10000}, "no real-mode IP"),
        (CODE, {"entry": -1}, "no real-mode IP"),
        (CODE, {"mode": "protected", "entry": 1 << 32}, "is not below 4 GiB"),
        (CODE, {"mode": "long", "entry": 16 * MIB}, "is outside guest memory"),
        (CODE, {"mode": "long", "load_addr": 0x8FFF}, "boot-time page tables"),
        (CODE, {"mode": "protected", "load_addr": 0x510}, "boot-time GDT"),
        (CODE, {"cmdline": "x"}, "takes no command line"),
        (CODE, {"initrd": file(b"x"), "modules": [Module(file(b"y"))]}, "no initial RAM disk and no modules"),
    ],
)
def test_impossible_requests_are_refused(data: bytes, extra: dict[str, object], reason: str) -> None:
    """What cannot be loaded as asked is an ImageError, before a byte is written."""
    with guest_ram() as memory:
        with pytest.raises(ImageError, match=reason):
            load_flat(memory, file(data), options(**extra))
        assert not any(memory.read(0x400, 2 * MIB))


def test_unknown_mode_is_a_config_error() -> None:
    """The mode comes from the caller, not from the file."""
    with guest_ram() as memory, pytest.raises(ConfigError, match="unreal"):
        load_flat(memory, file(CODE), options(mode="unreal"))


def test_an_image_may_fill_low_memory() -> None:
    """The last byte below the EBDA is still RAM."""
    with guest_ram() as memory:
        data = b"\xf4" * (0x9FC00 - 0x10000)
        load_flat(memory, file(data), options())
        assert memory.read_u8(0x9FBFF) == 0xF4


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=64),
    mode=st.sampled_from([None, "real", "protected", "long"]),
    load_addr=st.one_of(st.none(), st.integers(-(1 << 65), 1 << 65), st.integers(0, 1 << 21)),
    entry=st.one_of(st.none(), st.integers(-(1 << 65), 1 << 65), st.integers(0, 1 << 21)),
)
def test_any_request_loads_or_is_refused(
    data: bytes, mode: str | None, load_addr: int | None, entry: int | None
) -> None:
    """Whatever addresses are asked for, the result is a state that hardware enters or an ImageError."""
    with guest_ram() as memory:
        try:
            boot = load_flat(memory, file(data), options(mode=mode, load_addr=load_addr, entry=entry))
        except ImageError:
            return
        assert isinstance(boot, Boot)
        assert check_guest_state(boot.state) == []
