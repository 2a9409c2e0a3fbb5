"""Snapshot files: machines that go on in another process, and files that are refused."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cguest import build
from command import environment, run, spawn
from test_snapshot import SOURCE, Latch, say

from pykvm import Machine, Pc, SnapshotError, restore_file
from pykvm.snapshot.format import HEADER, PAGE
from pykvm.snapshot.load import load


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A guest that counts the characters it gets; `w` also writes the count into 64 pages."""
    return build(tmp_path_factory.mktemp("guest"), SOURCE)


@pytest.fixture
def vm(guest: str) -> Iterator[Pc]:
    """It has got one character."""
    with Pc(guest, memory="32M", memfd=True, cpus=2) as machine:
        machine.console.expect("ready")
        assert say(machine, "w") == "1,1"
        yield machine


@pytest.fixture(scope="module")
def saved(guest: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot file of a small machine."""
    path = tmp_path_factory.mktemp("saved") / "small.snap"
    with Pc(guest, memory="4M") as machine:
        machine.console.expect("ready")
        machine.save(str(path))
    return path


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_save_and_restore(vm: Pc, tmp_path: Path, compress: bool, lazy: bool) -> None:
    """A file gives a machine that goes on where it was, and again, while the first one has long gone on."""
    path = tmp_path / "vm.snap"
    vm.save(str(path), compress=compress)
    assert say(vm, "w") == "2,2"
    for _ in range(2):
        with restore_file(path, lazy=lazy) as machine:
            assert say(machine, "a") == "2,1"
            assert say(machine, "w") == "3,3"
    assert path.stat().st_blocks * 512 < 2 << 20


@pytest.mark.parametrize("irqchip", ["split", "none"])
def test_other_irqchips(guest: str, tmp_path: Path, irqchip: str) -> None:
    """Machines whose interrupt controller is not in the kernel can be saved as well."""
    with Pc(guest, memory="4M", irqchip=irqchip) as machine:
        machine.console.expect("ready")
        machine.save(str(tmp_path / "vm"))
    with restore_file(tmp_path / "vm") as machine:
        assert say(machine, "a") == "1,0"


def test_differential(vm: Pc, tmp_path: Path) -> None:
    """A chain of differential snapshots holds only what changed, and each of them restores right."""
    full = vm.save(str(tmp_path / "0"))
    assert say(vm, "w") == "2,2"
    second = vm.save(str(tmp_path / "1"), parent=full)
    assert say(vm, "w") == "3,3"
    vm.memory.fill(0x800000, 4096, 0xEE)
    vm.save(str(tmp_path / "2"), parent=second)
    for name, expected in (("2", "4,3"), ("1", "3,2"), ("0", "2,1")):
        with restore_file(tmp_path / name) as machine:
            assert say(machine, "a") == expected
            assert machine.memory.read(0x800FFF, 1) == (b"\xee" if name == "2" else b"\0")
    assert len(load(str(tmp_path / "1")).document["pieces"]) // 48 < 80
    (tmp_path / "0").rename(tmp_path / "elsewhere")
    with pytest.raises(SnapshotError, match="its parent cannot be used"):
        restore_file(tmp_path / "1")
    with restore_file(tmp_path / "1", parent=tmp_path / "elsewhere") as machine:
        assert say(machine, "a") == "3,2"
        again = machine.fork()
        machine.save(str(tmp_path / "0"))  # another one under the parent's name
        again.close()
    with pytest.raises(SnapshotError, match="is not its parent"):
        restore_file(tmp_path / "1")


def test_a_restored_machine_is_saved_and_forked(vm: Pc, tmp_path: Path) -> None:
    """Twice through a file, then a fork and a reset: nothing is lost on the way."""
    vm.save(str(tmp_path / "1"))
    with restore_file(tmp_path / "1") as machine:
        assert say(machine, "w") == "2,2"
        machine.save(str(tmp_path / "1"))  # over the file that it is mapped from
        assert say(machine, "a") == "3,2"
    with restore_file(tmp_path / "1") as machine:
        assert isinstance(machine, Pc)
        before = machine.snapshot()
        with machine.fork() as child:
            assert say(child, "w") == "3,3"
        assert say(machine, "a") == "3,2"
        machine.restore(before)
        assert say(machine, "a") == "3,2"


def test_user_devices(guest: str, tmp_path: Path) -> None:
    """The caller's devices are restored from the file; without them it is refused."""
    latch, path = Latch(), tmp_path / "vm"
    with Machine(memory="1M") as machine:
        machine.attach(latch, ports=range(0x70, 0x71))
        latch.write(0, 1, 0x77)
        machine.save(str(path))
    copy = Latch()
    with restore_file(path, attach=lambda machine: machine.attach(copy, ports=range(0x70, 0x71))):
        assert copy.read(0, 1) == 0x77
    with pytest.raises(SnapshotError, match="latch at port 0x70"):
        restore_file(path)


# -- files that are refused --------------------------------------------------------------------------------------------


def reseal(data: bytearray) -> None:
    """Make the header's checksum right again."""
    data[HEADER.size - 4 : HEADER.size] = bytes(4)
    data[HEADER.size - 4 : HEADER.size] = struct.pack("<I", zlib.crc32(data[:PAGE]))


def sealed_is_refused(path: Path, bad: bytearray, error: type[Exception] = SnapshotError) -> bool:
    """Seal changed state with right checksums and restore it: whether that is refused, in one line, or works."""
    length = struct.unpack_from("<Q", bad, 16)[0]
    struct.pack_into("<I", bad, 24, zlib.crc32(bad[PAGE : PAGE + length]))
    reseal(bad)
    path.write_bytes(bad)
    try:
        restore_file(path).close()
    except (SnapshotError, error) as refusal:
        assert "\n" not in str(refusal)
        return True
    return False


def refused(path: Path, data: bytes, match: str = ".") -> None:
    """Loading the file raises SnapshotError, and nothing else."""
    path.write_bytes(data)
    with pytest.raises(SnapshotError, match=match):
        load(str(path))


def test_truncated_and_flipped(saved: Path, tmp_path: Path) -> None:
    """No file that was cut, extended, or has a byte changed anywhere gets past the checks."""
    good, path = saved.read_bytes(), tmp_path / "bad"
    chance = random.Random(1)
    data = [at for at in range(0, len(good), 512) if any(good[at : at + 512])]
    for _ in range(150):
        bad = bytearray(good)
        at = chance.choice(data) + chance.randrange(512) if chance.random() < 0.8 else chance.randrange(len(good))
        bad[at] ^= 1 << chance.randrange(8)
        refused(path, bytes(bad))
    for cut in [0, 7, 8, 100, PAGE, PAGE + 1, len(good) - 1, *(chance.randrange(len(good)) for _ in range(50))]:
        refused(path, good[:cut])
    refused(path, good + b"\0", "longer")


def test_a_newer_version(saved: Path, tmp_path: Path) -> None:
    """A file of a later format is refused by that name, not as damaged."""
    data = bytearray(saved.read_bytes())
    data[8] = 2
    refused(tmp_path / "new", data, "written by a newer pykvm")
    reseal(data)
    refused(tmp_path / "new", data, "written by a newer pykvm")


def test_a_forged_state(saved: Path, tmp_path: Path) -> None:
    """State that is changed and sealed with right checksums meets SnapshotError at worst, never another exception."""
    good, path = saved.read_bytes(), tmp_path / "forged"
    chance = random.Random(2)
    text_length = struct.unpack_from("<Q", good, PAGE)[0]
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            bad[PAGE + 16 + chance.randrange(text_length)] = chance.choice(b'0123456789-"{}[],:enul\xff')
        sealed_is_refused(path, bad)


def test_another_cpu(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot of a CPU with features or a vendor that this one has not is refused in one line."""
    from pykvm.core import vmsetup
    from pykvm.kvm import system

    rows = system.Kvm().supported_cpuid()
    monkeypatch.setattr(vmsetup, "_tables", {})
    less = [(*row[:6], row[6] & ~(1 << 25)) if row[0] == 1 else row for row in rows]  # no SSE
    monkeypatch.setattr(system.Kvm, "supported_cpuid", lambda self: less)
    with pytest.raises(SnapshotError, match=r"this one lacks CPUID 0x1.0 edx 0x2000000$"):
        restore_file(saved)
    other = [(*row[:4], 1, 2, 3) if row[0] == 0 else row for row in rows]
    monkeypatch.setattr(vmsetup, "_tables", {})
    monkeypatch.setattr(system.Kvm, "supported_cpuid", lambda self: other)
    with pytest.raises(SnapshotError, match="another vendor"):
        restore_file(saved)


def test_no_such_files(tmp_path: Path) -> None:
    """What is no snapshot at all is named as such."""
    (tmp_path / "text").write_text("hello")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "text", tmp_path, tmp_path / "absent", tmp_path / "fifo", "/dev/null"):
        with pytest.raises(SnapshotError):
            restore_file(path)


# -- saving is atomic --------------------------------------------------------------------------------------------------

SAVER = """
import sys
from pykvm import Machine
with Machine(memory="64M", memfd=True) as machine:
    machine.memory.fill(0, 64 << 20, int(sys.argv[2]))
    while True:
        print("saving", flush=True)
        machine.save(sys.argv[1])
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """A process killed in the middle of saving leaves the old file, which still restores."""
    path = tmp_path / "vm"
    with Machine(memory="1M") as machine:
        machine.memory.write(0x1234, b"old")
        machine.save(str(path))
    old, chance = path.read_bytes(), random.Random(3)
    for _ in range(4):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(path), "7"], stdout=subprocess.PIPE, env=environment()
        )
        assert saver.stdout is not None
        saver.stdout.readline()
        time.sleep(chance.random() * 0.05)
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        saver.stdout.close()
        file = load(str(path))
        assert file.snapshot.size == (1 << 20 if path.stat().st_size == len(old) else 64 << 20)


