"""Snapshots in memory: forks that share nothing that they wrote, and machines that are put back."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import guests
import pytest
from cguest import build

from pykvm import Device, Machine, MachineStateError, Outcome, Pc, SnapshotError
from pykvm._native import ffi, lib
from pykvm.core import reaper
from pykvm.core.state import U8, Shape
from pykvm.virtio.blk import Disk
from pykvm.virtio.mmio import VirtioMmio
from pykvm.virtio.rng import Rng

SOURCE = r"""
static volatile u64 counter; static volatile u8 pages[64 * 4096];
static void number(u64 value) { if (value > 9) number(value / 10); put('0' + value % 10); }
void kmain(void) {
    print("ready\n");
    for (;;) {
        char command = get();
        counter++;
        if (command == 'w') for (int i = 0; i < 64; i++) pages[i * 4096] = counter;
        number(counter); put(','); number(pages[9 * 4096]); print(";\n");
    }
}
"""


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A guest that counts the characters it gets; `w` also writes the count into 64 pages."""
    return build(tmp_path_factory.mktemp("guest"), SOURCE)


@pytest.fixture(params=[("kernel", True), ("kernel", False), ("split", True), ("none", True)])
def vm(guest: str, request: pytest.FixtureRequest) -> Iterator[Pc]:
    """It has got two characters."""
    irqchip, memfd = request.param
    with Pc(guest, memory="32M", irqchip=irqchip, memfd=memfd) as machine:
        machine.console.expect("ready")
        assert say(machine, "w") == "1,1"
        assert say(machine, "a") == "2,1"
        yield machine


def say(machine: Machine, text: str) -> str:
    """Send one character; the guest's answer."""
    machine.console.send(text)
    return machine.console.expect(r"(\d+,\d+);").group(1)


def test_forks_see_nothing_of_each_other(vm: Pc) -> None:
    """Parent, two forks and a fork of a fork go on from the same state, each alone, whoever writes first."""
    with vm.fork() as first, vm.fork() as second:
        assert say(vm, "w") == "3,3"
        assert say(first, "a") == "3,1"
        assert say(first, "w") == "4,4"
        with first.fork() as third:
            assert say(second, "a") == "3,1"
            assert say(third, "a") == "5,4"
            assert say(first, "w") == "5,5"
            assert say(third, "a") == "6,4"
        assert say(second, "a") == "4,1"


def test_restore_puts_back_the_same_machine(vm: Pc) -> None:
    """A machine goes back to its snapshot as often as wanted, and to an older one as well."""
    old = vm.snapshot()
    for _ in range(3):
        assert say(vm, "w") == "3,3"
        vm.restore(old)
    assert say(vm, "w") == "3,3"
    new = vm.snapshot()
    assert say(vm, "w") == "4,4"
    vm.restore(old)
    assert say(vm, "a") == "3,1"
    vm.restore(new)
    assert say(vm, "a") == "4,3"


def test_restore_takes_back_what_the_host_wrote(vm: Pc) -> None:
    """Memory written by the API between two runs goes back as well, wherever it is."""
    snapshot = vm.snapshot()
    before = vm.memory[0x9000:0x9004]
    vm.memory.write(0x9000, b"host")
    vm.memory.fill(20 << 20, 1 << 20, 0xAA)
    with vm.fork() as child:
        assert child.memory[0x9000:0x9004] == b"host"
        assert child.memory.read((20 << 20) + 77, 3) == b"\xaa" * 3
    vm.restore(snapshot)
    assert vm.memory[0x9000:0x9004] == before
    assert not any(vm.memory.read(20 << 20, 1 << 20))


def test_a_snapshot_outlives_its_machine(guest: str) -> None:
    """A machine that is closed can still be continued from its snapshot, by one of its forks."""
    with Pc(guest, memory="32M", memfd=True) as parent:
        parent.console.expect("ready")
        snapshot = parent.snapshot()
        child = parent.fork(snapshot)
    with child:
        assert say(child, "a") == "1,0"
        child.restore(snapshot)
        assert say(child, "w") == "1,1"


def test_many_scattered_pages(guest: str) -> None:
    """A second snapshot of a machine that wrote all over its memory is right, too (its layers are flattened)."""
    with Pc(guest, memory="64M", memfd=True) as parent:
        parent.console.expect("ready")
        parent.snapshot()
        places = range(8 << 20, 60 << 20, 256 << 10)
        for gpa in places:
            parent.memory.write_uint(gpa, 4, gpa)
        with parent.fork() as child, child.fork() as grandchild:
            assert all(grandchild.memory.read_u32(gpa) == gpa for gpa in places)
            assert say(grandchild, "a") == "1,0"


class Latch(Device):
    """Remembers a byte."""

    name = "latch"
    shape = Shape(1, value=U8)

    def __init__(self) -> None:
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        self._value = value


def test_a_device_of_the_caller(vm: Pc) -> None:
    """The caller's own devices are part of a snapshot; a fork gets them from `attach`, and says so if it does not."""
    latch = Latch()
    vm.attach(latch, ports=range(0x700, 0x701))
    latch.write(0, 1, 0x5A)
    snapshot = vm.snapshot()
    latch.write(0, 1, 1)
    with pytest.raises(SnapshotError, match="latch at port 0x700 is in the snapshot, but not in the machine"):
        vm.fork(snapshot)
    copy = Latch()
    with vm.fork(snapshot, attach=lambda child: child.attach(copy, ports=range(0x700, 0x701))):
        assert copy.read(0, 1) == 0x5A
    vm.restore(snapshot)
    assert latch.read(0, 1) == 0x5A


