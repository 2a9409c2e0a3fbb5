"""Exit tracing with real guests: what is in the file is what the guest did."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from itertools import pairwise
from pathlib import Path

import command
import guests
import pytest
from realmode import HLT, in_al, machine, out_al, out_loop

from pykvm import Device
from pykvm._native import lib
from pykvm.debug.trace.exittrace import ExitTrace
from pykvm.debug.trace.tracefile import IN_C, LAST, Record, TraceFile
from pykvm.errors import DeviceError, UsageError

COUNT = 500


def trace(
    path: Path, name: str, cmdline: str = "", **options: object
) -> tuple[list[Record], TraceFile, dict[int, int]]:
    """Run a guest to its end: its records, the file, and the exits by reason that the vCPUs counted."""
    with guests.pc(name, cmdline, **options) as machine:  # type: ignore[arg-type]
        writer = machine.trace_exits(str(path))
        machine.run(guests.RUN_S)
        counts: Counter[int] = Counter()
        for vcpu in machine.vcpus:
            counts.update(vcpu.exit_counts())
        writer.close()
        assert writer.lost == 0
    file = TraceFile(path)
    records = list(file)
    assert file.problems == []
    assert len(records) == writer.written
    return records, file, dict(counts)


@pytest.mark.parametrize("ring", [0, 3])
def test_a_port_loop_is_recorded_exactly(tmp_path: Path, ring: int) -> None:
    """As many writes to the port as the guest makes, from one place in its code, of either privilege."""
    records, _, _ = trace(tmp_path / "t", "ring3.elf", f"port=0x5000 count={COUNT} ring={ring} size=2")
    loop = [record for record in records if record.address == 0x5000]
    assert len(loop) == COUNT
    assert {(record.size, record.write, record.value & 0xFF) for record in loop} == {(2, True, ord("."))}
    assert len({record.rip for record in loop}) == 1 and loop[0].rip > 0x100000
    assert all(record.left_ns >= before.left_ns + before.outside_ns for before, record in pairwise(records))


def test_all_reasons_are_those_that_were_counted(tmp_path: Path) -> None:
    """Every kind of exit of the guest `exits` is there as often as the vCPU counted it, those of C among them."""
    records, file, counts = trace(tmp_path / "t", "exits.elf", "hlt=0")
    assert Counter(record.reason for record in records) == counts
    assert any(record.flags & IN_C for record in records)
    assert file.meta["kernel"] == str(guests.IMAGES / "exits.elf")
    wide = [record for record in records if record.reason == lib.KVM_EXIT_MMIO and record.size == 8 and record.write]
    assert [record.value for record in wide] == [0xA55A123456789ABC]


def test_answers_to_reads_are_recorded(tmp_path: Path) -> None:
    """The value of a read is what the guest got, whether C or Python answered."""
    records, _, _ = trace(tmp_path / "t", "exits.elf", "hlt=0")
    unmapped = [record for record in records if record.address == 0x5000 and not record.write and record.elements == 1]
    assert [record.value for record in unmapped] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    status = [record for record in records if record.address == 0x3FD and record.flags & IN_C]
    assert status and all(record.value & 0x20 for record in status)


def test_every_vcpu_has_its_own_records(tmp_path: Path) -> None:
    """With four vCPUs each of them printed, and its records are in the order of time."""
    records, file, _ = trace(tmp_path / "t", "smp.elf", cpus=4)
    assert file.vcpus == 4
    assert {record.vcpu for record in records} == {0, 1, 2, 3}
    for vcpu in range(4):
        times = [record.left_ns for record in records if record.vcpu == vcpu]
        assert times == sorted(times)


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    """A tiny ring that nobody drains: the file says how many exits it misses."""
    with machine(out_loop(0x80, 100) + HLT) as vm:
        writer = ExitTrace(vm, str(tmp_path / "t"), ring_records=16)
        writer.drain = lambda: None  # type: ignore[method-assign]
        vm.run(guests.RUN_S)
        writer.close()
    file = TraceFile(tmp_path / "t")
    assert len(list(file)) == 16
    assert file.lost == writer.lost == 101 - 16


def test_a_reset_goes_on_in_the_same_file(tmp_path: Path) -> None:
    """The new KVM vCPUs after a reset are traced as well."""
    with guests.pc("ring3.elf", "count=10") as machine:
        with_reset = machine.trace_exits(str(tmp_path / "t"))
        machine.run(guests.RUN_S)
        machine.reset()
        machine.run(guests.RUN_S)
        with_reset.close()
    ports = Counter(record.address for record in TraceFile(tmp_path / "t"))
    assert ports[0x80] == 20 and ports[0xF4] == 2


class Broken(Device):
    """Raises at the first read, which is thus never answered."""

    name = "broken"
    answers = iter((None, 7))

    def read(self, offset: int, size: int) -> int:
        """The second one gives 7."""
        answer = next(self.answers)
        if answer is None:
            raise RuntimeError("broken")
        return answer


def test_a_read_without_an_answer_does_not_outlive_its_vcpu(tmp_path: Path) -> None:
    """A device that raised, a reset, a new run: the record of the first read has no answer, that of the second has."""
    with machine(in_al(0x80) + HLT) as vm:
        vm.attach(Broken(), ports=range(0x80, 0x81))
        state = vm.vcpus[0].capture_state()
        vm.trace_exits(str(tmp_path / "t"))
        with pytest.raises(DeviceError):
            vm.run(guests.RUN_S)
        vm.reset()
        vm.vcpus[0].load_state(state)
        assert vm.run(guests.RUN_S).kind == "HALTED"
    reads = [record for record in TraceFile(tmp_path / "t") if record.reason == lib.KVM_EXIT_IO]
    assert [(record.value, record.flags & LAST) for record in reads] == [(0, LAST), (7, 0)]


def test_off_again(tmp_path: Path) -> None:
    """After close() nothing is recorded, and KVM copies no registers any more."""
    with machine(out_al(0x80) + HLT) as vm:
        vm.trace_exits(str(tmp_path / "t")).close()
        assert vm.vcpus[0].state.run.kvm_valid_regs == 0
        vm.run(guests.RUN_S)
    assert list(TraceFile(tmp_path / "t")) == []


def test_a_full_disk_is_told_at_once() -> None:
    """/dev/full takes not even the header: refused with one line."""
    with machine(HLT) as vm, pytest.raises(UsageError, match="No space"):
        vm.trace_exits("/dev/full")


def test_a_disk_that_fills_up_ends_the_trace_not_the_guest(tmp_path: Path) -> None:
    """The guest ends as it would, and the trace says why it is short."""
    with machine(out_al(0x80) + HLT) as vm:
        writer = ExitTrace(vm, str(tmp_path / "t"))
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, writer._fd)
        os.close(full)
        assert vm.run(guests.RUN_S).kind == "HALTED"
        writer.close()
    assert "cut short: No space" in writer.text()


@pytest.mark.host
def test_the_command(tmp_path: Path) -> None:
    """start --trace says how many exits it wrote; trace stats reads them; a bad path is one line and status 2."""
    path = tmp_path / "t"
    done = command.start("--debug-exit", "--trace", path, guests.IMAGES / "ring3.elf", "--append", f"count={COUNT}")
    assert done.returncode == 1 and f"exits in {path}" in done.stderr
    stats: subprocess.CompletedProcess[str] = command.run("trace", "stats", path)
    assert stats.returncode == 0
    assert ["0x80", str(COUNT)] in [line.split()[:2] for line in stats.stdout.splitlines()]
    done = command.start("--trace", tmp_path / "none" / "t", guests.IMAGES / "hello.bin")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No such file" in done.stderr
