"""Finding machines in a /proc made by hand, rates of two samples, and machines that tell nonsense of themselves."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest
from rich.console import Console

from pykvm.cli.top import run as top
from pykvm.cli.top import table
from pykvm.control import status
from pykvm.control.machines import Sample, rates, scan
from pykvm.errors import UsageError

TICKS = os.sysconf("SC_CLK_TCK")
PID = 4194400  # beyond any real one


def stat(comm: str, user: int, system: int, guest: int) -> str:
    """A line of /proc/PID/task/TID/stat (proc(5)): fields 14, 15 and 43 are utime, stime and guest_time."""
    fields = ["0"] * 52
    fields[13], fields[14], fields[42] = str(user), str(system), str(guest)
    return " ".join([fields[0], f"({comm})", *fields[2:]])


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory for status sockets."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A QEMU with two vCPUs, a shell, and a process that ended while it was looked at."""
    root = tmp_path / "proc"
    vmm = root / str(PID)
    (vmm / "fd").mkdir(parents=True)
    for fd, link in enumerate(["/dev/kvm", *("anon_inode:kvm-" + each for each in ("vm", "vcpu:0", "vcpu:1"))]):
        (vmm / "fd" / str(fd)).symlink_to(link)
    for tid, line in enumerate([stat("qemu) x (", TICKS, 0, 0), stat("CPU 0/KVM", 5 * TICKS, TICKS, 4 * TICKS)]):
        (vmm / "task" / str(PID + tid)).mkdir(parents=True)
        (vmm / "task" / str(PID + tid) / "stat").write_text(line)
    (vmm / "comm").write_text("qemu\n")
    (vmm / "cmdline").write_bytes(b"qemu\0-m\x0064\0")
    (vmm / "status").write_text("Name:\tqemu\nVmRSS:\t    2048 kB\n")
    (vmm / "io").write_text("rchar: 9\nread_bytes: 4096\nwrite_bytes: 512\ncancelled_write_bytes: 7\n")
    for pid, link in ((PID + 50, "/dev/null"), (PID + 60, "anon_inode:kvm-vm")):
        (root / str(pid) / "fd").mkdir(parents=True)
        (root / str(pid) / "fd" / "0").symlink_to(link)
    return root


def test_a_foreign_machine(proc: Path, tmp_path: Path) -> None:
    """Its vCPUs, its threads' time with that in the guest, memory and disk; exits where debugfs tells them."""
    debug = tmp_path / "debug" / f"{PID}-13"
    debug.mkdir(parents=True)
    for name, count in (("exits", 100), ("io_exits", 60), ("mmio_exits", 30), ("halt_exits", 3), ("rubbish", 9)):
        (debug / name).write_text(f"{count}\n")
    (found,) = scan(str(proc), str(tmp_path / "debug"))
    assert (found.pid, found.name, found.command) == (PID, "qemu", "qemu -m 64")
    assert (found.vcpus, found.cpu_s, found.guest_s, found.rss) == (2, 7.0, 4.0, 2048 * 1024)
    assert (found.read_bytes, found.written_bytes, found.rx_bytes, found.is_pykvm) == (4096, 512, None, False)
    assert found.exits == {"IO": 60, "MMIO": 30, "HLT": 3, "other": 7}


def test_rates() -> None:
    """Differences per second; the guest's time is not outside; a counter that went back gives 0, not less."""
    before = Sample(1, "a", "", at=10.0, cpu_s=5, guest_s=3, exits={"IO": 100}, read_bytes=500, rx_bytes=0, tx_bytes=9)
    after = Sample(1, "a", "", at=12.0, cpu_s=8, guest_s=5, exits={"IO": 300, "HLT": 4}, rx_bytes=20, tx_bytes=9)
    found = rates(before, after)
    assert (found["guest_cpus"], found["outside_cpus"]) == (1.0, 0.5)
    assert found["exits_per_s"] == {"IO": 100.0, "HLT": 2.0}
    assert (found["disk_read_bytes_per_s"], found["net_rx_bytes_per_s"], found["net_tx_bytes_per_s"]) == (0, 10, 0)
    assert rates(after, after)["guest_cpus"] == 0
    json.dumps(found)


