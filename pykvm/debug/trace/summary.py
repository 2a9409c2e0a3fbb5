"""Sums over an exit trace: reasons, ports, pages, code, latencies. Layer: debug, plain data."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from pykvm.debug.trace.describe import place
from pykvm.debug.trace.tracefile import IN_C, LAST
from pykvm.kvm.exits import reason_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pykvm.debug.trace.describe import Names
    from pykvm.debug.trace.tracefile import Record

ROWS = 10
BAR = 40
MAX_RIPS = 1 << 16  # a hostile guest exits at ever new places


class Total:
    """How often, and how long outside the guest."""

    __slots__ = ("count", "outside_ns")

    def __init__(self) -> None:
        self.count = 0
        self.outside_ns = 0


class Summary:
    """Feed it records by `add`; `text` and `as_dict` say what they add up to."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self.reasons: defaultdict[str, Total] = defaultdict(Total)
        self.places: defaultdict[tuple[str, int], Total] = defaultdict(Total)
        self.rips: Counter[int] = Counter()
        self.histogram: Counter[int] = Counter()  # bit length of the ns outside -> exits
        self.guest_ns = self.outside_ns = self.total = self.in_c = 0
        self.first_ns: int | None = None
        self.last_ns = 0

    def add_all(self, records: Iterable[Record]) -> None:
        """Add each of them."""
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Count one exit."""
        self.total += 1
        self.in_c += bool(record.flags & IN_C)
        self.guest_ns += record.guest_ns
        self.outside_ns += record.outside_ns
        began = record.left_ns - record.guest_ns
        self.first_ns = began if self.first_ns is None else min(self.first_ns, began)
        self.last_ns = max(self.last_ns, record.left_ns + record.outside_ns)
        totals = [self.reasons[reason_name(record.reason)]]
        if (where := place(record)) is not None and (where in self.places or len(self.places) < MAX_RIPS):
            totals.append(self.places[where])
        for total in totals:
            total.count += 1
            total.outside_ns += record.outside_ns
        if record.rip and (record.rip in self.rips or len(self.rips) < MAX_RIPS):
            self.rips[record.rip] += 1
        if not record.flags & LAST:
            self.histogram[record.outside_ns.bit_length()] += 1

    @property
    def span_ns(self) -> int:
        """From the first entry to the last exit."""
        return self.last_ns - (self.first_ns or 0) if self.total else 0

    # -- for people ---------------------------------------------------------------------------------------------

    def text(self, rows: int = ROWS) -> str:
        """Tables."""
        if not self.total:
            return "no exits\n"
        seconds = self.span_ns / 1e9
        lines = [
            f"{self.total} exits in {seconds:.6f} s ({self.total / seconds if seconds else 0:.0f}/s), "
            f"{self.in_c} answered in C",
            f"vCPU time: {self.guest_ns / 1e9:.6f} s in the guest, {self.outside_ns / 1e9:.6f} s outside",
            "",
            f"{'reason':<34} {'exits':>10} {'share':>7} {'us each':>9}",
        ]
        reasons = sorted(self.reasons.items(), key=lambda item: -item[1].count)
        lines += [self._row(name, total) for name, total in reasons]
        for kind, title in (("port", "ports"), ("page", "pages")):
            lines += self._places(kind, title, rows)
        if self.rips:
            lines += ["", f"{'code':<34} {'exits':>10} {'share':>7}"]
            for rip, count in self._functions().most_common(rows):
                lines.append(f"  {rip[:32]:<32} {count:>10} {count / self.total:>7.1%}")
        return "\n".join([*lines, "", *self._histogram_rows(), ""])

    def _row(self, name: str, total: Total) -> str:
        each = total.outside_ns / total.count / 1000
        return f"  {name[:32]:<32} {total.count:>10} {total.count / self.total:>7.1%} {each:>9.2f}"

    def _places(self, kind: str, title: str, rows: int) -> list[str]:
        found = [(address, total) for (own, address), total in self.places.items() if own == kind]
        if not found:
            return []
        found.sort(key=lambda item: (-item[1].count, item[0]))
        lines = ["", f"{title:<34} {'exits':>10} {'share':>7} {'us each':>9}"]
        for address, total in found[:rows]:
            device = self._names.device("port" if kind == "port" else "MMIO", address)
            lines.append(f"{self._row(hex(address), total)}  {device}".rstrip())
        if len(found) > rows:
            lines.append(f"  and {len(found) - rows} more")
        return lines

    def _functions(self) -> Counter[str]:
        functions: Counter[str] = Counter()
        for rip, count in self.rips.items():
            functions[self._names.code(rip)] += count
        return functions

    def _histogram_rows(self) -> list[str]:
        if not self.histogram:
            return []
        lines = ["time outside the guest, by exits"]
        most = max(self.histogram.values())
        for bits in range(min(self.histogram), max(self.histogram) + 1):
            count = self.histogram[bits]
            bar = "#" * round(BAR * count / most)
            lines.append(f"  {_time(1 << bits >> 1):>8} to {_time(1 << bits):>8} {count:>10}  {bar}".rstrip())
        return lines

    # -- for programs -------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, object]:
        """The same as data; times in ns."""

        def rows(kind: str, space: str) -> list[dict[str, object]]:
            return [
                {"address": hex(address), "name": self._names.device(space, address), **_as_dict(total)}
                for (own, address), total in sorted(self.places.items(), key=lambda item: -item[1].count)
                if own == kind
            ]

        return {
            "exits": self.total,
            "in_c": self.in_c,
            "span_ns": self.span_ns,
            "guest_ns": self.guest_ns,
            "outside_ns": self.outside_ns,
            "reasons": {name: _as_dict(total) for name, total in self.reasons.items()},
            "ports": rows("port", "port"),
            "pages": rows("page", "MMIO"),
            "code": [
                {"rip": hex(rip), "name": self._names.code(rip), "exits": n} for rip, n in self.rips.most_common()
            ],
            "outside_histogram_ns": {str(1 << bits): count for bits, count in sorted(self.histogram.items())},
        }


def _as_dict(total: Total) -> dict[str, int]:
    return {"exits": total.count, "outside_ns": total.outside_ns}


def _time(ns: int) -> str:
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns} ns"
