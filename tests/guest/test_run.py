"""`pykvm run` in the lab: a command in a machine that has the lab's files, with its streams and its exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 120  # for one boot; the lab's CPU is emulated and may share its machine


def run(*words: str, stdin: bytes = b"", cwd: Path | None = None, timeout: float = SECONDS) -> tuple[int, bytes, bytes]:
    """pykvm run WORDS...: its status, stdout and stderr."""
    command = [sys.executable, "-m", "pykvm", "run", "--kernel", os.environ["PYKVM_GUEST_KERNEL"], *words]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        command, input=stdin, capture_output=True, check=False, cwd=cwd, timeout=timeout, env=environment
    )
    return done.returncode, done.stdout, done.stderr


def test_a_command_with_everything(tmp_path: Path) -> None:
    """Status, both streams byte for byte, stdin, folder, environment; the overlay keeps writes, a share not."""
    shared = tmp_path / "with space"
    shared.mkdir()
    (tmp_path / "here").write_text("visible")
    script = (
        "cat here; uname -r >&2; echo lost >new; echo gone >here; echo kept >'with space/out'; "
        "echo :$WORD:; sha256sum; head -c 300000 /dev/zero; exit 3"
    )
    data = bytes(range(256)) * 1000
    status, out, err = run("--env", "WORD=a 'b", "--share", str(shared), "--", "sh", "-c", script,
                           stdin=data, cwd=tmp_path)  # fmt: skip
    assert status == 3, (out[-1000:], err[-3000:])
    import hashlib

    assert out == b"visible:a 'b:\n" + hashlib.sha256(data).hexdigest().encode() + b"  -\n" + bytes(300000)
    assert err.decode().strip() in os.environ["PYKVM_GUEST_MODULES"] or b"cloud" in err
    assert (tmp_path / "here").read_text() == "visible"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "with space"]
    assert (shared / "out").read_text() == "kept\n"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--append", "init=/nowhere rdinit=/nowhere", "--", "true"), 6, b"Kernel panic - not syncing"),
        (("--timeout", "5", "--", "sleep", "1000"), 124, b"still running after 5 s"),
    ],
)
def test_other_ends(words: tuple[str, ...], status: int, said: bytes) -> None:
    """A panic and a timeout have a status of their own, and a line that says so."""
    got, _, err = run(*words)
    assert got == status and said in err, err[-3000:]
