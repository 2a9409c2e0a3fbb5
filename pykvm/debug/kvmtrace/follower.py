"""What followed processes do with KVM: one line for each ioctl, and sums. Layer: debug."""

from __future__ import annotations

import errno
import os
from collections import Counter
from typing import TYPE_CHECKING

from pykvm._native import ffi, lib
from pykvm.debug.kvmtrace.ioctls import argument, find, is_kvm
from pykvm.debug.trace.describe import describe
from pykvm.debug.trace.tracefile import WRITE, Record
from pykvm.kvm.exits import reason_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm._native import CData
    from pykvm.debug.kvmtrace.tracer import Task

NR_IOCTL, NR_MMAP = getattr(lib, "__NR_ioctl"), getattr(lib, "__NR_mmap")
RUN_SIZE = ffi.sizeof("struct kvm_run")
MAX_PLACES = 4096


class Process:
    """A followed process: its memory, and where the kvm_run of each vCPU is mapped."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._memory: int | None = None
        self._runs: dict[int, int] = {}  # fd of a vCPU -> address

    def read(self, address: int, size: int) -> bytes:
        """Bytes of its memory, fewer where it ends."""
        try:
            if self._memory is None:
                self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._memory, size, address)
        except (OSError, OverflowError):
            return b""

    def close(self) -> None:
        """Forget its memory (it ended, or became another program)."""
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None
        self._runs.clear()

    def name_of(self, fd: int) -> str:
        """What a descriptor is: "kvm", "kvm-vm", "kvm-vcpu:0", ...; "?" when it is closed."""
        try:
            return os.path.basename(os.readlink(f"/proc/{self.pid}/fd/{fd}").removeprefix("anon_inode:"))
        except OSError:
            return "?"

    def on_mmap(self, fd: int, address: int) -> None:
        """Note the kvm_run of a vCPU."""
        if self.name_of(fd).startswith("kvm-vcpu"):
            self._runs[fd] = address

    def run_of(self, fd: int) -> int | None:
        """Where the kvm_run of a vCPU is. One mapped before we came is found by its name, if that is unique."""
        if fd not in self._runs:
            name = f"anon_inode:{self.name_of(fd)}"
            found: set[int] = set()
            try:
                with open(f"/proc/{self.pid}/maps", encoding="utf-8", errors="replace") as file:
                    found = {int(line.partition("-")[0], 16) for line in file if line.rstrip().endswith(name)}
            except OSError:
                pass
            if len(found) != 1:
                return None
            self._runs[fd] = found.pop()
        return self._runs[fd]


class Calls:
    """The sums of one ioctl."""

    __slots__ = ("count", "errors", "seconds")

    def __init__(self) -> None:
        self.count = self.errors = 0
        self.seconds = 0.0


class Follower:
    """`on_syscall` and `on_exec` are for a Tracer. `say` gets a line for each ioctl; None for sums alone."""

    def __init__(self, say: Callable[[str], object] | None, *, runs: bool = True) -> None:
        self._say = say
        self._runs = runs
        self._processes: dict[int, Process] = {}
        self.calls: dict[str, Calls] = {}
        self.reasons: Counter[str] = Counter()
        self.exits: Counter[str] = Counter()  # exits without their values

    def process(self, pid: int) -> Process:
        """The process of that number."""
        if pid not in self._processes:
            self._processes[pid] = Process(pid)
        return self._processes[pid]

    def on_exec(self, pid: int) -> None:
        """A process has become another program."""
        self.process(pid).close()

    def close(self) -> None:
        """Close what is open of the processes' memory."""
        for process in self._processes.values():
            process.close()

    def on_syscall(self, task: Task, number: int, arguments: tuple[int, ...], result: int, seconds: float) -> None:
        """A system call has returned."""
        if number == NR_IOCTL and is_kvm(arguments[1]):
            self._on_ioctl(task, arguments, result, seconds)
        elif number == NR_MMAP and result > 0 and arguments[4] < 1 << 31:
            self.process(task.pid).on_mmap(arguments[4], result)

    def _on_ioctl(self, task: Task, arguments: tuple[int, ...], result: int, seconds: float) -> None:
        process, fd, ioctl = self.process(task.pid), arguments[0] & 0xFFFFFFFF, find(arguments[1])
        calls = self.calls.setdefault(ioctl.name, Calls())
        calls.count += 1
        calls.errors += result < 0
        calls.seconds += seconds
        run = ioctl.number == lib.KVM_RUN
        ending = self._exit_of(process, fd, result) if run else ""
        if self._say is None or (run and not self._runs):
            return
        words = ending if run else argument(ioctl, arguments[2], process.read)
        self._say(
            f"[{task.tid}] {ioctl.name}({fd}<{process.name_of(fd)}>{f', {words}' if words and not run else ''}) = "
            f"{_result(result)}{f' -> {words}' if run else ''} <{seconds:.6f}>"
        )

    def _exit_of(self, process: Process, fd: int, result: int) -> str:
        """Count the exit that ended a KVM_RUN; it in words."""
        if result < 0:
            name = text = errno.errorcode.get(-result, str(-result))
        else:
            record = read_exit(process, fd)
            if record is None:
                name = text = "(its kvm_run was not found)"
            else:
                name, text = reason_name(record.reason), describe(record)
        self.reasons[name] += 1
        place = text.partition(" = ")[0]
        if place in self.exits or len(self.exits) < MAX_PLACES:
            self.exits[place] += 1
        return text


