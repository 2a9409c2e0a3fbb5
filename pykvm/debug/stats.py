"""Exit statistics, for --stats: what made the guest leave, and where the time went. Layer: debug, plain data."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pykvm.core.machine import Machine
    from pykvm.core.vcpu import Vcpu

    Access = tuple[int, int]  # reads, writes

ROWS = 16  # addresses shown by `text`; `as_dict` has all


class ExitStats:
    """Exits of a run, of one vCPU or (merged) of all.

    reasons     exits by reason name (IO, MMIO, HLT, ...), those that C answered included
    ports       accesses by port: (reads, writes)
    mmio        accesses by guest physical address: (reads, writes)
    lost        accesses to further addresses, when there were too many different ones to count each
    guest_ns    time inside KVM_RUN, summed over vCPUs
    outside_ns  time between two KVM_RUNs, summed over vCPUs
    names       what is at an address: {("port", 0x3f8): "COM1", ("MMIO", 0xfee00000): ...}
    """

    __slots__ = ("guest_ns", "lost", "mmio", "names", "outside_ns", "ports", "reasons")

    def __init__(
        self,
        *,
        reasons: Mapping[str, int] | None = None,
        ports: Mapping[int, Access] | None = None,
        mmio: Mapping[int, Access] | None = None,
        lost: int = 0,
        guest_ns: int = 0,
        outside_ns: int = 0,
        names: Mapping[tuple[str, int], str] | None = None,
    ) -> None:
        self.reasons = dict(reasons or {})
        self.ports = dict(ports or {})
        self.mmio = dict(mmio or {})
        self.lost = lost
        self.guest_ns = guest_ns
        self.outside_ns = outside_ns
        self.names = dict(names or {})

    def merge(self, other: ExitStats) -> None:
        """Add the figures of another vCPU."""
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        for mine, theirs in ((self.ports, other.ports), (self.mmio, other.mmio)):
            for address, (reads, writes) in theirs.items():
                old = mine.get(address, (0, 0))
                mine[address] = (old[0] + reads, old[1] + writes)
        self.lost += other.lost
        self.guest_ns += other.guest_ns
        self.outside_ns += other.outside_ns
        self.names.update(other.names)

    @property
    def total(self) -> int:
        """All exits."""
        return sum(self.reasons.values())

    @property
    def time_ns(self) -> int:
        """Time inside and outside the guest together: vCPU time, not wall time, when there are several vCPUs."""
        return self.guest_ns + self.outside_ns

    @property
    def exits_per_second(self) -> float:
        """Exits per second of vCPU time; 0 if no time was measured."""
        return self.total * 1e9 / self.time_ns if self.time_ns else 0.0

    @property
    def outside_ns_per_exit(self) -> float:
        """Mean time from an exit to the next entry; 0 without exits."""
        return self.outside_ns / self.total if self.total else 0.0

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON; addresses are hexadecimal strings."""
        return {
            "exits": self.total,
            "reasons": dict(_ordered(self.reasons)),
            "ports": [self._access_dict("port", *each) for each in _by_count(self.ports)],
            "mmio": [self._access_dict("MMIO", *each) for each in _by_count(self.mmio)],
            "lost": self.lost,
            "guest_ns": self.guest_ns,
            "outside_ns": self.outside_ns,
            "exits_per_second": round(self.exits_per_second, 1),
            "outside_ns_per_exit": round(self.outside_ns_per_exit, 1),
        }

    def _access_dict(self, space: str, address: int, access: Access) -> dict[str, object]:
        reads, writes = access
        return {"address": hex(address), "name": self._name(space, address), "reads": reads, "writes": writes}

    def _name(self, space: str, address: int) -> str:
        return self.names.get((space, address), "")

    def text(self, rows: int = ROWS) -> str:
        """A table for people: reasons, then the `rows` busiest addresses of each kind, then the time."""
        lines = ["exits by reason", *_reason_rows(self.reasons, self.total)]
        for title, space, table in (("ports", "port", self.ports), ("MMIO", "MMIO", self.mmio)):
            if table:
                lines += ["", *self._access_rows(title, space, table, rows)]
        if self.lost:
            lines += ["", f"  {self.lost} accesses to further addresses are not listed"]
        lines += ["", *self._time_rows()]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.text()

    def _access_rows(self, title: str, space: str, table: Mapping[int, Access], rows: int) -> list[str]:
        ordered = _by_count(table)
        lines = [f"{title:<22} {'reads':>12} {'writes':>12}"]
        for address, (reads, writes) in ordered[:rows]:
            lines.append(
                f"  {address:#x}".ljust(22) + f" {reads:>12} {writes:>12}  {self._name(space, address)}".rstrip()
            )
        rest = ordered[rows:]
        if rest:
            reads, writes = (sum(access[side] for _, access in rest) for side in (0, 1))
            lines.append(f"  {len(rest)} others".ljust(22) + f" {reads:>12} {writes:>12}")
        return lines

    def _time_rows(self) -> list[str]:
        if not self.time_ns:
            return ["time was not measured"]
        lines = [f"{'vCPU time':<22} {'seconds':>12} {'share':>12}"]
        for name, value in (("in the guest", self.guest_ns), ("outside", self.outside_ns)):
            lines.append(f"  {name:<20} {value / 1e9:>12.6f} {value / self.time_ns:>12.1%}")
        lines.append(
            f"  {self.exits_per_second:.0f} exits/s, {self.outside_ns_per_exit / 1000:.2f} us outside per exit"
        )
        return lines


def collect_stats(machine: Machine) -> ExitStats:
    """The figures of all vCPUs since the start or last reset; addresses and times only with config.stats."""
    total = ExitStats()
    for vcpu in machine.vcpus:
        total.merge(_vcpu_stats(vcpu))
    for space, table in ((machine.bus.ports, total.ports), (machine.bus.mmio, total.mmio)):
        total.names |= {(space.name, address): space.describe(address) for address in table}
    return total


def _vcpu_stats(vcpu: Vcpu) -> ExitStats:
    from pykvm._native import lib
    from pykvm.kvm.exits import reason_name

    state = vcpu.state
    stats = ExitStats(
        reasons={reason_name(reason): count for reason, count in vcpu.exit_counts().items()},
        lost=state.stats_lost,
        guest_ns=state.guest_ns,
        outside_ns=state.outside_ns,
    )
    for slot in range(lib.PK_STAT_SLOTS if state.stats_enabled else 0):
        entry = state.stats[slot]
        if entry.reads or entry.writes:
            table = stats.mmio if entry.mmio else stats.ports
            table[entry.address] = (entry.reads, entry.writes)
    return stats


def _ordered(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _by_count(table: Mapping[int, Access]) -> list[tuple[int, Access]]:
    return sorted(table.items(), key=lambda item: (-sum(item[1]), item[0]))


def _reason_rows(reasons: Mapping[str, int], total: int) -> list[str]:
    if not total:
        return ["  none"]
    rows = [f"  {name:<20} {count:>12} {count / total:>12.1%}" for name, count in _ordered(reasons)]
    return [*rows, f"  {'all':<20} {total:>12}"] if len(rows) > 1 else rows
