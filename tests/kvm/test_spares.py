"""What closed forks leave to the next ones: KVM VMs that are used again, with nothing of the last guest in them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import guests
import pytest
from cguest import build

from pykvm import Outcome, Pc
from pykvm.core import reaper
from pykvm.core.spare import MAX_SPARES
from pykvm.snapshot.state import Snapshot
from pykvm.virtio.blk import Disk
from pykvm.virtio.rng import Rng

# It counts the characters that it gets; `x` ends it by a triple fault.
SOURCE = r"""
static volatile u64 counter;
__attribute__((noinline)) void step(void) { counter++; }
void kmain(void) {
    print("ready\n");
    for (;;) {
        char command = get();
        step();
        if (command == 'x') { static const u8 none[10]; __asm__ volatile("lidt %0\n ud2" ::"m"(none)); }
        put('0' + counter); print(";\n");
    }
}
"""


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The guest above."""
    return build(tmp_path_factory.mktemp("guest"), SOURCE)


@pytest.fixture(params=["kernel", "none"])
def vm(guest: str, request: pytest.FixtureRequest) -> Iterator[Pc]:
    """It has got nothing yet."""
    with Pc(guest, memory="32M", memfd=True, irqchip=request.param) as machine:
        machine.console.expect("ready")
        yield machine


def say(machine: Pc) -> str:
    """Send one character; the guest's answer."""
    machine.console.send("a")
    return machine.console.expect(r"(\d+);").group(1)


def left(snapshot: Snapshot) -> list[int]:
    """File descriptors of the VMs that are waiting to be used again."""
    return [spare.vm for spare in snapshot._spares]


def test_a_vm_is_used_again_as_if_it_were_new(vm: Pc) -> None:
    """Whatever a fork did, the next one finds the snapshot: memory, registers, devices, the console."""
    snapshot, used = vm.snapshot(), set()
    for _ in range(4):
        with vm.fork(snapshot) as child:
            used.add(child.vm.fd)
            assert child.console.text == ""
            assert child.regs.r15 == vm.regs.r15
            assert not any(child.memory.read(20 << 20, 8192))
            assert [say(child), say(child)] == ["1", "2"]
            child.memory.fill(20 << 20, 8192, 0xAA)
            child.regs.r15 = 77
            child.serial[0].write(3, 1, 0x80)
        assert left(snapshot) == [*used]
    assert len(used) == 1


def test_it_ended_badly(vm: Pc) -> None:
    """A VM whose guest crashed, was stopped in the middle, or ended inside of an access is as good."""
    snapshot = vm.snapshot()
    with vm.fork(snapshot) as child:
        child.console.send("x")
        assert child.run(timeout=10).kind in ("TRIPLE_FAULT", "CRASH")
    with vm.fork(snapshot) as child:
        assert say(child) == "1"
        child.start()
    with vm.fork(snapshot) as child:
        child.console.send("a")
        assert child.vcpus[0].run_once().reason == "IO"  # it looks whether there is a character
    with vm.fork(snapshot) as child:
        assert say(child) == "1"
    assert len(left(snapshot)) == 1


def test_a_debugger_was_there(vm: Pc) -> None:
    """Breakpoints of one fork stop none of the next."""
    snapshot = vm.snapshot()
    for _ in range(2):
        with vm.fork(snapshot) as child:
            child.console.send("a")
            assert child.run_until(rip="step").condition == "rip"
        with vm.fork(snapshot) as child:
            assert say(child) == "1"


def test_what_a_restore_would_not_undo(vm: Pc, tmp_path: Path) -> None:
    """A fork that got more memory, a hook, or a snapshot of its own leaves nothing; the next is made anew."""
    snapshot = vm.snapshot()
    with vm.fork(snapshot) as child:
        child.add_memory(1 << 30, 4096)
    with vm.fork(snapshot) as child:
        child.on_msr(read=lambda vcpu, index: 0)
    with vm.fork(snapshot) as child:
        assert say(child) == "1"
        child.snapshot()
    assert left(snapshot) == []
    with vm.fork(snapshot) as child:
        assert say(child) == "1"
    assert len(left(snapshot)) == 1


