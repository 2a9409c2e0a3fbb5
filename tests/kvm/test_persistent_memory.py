"""Persistent memory on a real /dev/kvm, with the virtio-pmem driver of images/pmem.c."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
from typing import TYPE_CHECKING

import command
import guests
import pytest

from pykvm import Outcome, Pc, SnapshotError
from pykvm.virtio.pmem import Pmem

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 4 << 20
PAGE = 4096
HIGH = 1 << 32
CUT = f"was cut to {PAGE} bytes while {SIZE} were in use as the guest's memory"
rings = pytest.mark.parametrize("ring", [3, 0], ids=["by the CPU", "emulated"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """4 MiB that begin with a word."""
    path = tmp_path / "memory.img"
    path.write_bytes(b"pykvm ok".ljust(SIZE, b"\0"))
    return path


def numbers(image: Path) -> list[int]:
    """The words that mode=check writes."""
    data = image.read_bytes()
    return [struct.unpack_from("<Q", data, at + 8)[0] for at in range(0, SIZE, PAGE)]


@rings
def test_the_guest_uses_the_file(image: Path, ring: int) -> None:
    """It reads what is in the file, and the file has what it wrote."""
    device = Pmem(image)
    outcome, text = guests.run("pmem.elf", f"ring={ring}", devices=[device])
    assert outcome == Outcome("DEBUG_EXIT", 0), text
    assert text == "pmem: 4096 KiB at 100000000\npmem: begins with pykvm ok, last page has 1023\n"
    assert numbers(image) == list(range(SIZE // PAGE))
    assert device.flushes == 1


def test_several_above_all_ram(image: Path, tmp_path: Path) -> None:
    """Each has its own place above RAM, at a multiple of 1 GiB; none is in the memory map that kernels get."""
    other = tmp_path / "other.img"
    other.write_bytes(bytes(SIZE))
    with Pc(memory="3074M", devices=[Pmem(image), Pmem(other, readonly=True)]) as pc:
        places = [(slot.gpa, slot.readonly) for slot in pc.memory.slots if slot.name == "pmem"]
        assert places == [(HIGH + (1 << 30), False), (HIGH + (2 << 30), True)]
        assert all(base + size <= HIGH + (2 << 20) for base, size, _ in pc.e820())
    outcome, text = guests.run("pmem.elf", "base=0xd0001000", devices=[Pmem(other), Pmem(image)])
    assert "begins with pykvm ok" in text and outcome.code == 0


@rings
def test_read_only(image: Path, ring: int) -> None:
    """The guest's writes go nowhere, and it runs on."""
    outcome, text = guests.run("pmem.elf", f"ring={ring}", devices=[Pmem(image, readonly=True)])
    assert outcome == Outcome("DEBUG_EXIT", 0), text
    assert "begins with pykvm ok, last page has 0" in text
    assert not any(numbers(image))


@rings
@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("op", ["read", "write"])
def test_a_file_cut_short_under_a_running_guest(image: Path, op: str, readonly: bool, ring: int) -> None:
    """The guest's next access to what is gone is the end of the machine, which says why."""
    device = Pmem(image, readonly=readonly)
    with guests.pc("pmem.elf", f"mode=probe op={op} offset=0x200000 ring={ring}", devices=[device]) as pc:
        pc.console.expect("ready")
        os.truncate(image, PAGE)
        pc.console.send("x")
        outcome = pc.run(guests.RUN_S)
        assert (outcome.kind, outcome.detail) == ("CRASH", f"{image} {CUT}")
        if outcome.report is not None:
            assert CUT in " ".join(outcome.report.text().split())


def test_an_access_of_the_hosts_own(image: Path) -> None:
    """A debugger or a device that looks at what is gone does not die, but the machine ends."""
    with guests.pc("pmem.elf", "mode=probe", devices=[Pmem(image)]) as pc:
        pc.console.expect("ready")
        pc.start()
        os.truncate(image, PAGE)
        assert pc.memory.read(HIGH + 2 * PAGE, 4) == bytes(4)
        outcome = pc.wait(guests.RUN_S)
        assert outcome is not None and (outcome.kind, outcome.detail) == ("CRASH", f"{image} {CUT}")


@pytest.mark.host
def test_the_command_says_what_happened(image: Path) -> None:
    """One line and status 6; the file as it was cut."""
    words = ["--debug-exit", "--pmem", image, "--append", "mode=probe offset=0x200000 ring=0", "--serial", "stdio"]
    process = subprocess.Popen(
        [*command.COMMAND, "start", *words, guests.IMAGES / "pmem.elf"],
        env=command.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        while b"ready" not in process.stdout.readline():
            assert process.poll() is None
        os.truncate(image, PAGE)
        _, errors = process.communicate(b"x", timeout=command.SECONDS)
    assert process.returncode == 6
    assert errors.decode() == f"pykvm: CRASH: {image} {CUT}\n"
    assert image.stat().st_size == PAGE


@pytest.mark.host
@rings
def test_a_full_file_system(tmp_path: Path, ring: int) -> None:
    """A hole of the file that cannot be filled ends the machine as well: the guest's write has no place."""
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    script = 'mount -t tmpfs -o size=1M none "$0" && truncate -s 4M "$0/memory.img" && exec "$@"'
    if subprocess.run([*mount, script, tmp_path, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace or tmpfs can be had")
    words = ["start", "--pmem", tmp_path / "memory.img", "--append", f"ring={ring}", guests.IMAGES / "pmem.elf"]
    done = subprocess.run(
        [*mount, script, tmp_path, *command.COMMAND, *words],
        env=command.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=command.SECONDS,
        check=False,
    )
    assert done.returncode == 6
    assert b"memory.img, which is the guest's memory, cannot be had: no space left" in b" ".join(done.stderr.split())


@pytest.mark.host
def test_kill_loses_nothing(image: Path) -> None:
    """After kill -9 the file has every number that the guest said it had flushed."""
    words = ["--pmem", image, "--append", "mode=log"]
    with subprocess.Popen(
        [*command.COMMAND, "start", *words, guests.IMAGES / "pmem.elf"],
        env=command.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        said = [int(process.stdout.readline()) for _ in range(50)]
        process.send_signal(signal.SIGKILL)
    data = image.read_bytes()
    assert [struct.unpack_from("<Q", data, n * PAGE)[0] for n in said] == said == list(range(1, 51))


def test_a_reset_keeps_it(image: Path) -> None:
    """The machine starts again with the same memory at the same place."""
    with guests.pc("pmem.elf", devices=[Pmem(image)]) as pc:
        assert pc.run(guests.RUN_S) == Outcome("DEBUG_EXIT", 0)
        pc.reset()
        assert pc.run(guests.RUN_S) == Outcome("DEBUG_EXIT", 0)
        assert guests.text(pc).count("begins with pykvm ok") == 2


def test_no_snapshots(image: Path, tmp_path: Path) -> None:
    """Refused in memory, for a fork and for a file, and the machine goes on."""
    with guests.pc("pmem.elf", devices=[Pmem(image)]) as pc:
        for attempt in (pc.snapshot, pc.fork, lambda: pc.save(str(tmp_path / "file"))):
            with pytest.raises(SnapshotError, match="its file goes on changing"):
                attempt()
        assert pc.run(guests.RUN_S) == Outcome("DEBUG_EXIT", 0)
    assert not (tmp_path / "file").exists()