def test_a_snapshot_of_another_machine(guest: str) -> None:
    """A machine of another shape refuses a snapshot and goes on as it was."""
    with Pc(guest, memory="32M") as one, Pc(guest, memory="33M") as other:
        one.console.expect("ready")
        with pytest.raises(SnapshotError, match="slots"):
            one.restore(other.snapshot())
        assert say(one, "a") == "1,0"


def test_from_inside_an_instruction(guest: str) -> None:
    """A device cannot snapshot the machine whose access it is answering: that is an error, not a deadlock."""
    seen: list[str] = []

    class Inside(Device):
        def write(self, offset: int, size: int, value: int) -> None:
            try:
                machine.snapshot()
            except MachineStateError as error:
                seen.append(str(error))

    from realmode import CLI_HLT, mov_al, out_al
    from realmode import machine as bare

    with bare(mov_al(1) + out_al(0x70) + CLI_HLT) as machine:
        machine.attach(Inside(), ports=range(0x70, 0x71))
        machine.run(timeout=10)
    assert len(seen) == 1 and "another thread" in seen[0]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """16 MiB of zeroes."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(16 << 20))
    return path


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("mode", ["count=150 irq=1", "count=1500"])
def test_forks_under_disk_load(image: Path, mode: str) -> None:
    """A guest that verifies its disk is forked in the middle, again and again: every copy verifies its own."""
    with guests.pc("blk.elf", f"mode=check {mode}", devices=[Disk(image, overlay=True)], memfd=True) as vm:
        copies = []
        for _ in range(3):
            assert vm.run(0.02).kind == "TIMEOUT"
            copies.append(vm.fork())
        before = vm.snapshot()
        for machine in (*copies, vm):
            assert machine.run(60) == Outcome("DEBUG_EXIT", 0), machine.console.text
            assert "blocks of 4096 bytes" in machine.console.text
        vm.restore(before)
        assert vm.run(60) == Outcome("DEBUG_EXIT", 0)
        for machine in copies:
            machine.close()
    assert not any(image.read_bytes())


@pytest.mark.usefixtures("images")
def test_forks_with_requests_in_flight(image: Path) -> None:
    """A guest with 32 reads past the page cache in flight is forked again and again: every copy gets them all."""
    disk = Disk(image, readonly=True, direct=True)
    with guests.pc("blk.elf", "count=4000 depth=32", devices=[disk], memfd=True) as vm:
        copies = []
        for _ in range(3):
            assert vm.run(0.01).kind == "TIMEOUT"
            copies.append(vm.fork())
        for machine in (*copies, vm):
            assert machine.run(60) == Outcome("DEBUG_EXIT", 0), machine.console.text
            machine.close()


def test_an_edge_saved_in_the_middle(guest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's line that was high for a moment is low in a fork: the IOAPIC would take the next edge for none."""
    monkeypatch.setattr(VirtioMmio, "_raise", lambda self, bit: None)  # whose falling edge would hide it
    irr = ffi.offsetof("struct kvm_irqchip", "pad") + 4 + ffi.offsetof("struct kvm_ioapic_state", "irr")
    with Pc(guest, memory="32M", memfd=True, devices=[Rng()]) as vm:
        vm.console.expect("ready")
        vm.virtio[0].status = lib.VIRTIO_CONFIG_S_DRIVER_OK
        snapshot = vm.snapshot()
        chip = bytearray(snapshot.vm.state["ioapic"])
        chip[irr + vm.virtio[0].gsi // 8] |= 1 << vm.virtio[0].gsi % 8
        snapshot.vm.state["ioapic"] = bytes(chip)
        with vm.fork(snapshot) as child:
            assert not any(child.vm.get_irqchip(lib.KVM_IRQCHIP_IOAPIC)[irr : irr + 4])


def test_a_disk_that_would_not_be_kept(guest: str, image: Path) -> None:
    """A machine that writes to its image cannot be forked: one line says what to do."""
    with Pc(guest, memory="32M", devices=[Disk(image)]) as vm, pytest.raises(SnapshotError, match="give it overlay"):
        vm.fork()


def test_machines_leave_nothing_behind(guest: str) -> None:
    """Hundreds of forks, resets and snapshots leak no file descriptor, thread or mapping."""

    def resources() -> tuple[int, int, int]:
        gc.collect()
        reaper.drain()
        with open("/proc/self/maps", encoding="ascii") as maps:
            return len(os.listdir("/proc/self/fd")), threading.active_count(), sum(1 for _ in maps)

    with Pc(guest, memory="32M", memfd=True) as vm:
        vm.console.expect("ready")
        found = []
        for lap in range(4):
            for _ in range(50):
                snapshot = vm.snapshot()
                with vm.fork(snapshot) as child:
                    child.vcpus[0].run_once()
                    child.memory.write(0x200000, b"x" * 20000)
                    child.restore(snapshot)
                vm.memory.write(0x300000 + 8192 * lap, b"y")
                vm.restore(snapshot)
            found.append(resources())
        assert found[1][:2] == found[3][:2]
        assert found[3][2] < found[1][2] + 20
