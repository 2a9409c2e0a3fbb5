"""scripts/lab from outside: streams, exit status, time limit, signals, and nothing left behind. Each test boots it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAB = Path(__file__).resolve().parents[2] / "scripts" / "lab"
BOOT_SECONDS = 100  # 3 to 20 are usual, depending on what else the machine does

pytestmark = [
    pytest.mark.timeout(3 * BOOT_SECONDS),
    pytest.mark.skipif(os.environ.get("PYKVM_LAB") == "1", reason="a lab in the lab takes minutes to start"),
    pytest.mark.skipif(
        not shutil.which("qemu-system-x86_64") and "lab" not in os.environ.get("PYKVM_REQUIRE", ""),
        reason="no QEMU here: scripts/setup --lab",
    ),
]


def lab(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run scripts/lab with a prepared cache."""
    return subprocess.run([LAB, *arguments], input=stdin, capture_output=True, timeout=3 * BOOT_SECONDS, check=False)


def qemu_of(process: subprocess.Popen[bytes]) -> int:
    """The process id of the one child of a running scripts/lab."""
    deadline = time.monotonic() + BOOT_SECONDS
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while time.monotonic() < deadline:
        for child in children.read_text().split():
            if b"qemu" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        time.sleep(0.05)
    raise AssertionError("QEMU was not started")


def wait_for_end(pid: int) -> None:
    """Fail when the process is still there after ten seconds."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"process {pid} was left behind"
        time.sleep(0.05)


def test_a_command_runs_where_kvm_is_real(tmp_path: Path) -> None:
    """Status, streams, environment, working directory, /dev/kvm by kvm_amd, and a shared folder, in one boot."""
    script = f"""
        cd {tmp_path} || exit 1
        read line; echo "read $line"; cat >&2
        grep -q ^kvm_amd /proc/modules && test -c /dev/kvm && echo kvm
        echo "$PYKVM_LAB $PYKVM_HELLO"; test -s "$PYKVM_GUEST_KERNEL" && echo kernel
        echo kept >{tmp_path}/shared/file; echo gone >{tmp_path}/private
        exit 37
    """
    (tmp_path / "shared").mkdir()
    done = lab(
        "--writable", str(tmp_path / "shared"), "--env", "PYKVM_HELLO=a b", "sh", "-c", script, stdin=b"one\nrest\0\r\n"
    )
    assert done.stdout.decode() == "read one\nkvm\n1 a b\nkernel\n"
    assert done.stderr == b"rest\0\r\n"
    assert done.returncode == 37
    assert (tmp_path / "shared" / "file").read_text() == "kept\n"
    assert not (tmp_path / "private").exists()


def test_a_megabyte_passes_unchanged_both_ways() -> None:
    """No byte is lost, doubled or translated between the ports and the pipes, nor when the lab ends."""
    data = b"".join(hashlib.sha256(bytes([n & 255, n >> 8])).digest() for n in range(32768))
    done = lab("sh", "-c", "tee /dev/shm/copy; sha256sum </dev/shm/copy >&2", stdin=data)
    assert done.stdout == data
    assert done.stderr.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_the_time_limit_ends_the_lab() -> None:
    """Status 124, as timeout(1) gives, and a word about it."""
    done = lab("--timeout", "1", "sleep", "1000")
    assert done.returncode == 124
    assert b"--timeout 1 s" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_qemu_behind(number: signal.Signals, tmp_path: Path) -> None:
    """Whatever ends scripts/lab, its QEMU ends at once; its files go unless it was killed."""
    with subprocess.Popen([LAB, "sleep", "1000"], env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        qemu = qemu_of(process)
        assert any(tmp_path.iterdir())
        process.send_signal(number)
        assert process.wait(10) == (-number if number == signal.SIGKILL else 128 + number)
    wait_for_end(qemu)
    assert number == signal.SIGKILL or not any(tmp_path.iterdir())


def test_a_command_that_does_not_exist() -> None:
    """The shell's status for it, and its message."""
    done = lab("no-such-command")
    assert done.returncode == 127
    assert b"no-such-command" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--prepare", "true"], ["--writable", "/no/such", "true"]])
def test_wrong_usage_is_told_without_a_boot(arguments: list[str]) -> None:
    """argparse's status 2 and a usage line."""
    done = lab(*arguments)
    assert done.returncode == 2
    assert b"usage: scripts/lab" in done.stderr
