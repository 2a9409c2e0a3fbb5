"""Small 32-bit kernels in C with DWARF, compiled when a test needs one."""

from __future__ import annotations

import subprocess
from pathlib import Path

FLAGS = (
    "-m32 -march=i386 -g -ffreestanding -fno-pic -fno-stack-protector -fcf-protection=none -fno-optimize-sibling-calls"
)
LINK = "-nostdlib -static -Wl,-Ttext=0x100000,-e,kernel,--build-id=none"


def build(folder: Path, source: str, *flags: str) -> Path:
    """folder/kernel.elf of the C `source`, whose entry is kernel()."""
    (folder / "kernel.c").write_text(source)
    command = ["gcc", *FLAGS.split(), *flags, *LINK.split(), "-o", "kernel.elf", "kernel.c"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "kernel.elf"