def test_a_folder_that_cannot_be_written(guest: str, tmp_path: Path) -> None:
    """Where the file cannot be made, one line says so, nothing is left behind and the machine goes on."""
    with Pc(guest, memory="4M") as machine:
        machine.console.expect("ready")
        for path in (tmp_path / "none" / "vm", tmp_path):
            with pytest.raises(SnapshotError):
                machine.save(str(path))
        assert list(tmp_path.iterdir()) == []
        assert say(machine, "a") == "1,0"


# -- at a shell --------------------------------------------------------------------------------------------------------


def wait_for(path: Path) -> None:
    """Wait until the file exists."""
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


def test_save_by_signal_and_restore(guest: str, tmp_path: Path) -> None:
    """SIGUSR1 makes `pykvm start --save` save, the guest goes on, and `pykvm restore` goes on from the file."""
    path = tmp_path / "vm"
    first = spawn("--save", path, "--mem", "8M", guest)
    assert first.stdin is not None and first.stdout is not None and first.stderr is not None
    assert first.stdout.readline() == b"ready\n"
    first.stdin.write(b"w")
    first.stdin.flush()
    assert first.stdout.readline() == b"1,1;\n"
    first.send_signal(signal.SIGUSR1)
    wait_for(path)
    first.stdin.write(b"w")
    first.stdin.flush()
    assert first.stdout.readline() == b"2,2;\n"
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    assert f"saved 8 MiB of guest to {path}" in first.stderr.read().decode()
    for stream in (first.stdin, first.stdout, first.stderr):
        stream.close()
    for options in ((), ("--lazy",)):
        done = run("restore", *options, "--timeout", "2", path, input="a")
        assert (done.returncode, done.stdout) == (124, "2,1;\n")


def test_restore_complains_in_one_line(saved: Path, tmp_path: Path) -> None:
    """What is no snapshot, or cannot be restored as asked, is one line and status 2."""
    broken = tmp_path / "broken"
    broken.write_bytes(saved.read_bytes()[:-1])
    for words in ([broken], [tmp_path / "absent"], [], [saved, "--serial", "none", "--serial", "none"]):
        done = run("restore", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == "", done.stderr
