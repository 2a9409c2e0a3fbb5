"""Exit statistics: sums, rates, and what is shown of them."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from pykvm.debug.stats import ExitStats

NAMES = {("port", 0x3F8): "COM1", ("MMIO", 0xD0000000): "virtio-blk"}


def sample() -> ExitStats:
    """Two vCPUs' worth of exits."""
    stats = ExitStats(
        reasons={"IO": 900, "MMIO": 90, "HLT": 10},
        ports={0x3F8: (0, 800), 0x80: (0, 100)},
        mmio={0xD0000000: (60, 30)},
        guest_ns=3_000_000,
        outside_ns=1_000_000,
        names=NAMES,
    )
    stats.merge(ExitStats(reasons={"IO": 100}, ports={0x3F8: (5, 95)}, guest_ns=1_000_000, lost=7))
    return stats


def test_merge_adds_up() -> None:
    """Merging adds reasons, accesses, times and what was lost."""
    stats = sample()
    assert stats.reasons == {"IO": 1000, "MMIO": 90, "HLT": 10}
    assert stats.ports == {0x3F8: (5, 895), 0x80: (0, 100)}
    assert (stats.total, stats.time_ns, stats.lost) == (1100, 5_000_000, 7)


def test_rates() -> None:
    """Rates are per vCPU time and per exit."""
    stats = sample()
    assert stats.exits_per_second == 1100 / 0.005
    assert stats.outside_ns_per_exit == 1_000_000 / 1100


def test_nothing_measured() -> None:
    """A run without exits and without time divides by nothing."""
    stats = ExitStats()
    assert (stats.exits_per_second, stats.outside_ns_per_exit) == (0.0, 0.0)
    assert "none" in stats.text()
    assert "not measured" in stats.text()
    assert stats.as_dict()["exits"] == 0


def test_text_has_counts_shares_and_names() -> None:
    """The table orders by count and names devices."""
    lines = sample().text().splitlines()
    assert lines[1].split() == ["IO", "1000", "90.9%"]
    assert [line.split() for line in lines if "COM1" in line] == [["0x3f8", "5", "895", "COM1"]]
    assert any("7 accesses to further addresses" in line for line in lines)
    assert any(line.split()[-1:] == ["80.0%"] for line in lines)
    assert max(map(len, lines)) <= 80


def test_text_sums_up_the_rest() -> None:
    """Addresses beyond the wanted rows become one line with their sum."""
    stats = ExitStats(reasons={"IO": 55}, ports={port: (port, 1) for port in range(10)})
    rows = [line.split() for line in stats.text(rows=4).splitlines()]
    assert ["0x9", "9", "1"] in rows
    assert ["6", "others", "15", "6"] in rows
    assert ["0x0", "0", "1"] not in rows


def test_dict_is_json_and_complete() -> None:
    """as_dict() survives JSON and has every address, named where it has a name."""
    data = json.loads(json.dumps(sample().as_dict()))
    assert data["exits"] == 1100
    assert data["ports"][0] == {"address": "0x3f8", "name": "COM1", "reads": 5, "writes": 895}
    assert data["mmio"][0]["name"] == "virtio-blk"
    assert list(data["reasons"]) == ["IO", "MMIO", "HLT"]


accesses = st.dictionaries(
    st.integers(0, 2**64 - 1), st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=40
)


@given(accesses, accesses, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_any_figures_print(
    ports: dict[int, tuple[int, int]],
    mmio: dict[int, tuple[int, int]],
    guest_ns: int,
    outside_ns: int,
) -> None:
    """Figures of any size print and serialise; the number of rows stays bounded."""
    stats = ExitStats(reasons={"IO": len(ports)}, ports=ports, mmio=mmio, guest_ns=guest_ns, outside_ns=outside_ns)
    assert len(stats.text(rows=5).splitlines()) <= 24
    json.dumps(stats.as_dict())
