"""Linux in snapshots, in the lab: booted once and forked for each test, saved and restored under load."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

import pytest

from pykvm import BootConfig, Machine, Outcome, Pc, restore_file
from pykvm.virtio.blk import Disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MARKER, PROMPT = "pykvm-initramfs: up", "# "
SECONDS = 120.0  # for one expectation; the lab's CPU is emulated and may share its machine
FORKS = 20
DISK = "/dev/vda"
TROUBLE = "soft lockup|rcu.*stall|BUG:|Call Trace|I/O error"

LOAD = """
i=0
while :; do
    i=$((i+1))
    dd if=/dev/urandom of=/tmp/a bs=64k count=4 2>/dev/null
    want=$(md5sum </tmp/a)
    dd if=/tmp/a of=/dev/vda bs=64k conv=fsync 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    [ "$(dd if=/dev/vda bs=64k count=4 2>/dev/null | md5sum)" = "$want" ] || echo "DAMAGED"
    echo "round=$i uptime=$(cut -d' ' -f1 /proc/uptime);"
done
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """16 MiB of zeroes."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(16 << 20))
    return path


def boot_to_shell(machine: Machine) -> None:
    """Boot to a shell that does not echo what it is told."""
    machine.console.expect(MARKER, SECONDS)
    machine.console.expect(PROMPT, SECONDS)
    machine.console.sendline('stty -echo; echo quiet=$((1+1)); while read -r line; do eval "$line"; done')
    machine.console.expect("quiet=2", SECONDS)


def shell(machine: Machine, command: str) -> str:
    """Run a command in the guest's shell; what it printed."""
    machine.console.sendline(f"{command}; echo end=$?")
    machine.console.expect(r"end=\d+", SECONDS)
    return machine.console.before.replace("\r", "").replace("\0", "")


def test_one_fork_for_each_test(
    guest_kernel: Path, initrd_with: Callable[..., Path], image: Path, record_property: Callable[[str, object], None]
) -> None:
    """Debian boots once; each of many forks writes to its memory and disk, and sees nothing of any other."""
    initrd = initrd_with("virtio_mmio", "virtio_blk")
    boot = BootConfig(str(guest_kernel), initrd=str(initrd), cmdline="console=ttyS0 quiet")
    begin = monotonic()
    with Pc(boot, memory="256M", cpus=2, memfd=True, devices=[Disk(image, overlay=True)]) as vm:
        boot_to_shell(vm)
        assert "2" in shell(vm, "nproc")
        before = float(shell(vm, "cut -d' ' -f1 /proc/uptime"))
        trouble = shell(vm, f"dmesg | grep -E '{TROUBLE}'")
        booted = monotonic() - begin
        snapshot = vm.snapshot()
        for number in range(FORKS):
            with vm.fork(snapshot) as child:
                found = shell(child, f"cat /tmp/mine; dd if={DISK} bs=16 count=1 2>/dev/null")
                assert "test-" not in found
                text = f"test-{number}-test"
                found = shell(
                    child,
                    f"echo {text} >/tmp/mine; echo {text} | dd of={DISK} conv=fsync 2>/dev/null; "
                    f"echo 3 >/proc/sys/vm/drop_caches; dd if={DISK} bs=16 count=1 2>/dev/null; cat /tmp/mine",
                )
                assert found.count(f"\n{text}") + found.startswith(text) == 2, found
                uptime = float(shell(child, "cut -d' ' -f1 /proc/uptime"))
                assert before <= uptime < before + SECONDS
                assert shell(child, f"dmesg | grep -E '{TROUBLE}'") == trouble
        record_property("boot_s", booted)
        record_property("all_s", monotonic() - begin)
        print(f"dmesg: {trouble!r}")
        print(f"boot {booted:.1f} s; with {FORKS} forks {monotonic() - begin:.1f} s")
        vm.restore(snapshot)
        assert "test-" not in shell(vm, f"cat /tmp/mine; dd if={DISK} bs=16 count=1 2>/dev/null")
        vm.console.sendline("poweroff -f")
        assert vm.run(SECONDS) == Outcome.POWER_OFF
    assert not any(image.read_bytes())


def test_saved_and_restored_under_load(
    guest_kernel: Path, initrd_with: Callable[..., Path], image: Path, tmp_path: Path
) -> None:
    """A guest that writes and verifies its disk goes through a file twice: no error, no clock that jumps back."""
    initrd = initrd_with("virtio_mmio", "virtio_blk", files={"load": f"#!/bin/sh{LOAD}".encode()})
    boot = BootConfig(str(guest_kernel), initrd=str(initrd), cmdline="console=ttyS0 quiet")
    machine: Machine = Pc(boot, memory="256M", cpus=2, devices=[Disk(image)])
    uptimes = []
    try:
        boot_to_shell(machine)
        machine.console.sendline("sh /load")
        for lap in range(3):
            for _ in range(3):
                said = machine.console.expect(r"round=(\d+) uptime=([0-9.]+);|DAMAGED", SECONDS)
                assert said.group(0) != "DAMAGED"
                uptimes.append(float(said.group(2)))
            assert machine.run(0.3 + lap / 7).kind == "TIMEOUT"  # stop somewhere inside of a round
            machine.save(str(tmp_path / "vm.snap"))
            machine.close()
            machine = restore_file(tmp_path / "vm.snap")
        machine.console.expect(r"round=\d+ uptime=([0-9.]+);", SECONDS)
    finally:
        machine.close()
    assert uptimes == sorted(uptimes) and uptimes[-1] < uptimes[0] + 4 * SECONDS