def answer_with(folder: Path, data: bytes, pid: int = PID) -> None:
    """A status socket that says `data` once."""
    (folder / "pykvm").mkdir(mode=0o700, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "pykvm" / f"{pid}.sock"))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as client:
            try:
                client.sendall(data)
            except OSError:
                pass  # it has heard enough

    threading.Thread(target=serve, daemon=True).start()


def test_what_a_pykvm_tells(proc: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exits of all vCPUs are added up; memory, kernel and network are its own figures."""
    told = {
        "kernel": "k.elf", "memory": 1 << 20, "vcpus": [{"exits": {"IO": 2}}, {"exits": {"IO": 3, "HLT": 1}}],
        "nets": [{"rx": 5, "tx": 6}],
    }  # fmt: skip
    monkeypatch.setattr(status, "tidy", lambda: None)
    answer_with(runtime, json.dumps(told).encode())
    (found,) = scan(str(proc))
    assert (found.is_pykvm, found.kernel, found.memory, found.rx_bytes) == (True, "k.elf", 1 << 20, 5)
    assert found.exits == {"IO": 5, "HLT": 1}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"\xff", b"[" * 100000, b"0" * (3 << 20),
        b'{"kernel": 1, "memory": "x", "vcpus": 3, "nets": [1]}',
        b'{"vcpus": [{"exits": {"IO": "many"}}, {"exits": []}]}',
    ],
)  # fmt: skip
def test_nonsense_is_left_out(proc: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Whatever is at the other end of the socket: the machine is shown by what the kernel says."""
    monkeypatch.setattr(status, "tidy", lambda: None)
    answer_with(runtime, data)
    (found,) = scan(str(proc))
    assert (found.vcpus, found.exits, found.memory) == (2, {}, None)


def test_a_machine_that_does_not_answer(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for longer than a moment."""
    monkeypatch.setattr(status, "ASK_S", 0.05)
    (runtime / "pykvm").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime / "pykvm" / f"{PID}.sock"))
        listener.listen()
        assert status.ask(PID) is None
    assert status.ask(PID) is None and status.ask(PID + 1) is None


def test_a_directory_of_others_is_not_used(runtime: Path) -> None:
    """Where somebody else could have put the socket nothing is asked."""
    (runtime / "pykvm").mkdir(mode=0o777)
    os.chmod(runtime / "pykvm", 0o777)
    answer_with(runtime, b"{}")
    assert status.ask(PID) is None


def test_sockets_of_the_dead_are_removed(runtime: Path) -> None:
    """Those of processes that are gone; ours stays, and so does what is none."""
    (runtime / "pykvm").mkdir(mode=0o700)
    for name in (f"{PID}.sock", f"{os.getpid()}.sock", "other"):
        (runtime / "pykvm" / name).write_text("")
    status.tidy()
    assert sorted(os.listdir(runtime / "pykvm")) == sorted([f"{os.getpid()}.sock", "other"])


def test_the_table() -> None:
    """Names with brackets and escape sequences are shown as they are; the most frequent exits first."""
    sample = Sample(
        7, "[red]v\x1b[2J", "", at=1.0, vcpus=2, rss=3 << 20, memory=64 << 20, exits={"HLT": 5, "IO": 900, "MMIO": 30}
    )
    before = Sample(7, "", "", at=0.0)
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table([rates(before, sample)]))
    text = console.export_text()
    assert "[red]v?[2J" in text and "\x1b" not in text
    assert "935: IO 900, MMIO 30, HLT 5" in text
    assert "3.0M" in text and "64.0M" in text


@pytest.mark.parametrize("words", [["--interval", "0"], ["--interval", "x"], ["--count", "0"], ["7"], ["--what"]])
def test_wrong_usage(words: list[str]) -> None:
    """One line says what is wrong."""
    with pytest.raises(UsageError):
        top(words)
