"""The measuring guests of `pykvm doctor`, and its report on this host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykvm.control import measure
from pykvm.control.capabilities import PURPOSES
from pykvm.control.probe import FAIL, probe
from pykvm.debug.host import detect_backend
from pykvm.kvm.system import Kvm


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """An open /dev/kvm."""
    with Kvm() as device:
        yield device


def test_ring_0_speed_agrees_with_the_backend(kvm: Kvm) -> None:
    """The measured speed says native exactly where the backend does not interpret ring 0."""
    native = measure.ring0_speed(kvm) >= measure.NATIVE_THRESHOLD
    assert native == (detect_backend().interpreted != "ring 0")


def test_native_ring_0_lacks_nothing(kvm: Kvm) -> None:
    """An interpreter lacks popcnt; a CPU that runs ring 0 itself gives up on nothing."""
    missing = measure.missing_instructions(kvm)
    assert set(missing) <= set(measure.RING_0_INSTRUCTIONS)
    assert ("popcnt" in missing) == (detect_backend().interpreted == "ring 0")
    if detect_backend().interpreted != "ring 0":
        assert missing == []


def test_costs_are_plausible(kvm: Kvm) -> None:
    """An exit costs between a tenth of a microsecond and a millisecond, a machine's life less than a second."""
    for cost_us in measure.exit_costs_us(kvm):
        assert 0.1 < cost_us < 1000
    assert 0.05 < measure.lifecycle_ms(kvm) < 1000


def test_measuring_guest_that_misbehaves(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that does not reach its HLT is an error of its own, not a figure."""
    monkeypatch.setattr(measure, "long_mode", lambda memory, entry: measure.real_mode(0xFFFF, 0))
    with pytest.raises(measure.MeasurementError, match="ended with"):
        measure.ring0_speed(kvm)


def test_doctor_finds_this_host_usable() -> None:
    """Where this test runs there is a KVM: no check fails, and every capability has a value or is unknown."""
    report = probe()
    assert [check for check in report.checks if check.state == FAIL] == []
    assert report.usable
    assert [each.name for each in report.capabilities] == list(PURPOSES)
    names = [check.name for check in report.checks]
    assert {"device", "ring 0", "exit cost", "machine's life"} <= set(names)
