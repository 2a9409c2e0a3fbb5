"""The `pykvm` command as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pykvm

COMMAND = [sys.executable, "-m", "pykvm"]
SECONDS = 120.0  # for one run; a loaded machine or the lab is slow, a hang is for ever

# mov $0x3f8, %dx; mov $'x', %al; 1: out %al, %dx; jmp 1b: prints for ever
FLOOD = b"\xba\xf8\x03\xb0x\xee\xeb\xfd"


def environment() -> dict[str, str]:
    """Ours, with the pykvm that the tests import."""
    return {**os.environ, "PYTHONPATH": str(Path(pykvm.__file__).parents[1])}


def run(*arguments: str | bytes | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `pykvm ARGUMENT...` to its end; stdin is empty unless `input` or `stdin` is given."""
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    for stream in ("stdout", "stderr"):
        options.setdefault(stream, subprocess.PIPE)
    command = [*COMMAND, *arguments]
    return subprocess.run(
        command, text=True, env=environment(), timeout=SECONDS, check=False, errors="replace", **options
    )


def start(*arguments: str | bytes | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `pykvm start ARGUMENT...` to its end."""
    return run("start", *arguments, **options)


def spawn(*arguments: str | bytes | Path, **options: Any) -> subprocess.Popen[bytes]:
    """Start `pykvm start ARGUMENT...` with pipes, leader of a process group of its own."""
    for stream in ("stdin", "stdout", "stderr"):
        options.setdefault(stream, subprocess.PIPE)
    return subprocess.Popen([*COMMAND, "start", *arguments], env=environment(), start_new_session=True, **options)