def _result(result: int) -> str:
    if result >= 0:
        return str(result)
    return f"-1 {errno.errorcode.get(-result, -result)} ({os.strerror(-result)})"


def read_exit(process: Process, fd: int) -> Record | None:
    """The last exit of a vCPU of another process, by its kvm_run."""
    at = process.run_of(fd)
    data = process.read(at, RUN_SIZE) if at is not None else b""
    if at is None or len(data) < RUN_SIZE:
        return None
    run = ffi.new("struct kvm_run *")
    ffi.memmove(run, data, RUN_SIZE)
    fields = dict.fromkeys(Record._fields, 0) | {"reason": run.exit_reason, "elements": 1}
    if run.exit_reason == lib.KVM_EXIT_IO:
        size = min(run.io.size * run.io.count, 8)
        fields |= {"address": run.io.port, "size": run.io.size, "elements": run.io.count}
        fields |= _moved(run.io.direction == lib.KVM_EXIT_IO_OUT, process.read(at + run.io.data_offset, size))
    elif run.exit_reason == lib.KVM_EXIT_MMIO:
        size = min(run.mmio.len, 8)
        fields |= {"address": run.mmio.phys_addr, "size": size}
        fields |= _moved(run.mmio.is_write, bytes(run.mmio.data)[:size])
    else:
        fields |= _details(run)
    return Record(**fields)


def _moved(write: bool, data: bytes) -> dict[str, int]:
    """An access; the value of a read is not known yet when KVM_RUN returns."""
    return {"flags": WRITE, "value": int.from_bytes(data, "little")} if write else {}


def _details(run: CData) -> dict[str, int]:
    reason = run.exit_reason
    if reason in (lib.KVM_EXIT_X86_RDMSR, lib.KVM_EXIT_X86_WRMSR):
        return {"address": run.msr.index, "value": run.msr.data}
    facts = {
        lib.KVM_EXIT_HYPERCALL: lambda: run.hypercall.nr,
        lib.KVM_EXIT_SYSTEM_EVENT: lambda: run.system_event.type,
        lib.KVM_EXIT_INTERNAL_ERROR: lambda: run.internal.suberror,
        lib.KVM_EXIT_FAIL_ENTRY: lambda: run.fail_entry.hardware_entry_failure_reason,
        lib.KVM_EXIT_IOAPIC_EOI: lambda: run.eoi.vector,
        lib.KVM_EXIT_DEBUG: lambda: run.debug.arch.pc,
    }
    return {"address": facts[reason]()} if reason in facts else {}


# -- sums --------------------------------------------------------------------------------------------------------


def summary_text(follower: Follower, rows: int = 15) -> str:
    """Tables: ioctls by time, exits by reason, the most frequent exits."""
    calls = sorted(follower.calls.items(), key=lambda item: -item[1].seconds)
    if not calls:
        return "no KVM ioctl was seen\n"
    whole = sum(each.seconds for _, each in calls) or 1
    lines = [f"{'ioctl':<34} {'calls':>9} {'errors':>7} {'seconds':>11} {'share':>7} {'us/call':>10}"]
    for name, each in calls:
        lines.append(
            f"  {name:<32} {each.count:>9} {each.errors or '':>7} {each.seconds:>11.6f} {each.seconds / whole:>7.1%} "
            f"{each.seconds / each.count * 1e6:>10.1f}"
        )
    lines.append("  (with what following costs: two stops of the thread for every system call)")
    if total := follower.reasons.total():
        lines += ["", f"{'KVM_RUN ended by':<34} {'times':>9} {'share':>7}"]
        lines += [f"  {name:<32} {n:>9} {n / total:>7.1%}" for name, n in follower.reasons.most_common()]
        lines += ["", f"{'most frequent exits':<34} {'times':>9}"]
        lines += [f"  {name:<32} {n:>9}" for name, n in follower.exits.most_common(rows)]
    return "\n".join(lines) + "\n"


def summary_dict(follower: Follower) -> dict[str, object]:
    """The same as data."""
    return {
        "ioctls": {
            name: {"calls": each.count, "errors": each.errors, "seconds": each.seconds}
            for name, each in follower.calls.items()
        },
        "reasons": dict(follower.reasons.most_common()),
        "exits": dict(follower.exits.most_common()),
    }
