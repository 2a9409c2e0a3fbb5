"""Thousands of machines in one process: nothing is left behind."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import guests
import pytest
from realmode import CLI_HLT, SPIN, machine

from pykvm import Machine, Outcome, Pc
from pykvm.core import reaper
from pykvm.errors import PykvmError
from pykvm.virtio.balloon import Balloon
from pykvm.virtio.blk import Disk
from pykvm.virtio.console import Console
from pykvm.virtio.rng import Rng
from pykvm.virtio.vsock import Vsock

ROUNDS = 300 if os.environ.get("PYKVM_LAB") != "1" else 45  # an emulated CPU is twenty times slower
RSS_SLACK_PAGES = 1024  # 4 MiB: what the allocator may keep, independent of the number of rounds


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def _mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def _rss_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def _settle() -> None:
    gc.collect()  # a snapshot that goes may have VMs to close
    reaper.drain()


@pytest.mark.parametrize("irqchip", ["none", "split", "kernel"])
def test_nothing_leaks(irqchip: str) -> None:
    """Create, run, close, again and again: fds, threads, mappings and RSS stay what they were."""

    def once() -> None:
        with machine(CLI_HLT, irqchip=irqchip) as vm:
            assert vm.run(timeout=30) == Outcome.HALTED

    rounds = ROUNDS if irqchip != "kernel" else ROUNDS // 3  # closing one takes the kernel 7 to 23 ms
    for _ in range(20):
        once()
    _settle()
    before = (_open_fds(), threading.active_count(), _mappings(), _rss_pages())
    for _ in range(rounds):
        once()
    _settle()
    after = (_open_fds(), threading.active_count(), _mappings(), _rss_pages())
    assert after[:2] == before[:2]
    assert after[2] <= before[2] + 5  # the allocator's arenas, not one mapping a machine
    assert after[3] - before[3] < RSS_SLACK_PAGES


def test_nothing_leaks_with_devices(tmp_path: Path) -> None:
    """Nor do machines with virtio devices leave anything: eventfds, sockets, threads, images, guest memory."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))

    def once() -> None:
        devices = [
            Disk(image, queues=2, thread=True),
            Rng(),
            Balloon(),
            Vsock(3, str(tmp_path / "vsock")),
            Console(),
        ]
        outcome, text = guests.run("blk.elf", "mode=check count=2", devices=devices)
        assert outcome == Outcome("DEBUG_EXIT", 0), text

    for _ in range(5):
        once()
    _settle()
    before = (_open_fds(), threading.active_count(), _mappings(), _rss_pages())
    for _ in range(ROUNDS // 15):
        once()
    _settle()
    after = (_open_fds(), threading.active_count(), _mappings(), _rss_pages())
    assert after[:2] == before[:2]
    assert after[2] <= before[2] + 5
    assert after[3] - before[3] < RSS_SLACK_PAGES
    assert [entry.name for entry in tmp_path.iterdir()] == ["disk.img"]


@pytest.mark.parametrize(("kernel", "cpus"), [("", 0), ("no such kernel", 1)])
def test_devices_of_a_machine_that_cannot_be_made(tmp_path: Path, kernel: str, cpus: int) -> None:
    """They are closed, whether it fails before or after them; also the socket that one listens on."""
    _settle()
    before = _open_fds()
    with pytest.raises(PykvmError):
        Pc(kernel or None, cpus=cpus, devices=[Rng(), Vsock(3, str(tmp_path / "vsock"))])
    _settle()
    assert (_open_fds(), list(tmp_path.iterdir())) == (before, [])


def test_machines_side_by_side() -> None:
    """Twenty machines run at the same time in one process and end independently."""
    machines = [machine(CLI_HLT if index % 2 else SPIN, irqchip="kernel") for index in range(20)]
    try:
        for vm in machines:
            vm.start()
        for index, vm in enumerate(machines):
            assert vm.wait(timeout=30 if index % 2 else 0.01) == (Outcome.HALTED if index % 2 else None)
    finally:
        for vm in machines:
            vm.close()


def test_memory_is_not_populated() -> None:
    """512 MiB of RAM cost no RSS until they are touched."""
    before = _rss_pages()
    with Machine(memory="512M") as vm:
        assert (_rss_pages() - before) * 4096 < 16 << 20
        vm.memory.fill(16 << 20, 64 << 20, 0xA5)
        assert (_rss_pages() - before) * 4096 > 60 << 20


def test_a_failed_construction_leaves_nothing() -> None:
    """A machine whose options KVM refuses gives everything back."""
    _settle()
    before = _open_fds()
    for _ in range(20):
        with pytest.raises(Exception, match="no-such-feature"):
            Machine(memory="1M", cpu_features="+no-such-feature")
    _settle()
    assert _open_fds() == before


def test_a_view_outlives_the_machine() -> None:
    """A memoryview that the user kept stays valid after close; its memory goes with it."""
    vm = machine(CLI_HLT)
    view = vm.memory.view(0x1000, 2)
    vm.close()
    assert bytes(view) == CLI_HLT


def test_the_console_outlives_the_machine() -> None:
    """What a guest printed can still be read when its machine is closed."""
    with guests.pc("hello.bin") as pc:
        pc.run(timeout=guests.RUN_S)
    assert pc.console.text == "Hello from real mode\r\n"
