"""Finds the virtual machines of this host and measures them from outside, whatever VMM runs them. Layer: control.

A process that has a KVM VM open is a machine. The kernel counts the time of each thread in the guest (proc(5),
/proc/PID/task/TID/stat, guest_time); a pykvm adds its exits by reason (control.status); of others they are known
where KVM's debugfs can be read. Processes of other users show nothing to anybody but root.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pykvm.control import status

if TYPE_CHECKING:
    from typing import Any

TICKS_S = os.sysconf("SC_CLK_TCK")
KVM_DEBUG = "/sys/kernel/debug/kvm"
# KVM's own counters for a VM (Documentation/virt/kvm, debugfs) -> the reason they are about
DEBUG_COUNTERS = {"io_exits": "IO", "mmio_exits": "MMIO", "halt_exits": "HLT", "irq_exits": "interrupt", "exits": "all"}
UTIME, STIME, GUEST_TIME = 11, 12, 40  # fields of stat behind the command name: proc(5) numbers minus 3


@dataclass
class Sample:
    """One machine at one moment; counters since its start."""

    pid: int
    name: str
    command: str
    at: float = 0.0
    vcpus: int = 0
    cpu_s: float = 0.0  # of all its threads, the guest's included
    guest_s: float = 0.0
    rss: int = 0
    memory: int | None = None  # of the guest, where known
    read_bytes: int = 0
    written_bytes: int = 0
    rx_bytes: int | None = None  # to the guest; None: no network that can be measured
    tx_bytes: int | None = None
    exits: dict[str, int] = field(default_factory=dict)
    is_pykvm: bool = False
    kernel: str | None = None


def scan(proc: str = "/proc", debug: str = KVM_DEBUG) -> list[Sample]:
    """Every machine that may be looked at."""
    status.tidy()
    found = []
    for name in _listdir(proc):
        if name.isdigit() and (links := _links(f"{proc}/{name}")) and "anon_inode:kvm-vm" in links.values():
            sample = _measure(f"{proc}/{name}", int(name), links, debug)
            if sample is not None:
                found.append(sample)
    return sorted(found, key=lambda each: each.pid)


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _links(folder: str) -> dict[str, str]:
    """What the descriptors of a process are; {} for one that we may not look at."""
    found = {}
    for fd in _listdir(f"{folder}/fd"):
        try:
            found[fd] = os.readlink(f"{folder}/fd/{fd}")
        except OSError:
            continue
    return found


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _measure(folder: str, pid: int, links: dict[str, str], debug: str) -> Sample | None:
    command = _read(f"{folder}/cmdline").replace("\0", " ").strip()
    sample = Sample(pid, _read(f"{folder}/comm").strip(), command, at=time.monotonic())
    threads = [_times(_read(f"{folder}/task/{tid}/stat")) for tid in _listdir(f"{folder}/task")]
    if not threads:
        return None  # it has ended
    sample.cpu_s = sum(cpu for cpu, _ in threads)
    sample.guest_s = sum(guest for _, guest in threads)
    sample.vcpus = len({name for name in links.values() if re.fullmatch(r"anon_inode:kvm-vcpu:\d+", name)})
    sample.rss = _number(_read(f"{folder}/status"), r"VmRSS:\s+(\d+) kB") * 1024
    counters = _read(f"{folder}/io")
    sample.read_bytes = _number(counters, r"(?m)^read_bytes: (\d+)")
    sample.written_bytes = _number(counters, r"(?m)^write_bytes: (\d+)")
    _add_network(sample, folder, links)
    if (told := status.ask(pid)) is not None:
        _add_told(sample, told)
    elif not sample.exits:
        sample.exits = _debug_counters(debug, pid)
    return sample


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _times(stat: str) -> tuple[float, float]:
    """(seconds of a thread, those in the guest among them) of its stat line."""
    words = stat.rpartition(")")[2].split()
    try:
        return (int(words[UTIME]) + int(words[STIME])) / TICKS_S, int(words[GUEST_TIME]) / TICKS_S
    except (IndexError, ValueError):
        return 0.0, 0.0


def _add_network(sample: Sample, folder: str, links: dict[str, str]) -> None:
    """The traffic of its taps, whose names are in fdinfo; what a tap receives the guest has sent."""
    for fd, link in links.items():
        if link != "/dev/net/tun":
            continue
        interface = re.search(r"(?m)^iff:\s*([^\s/]+)$", _read(f"{folder}/fdinfo/{fd}"))
        if interface is not None:
            base = f"/sys/class/net/{interface[1]}/statistics"
            sample.rx_bytes = (sample.rx_bytes or 0) + _number(_read(f"{base}/tx_bytes"), r"(\d+)")
            sample.tx_bytes = (sample.tx_bytes or 0) + _number(_read(f"{base}/rx_bytes"), r"(\d+)")


def _add_told(sample: Sample, told: dict[str, Any]) -> None:
    """What a pykvm says of itself; it is another process, so nothing of it is taken for granted."""
    sample.is_pykvm = True
    kernel, memory = told.get("kernel"), told.get("memory")
    sample.kernel = kernel if isinstance(kernel, str) else None
    sample.memory = memory if isinstance(memory, int) else None
    for vcpu in _dicts(told.get("vcpus")):
        exits = vcpu.get("exits")
        for reason, count in exits.items() if isinstance(exits, dict) else ():
            if isinstance(count, int):
                sample.exits[reason] = sample.exits.get(reason, 0) + count
    for net in _dicts(told.get("nets")):
        if sample.rx_bytes is None and isinstance(net.get("rx"), int) and isinstance(net.get("tx"), int):
            sample.rx_bytes, sample.tx_bytes = net["rx"], net["tx"]


def _dicts(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _debug_counters(debug: str, pid: int) -> dict[str, int]:
    """KVM's counters of a foreign machine, where debugfs is mounted and readable (root)."""
    found: dict[str, int] = {}
    for name in _listdir(debug):
        if not name.startswith(f"{pid}-"):
            continue
        for counter, reason in DEBUG_COUNTERS.items():
            text = _read(f"{debug}/{name}/{counter}").strip()
            if text.isdigit():
                found[reason] = found.get(reason, 0) + int(text)
    whole = found.pop("all", None)
    if whole is not None:
        found["other"] = max(0, whole - sum(found.values()))
    return found


def rates(before: Sample, after: Sample) -> dict[str, object]:
    """What happened between two samples of a machine, per second; CPU in CPUs (1.0: one CPU all the time)."""
    seconds = max(after.at - before.at, 1e-6)

    def rate(new: float | None, old: float | None) -> float | None:
        return None if new is None else max(0.0, new - (old or 0)) / seconds

    guest = rate(after.guest_s, before.guest_s) or 0.0
    exits = {reason: rate(count, before.exits.get(reason)) for reason, count in after.exits.items()}
    return {
        "pid": after.pid,
        "name": after.name,
        "command": after.command,
        "pykvm": after.is_pykvm,
        "kernel": after.kernel,
        "vcpus": after.vcpus,
        "guest_cpus": guest,
        "outside_cpus": max(0.0, (rate(after.cpu_s, before.cpu_s) or 0.0) - guest),
        "exits_per_s": exits if after.exits else None,
        "rss": after.rss,
        "memory": after.memory,
        "disk_read_bytes_per_s": rate(after.read_bytes, before.read_bytes),
        "disk_written_bytes_per_s": rate(after.written_bytes, before.written_bytes),
        "net_rx_bytes_per_s": rate(after.rx_bytes, before.rx_bytes),
        "net_tx_bytes_per_s": rate(after.tx_bytes, before.tx_bytes),
    }
