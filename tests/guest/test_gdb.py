"""Debian's kernel, unmodified and running on two CPUs, under gdb and under breakpoints from Python.

QEMU's emulated AMD CPU loads no debug registers for a guest and does not intercept INT3: software breakpoints are port
writes there (pykvm.debug.hostdebug), and hardware ones have to be refused.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm import BootConfig, Outcome, Pc, Vcpu
from pykvm.debug.breakpoints import Breakpoint
from pykvm.debug.hostdebug import debug_support
from pykvm.debug.symbols import Symbols

BOOT_SECONDS = 110  # the lab's CPU is emulated and may share its machine
FUNCTION = "__x64_sys_sethostname"
SCRIPT = f"grep -e ' {FUNCTION}' -e ' _stext' /proc/kallsyms; echo ready; read go; hostname changed; hostname; read go"


@pytest.fixture
def linux(guest_kernel: Path, initramfs: Path) -> Iterator[Pc]:
    """Debian's kernel on two CPUs, its shell waiting for a line; its `symbols` are those that kallsyms printed."""
    boot = BootConfig(
        str(guest_kernel), initrd=str(initramfs), cmdline=f'console=ttyS0 quiet nokaslr pykvm.run="{SCRIPT}"'
    )
    with Pc(boot, memory="256M", cpus=2) as pc:
        pc.start()
        pc.console.expect(r"ready\r?\n", timeout=BOOT_SECONDS)
        listed = [line for line in pc.console.text.splitlines() if re.match(r"[0-9a-f]{16} \w ", line)]
        pc.symbols = Symbols.from_map("\n".join(listed))
        pc.start()
        yield pc


def finish(pc: Pc) -> None:
    """Let the script go on to its end: the guest did what it was asked, and powers off."""
    pc.console.send("\n")
    assert pc.run(BOOT_SECONDS) == Outcome.POWER_OFF, pc.console.text[-2000:]
    assert re.search(r"^changed\r?$", pc.console.text, re.MULTILINE)
    assert "pykvm-initramfs: status 0" in pc.console.text


def test_gdb_in_a_running_linux(linux: Pc) -> None:
    """gdb stops a system call by its address, sees both CPUs, steps, is refused what this KVM lacks, and detaches."""
    if shutil.which("gdb") is None:
        pytest.fail("gdb is not installed: scripts/setup --lab")
    server = linux.gdb_server()
    address = linux.symbols[FUNCTION]
    words = ["gdb", "-nx", "-batch", "-iex", "set width 0"]
    for command in (
        f"target remote {server.address}", "show architecture", "info threads", f"break *{address:#x}", "echo going\\n",
        "continue", "p/x $pc", "p $cr0", "info threads", f"hbreak *{address + 5:#x}", "continue", "delete 2",
        "stepi", f"p (long)$pc - {address:#x}", f"monitor walk {address:#x}", "x/2xb $pc", "delete", "detach",
    ):  # fmt: skip
        words += ["-ex", command]
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        head = []
        while "going\n" not in head:
            head.append(process.stdout.readline())
            assert head[-1], "".join(head)
        linux.console.send("\n")
        output = "".join(head) + process.communicate(timeout=BOOT_SECONDS)[0]
    print(output)
    assert '"auto" (currently "i386:x86-64")' in output
    assert re.search(r"Thread 1 \(vCPU 0, ring [03], \w+\).*\n.*Thread 2 \(vCPU 1, ring [03], \w+\)", output)
    assert re.search(rf"Thread [12] hit Breakpoint 1, 0x{address:016x} in ", output)
    assert f"$1 = {address:#x}" in output
    assert re.search(r"\$2 = \[ PE .*WP .*PG \]", output)
    if not debug_support().breakpoints:
        assert "Cannot insert hardware breakpoint 2." in output
    assert re.search(r"\$3 = [1-9]", output)
    assert f"{address:#x} (4-level paging) -> 0x" in output
    assert "[Inferior 1 (Remote target) detached]" in output
    finish(linux)


def test_breakpoint_in_a_running_linux(linux: Pc) -> None:
    """A Python breakpoint by symbol is hit once, in ring 0 with the address of the new name in a register."""
    rings: list[int] = []

    def on_hit(vcpu: Vcpu, point: Breakpoint) -> None:
        rings.append(vcpu.sregs.cs.dpl)

    point = linux.breakpoint(FUNCTION, on_hit, hardware=False)
    assert point.kind == "software"
    linux.console.send("\n")
    linux.console.expect("changed\r?\n", timeout=BOOT_SECONDS)
    assert rings == [0]
    point.remove()
    finish(linux)


def test_hardware_breakpoint_in_a_running_linux(linux: Pc) -> None:
    """Where KVM honours debug registers one stops there as well; where not, the request is refused."""
    if not debug_support().breakpoints:
        from pykvm.errors import DebugUnsupported

        with pytest.raises(DebugUnsupported, match="hardware breakpoints"):
            linux.breakpoint(FUNCTION, hardware=True)
    else:
        point = linux.breakpoint(FUNCTION, lambda vcpu, point: None, hardware=True)
        linux.console.send("\n")
        linux.console.expect("changed\r?\n", timeout=BOOT_SECONDS)
        assert point.hits == 1
    linux.console.send("\n")
    finish(linux)