@pytest.mark.usefixtures("images")
def test_virtio_devices_keep_their_wires(tmp_path: Path) -> None:
    """Notifications and interrupts of a VM that is used again reach the devices of the machine that has it now."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(16 << 20))
    with guests.pc(
        "blk.elf", "mode=check count=40 irq=1", devices=[Disk(image, overlay=True), Rng()], memfd=True
    ) as vm:
        assert vm.run(0.01).kind == "TIMEOUT"
        snapshot, used = vm.snapshot(), set()
        for lap in range(4):
            with vm.fork(snapshot) as child:
                used.add(child.vm.fd)
                if lap == 1:  # one that leaves requests, and signals on the way
                    child.run(0.01)
                    child.virtio[1].notify(0)
                    continue
                assert child.run(60) == Outcome("DEBUG_EXIT", 0), child.console.text
        assert left(snapshot) == [*used]
        assert len(used) == 1


def test_a_reset_machine_has_another_vm(guest: str, tmp_path: Path) -> None:
    """A fork that was reset leaves the VM that it has got then, with the wires that go there."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    with Pc(guest, memory="32M", memfd=True, devices=[Disk(tmp_path / "disk.img", overlay=True)]) as vm:
        vm.console.expect("ready")
        snapshot = vm.snapshot()
        for _ in range(3):
            with vm.fork(snapshot) as child:
                assert say(child) == "1"
                child.reset()
                child.console.expect("ready")
                number = child.vm.fd
            assert left(snapshot) == [number]


def test_wires_that_others_have(guest: str) -> None:
    """The VM of a device whose queues a back end serves is closed: that may still have the eventfds."""
    with Pc(guest, memory="32M", memfd=True, devices=[Rng()]) as vm:
        vm.console.expect("ready")
        snapshot = vm.snapshot()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rng, "outside", (0,))
            with vm.fork(snapshot):
                pass
        assert left(snapshot) == []


def test_memory_that_somebody_looks_at(vm: Pc) -> None:
    """A view that outlives its machine shows that machine's memory, never the next one's."""
    snapshot = vm.snapshot()
    with vm.fork(snapshot) as child:
        child.memory.write(20 << 20, b"mine")
        view = child.memory.view(20 << 20, 4)
    assert left(snapshot) == []
    with vm.fork(snapshot) as other:
        other.memory.write(20 << 20, b"hers")
        assert bytes(view) == b"mine"
    view.release()


@pytest.mark.usefixtures("images")
def test_processors_that_were_started_wait_again() -> None:
    """A guest that starts its other vCPUs does so in each fork, though they had run in the last one."""
    with guests.pc("smp.elf", "cpus=3", cpus=3, memfd=True) as machine:
        snapshot = machine.snapshot()
        ends = []
        for _ in range(3):
            with machine.fork(snapshot) as child:
                ends.append((child.run(timeout=30), sorted(child.console.text.splitlines())))
            assert len(left(snapshot)) == 1
        assert ends[0][0] == Outcome("DEBUG_EXIT", 0), ends[0][1]
        assert ends[0] == ends[1] == ends[2]


def test_there_are_not_too_many(vm: Pc) -> None:
    """Of many forks that live side by side only some are kept, and nothing is when the snapshot goes."""

    def open_fds() -> int:
        gc.collect()
        reaper.drain()
        return len(os.listdir("/proc/self/fd"))

    before = open_fds()
    snapshot = vm.snapshot()
    children = [vm.fork(snapshot) for _ in range(MAX_SPARES + 3)]
    for child in children:
        child.close()
    assert len(left(snapshot)) == MAX_SPARES
    children.clear()
    del child, snapshot
    assert open_fds() <= before + 1  # the memfd of what was memory is the snapshot's, and `vm` is mapped on it
