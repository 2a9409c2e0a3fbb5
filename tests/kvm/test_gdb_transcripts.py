"""Debian's gdb drives our kernels in 16, 32 and 64 bit, with one and several vCPUs: its own transcripts."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import ckernel
import gdb as gdbs
import guests
import pytest
from gdb import gdb, lines
from realmode import BASE, SPIN, machine

from pykvm import Outcome, Pc
from pykvm.debug.hostdebug import debug_support

DETACHED = "[Inferior 1 (Remote target) detached]"
MODES = pytest.mark.parametrize(
    ("name", "where", "pc", "message"),
    [
        ("hello32.elf", "next", "eip", "Hello from protected mode"),
        ("hello64.elf", "next", "rip", "Hello from long mode"),
    ],
)


@MODES
def test_breakpoint_registers_memory(name: str, where: str, pc: str, message: str) -> None:
    """A breakpoint by symbol stops there; registers, memory and code are the guest's; a detached guest goes on."""
    with guests.pc(name) as vm:
        output = gdb(
            vm, f"break {where}", "continue", f"info symbol ${pc}", "x/s message", "p/x $cs", "p $cr0", "x/2i $pc",
            "delete", "stepi", "p (char)$al", "detach", symbols=name,
        )  # fmt: skip
        address = vm.symbols[where]
        width = 16 if pc == "rip" else 8
        lines(output, f"Breakpoint 1, 0x{address:0{width}x} in next ()", "next in section .text")
        assert f'<message>:\t"{message}\\r\\n"' in output
        assert "= 0x10" in output
        assert "[ PE ET" in output
        assert re.search(rf"=> {address:#x} <next>:\tlods", output)
        lines(output, "$3 = 72 'H'", DETACHED)
        assert vm.wait(gdbs.SECONDS) == Outcome.HALTED
        assert guests.text(vm) == f"{message}\n"


def test_real_mode() -> None:
    """In real mode addresses are linear, eip too; breakpoints, steps and 16-bit disassembly work."""
    with guests.pc("hello.bin") as vm:
        output = gdb(
            vm, "show architecture", "x/2i $pc", "break *0x10002", "continue", "stepi", "info registers eip ip cs",
            "set $cx = 0x1234", "p/x $ecx", "detach",
        )  # fmt: skip
        lines(output, 'The target architecture is set to "auto" (currently "i8086").')
        assert re.search(r"=> 0x10000:\tcli\s+0x10001:\tcld", output)
        lines(output, "Breakpoint 1, 0x00010002 in ?? ()", "0x00010004 in ?? ()")
        assert re.search(r"eip +0x10004 .*\nip +0x4 .*\ncs +0x1000 ", output)
        lines(output, "$1 = 0x1234", DETACHED)
        assert vm.wait(gdbs.SECONDS) == Outcome.HALTED
        assert guests.text(vm) == "Hello from real mode\n"


def test_one_thread_for_each_vcpu() -> None:
    """Every processor that starts hits the breakpoint; `info threads` says what each one does."""
    with guests.pc("smp.elf", "cpus=3", cpus=3) as vm:
        output = gdb(
            vm, "info threads", "break ap_main", "continue", "info threads", "continue", "delete", "continue",
            symbols="obj/smp.elf64", arch="64",
        )  # fmt: skip
        assert "Thread 1 (vCPU 0, ring 0, runs)" in output
        assert "Thread 2 (vCPU 1, ring 0, waits for INIT)" in output
        hits = re.findall(r"Thread (\d) hit Breakpoint 1, 0x\w+ in ap_main \(\)", output)
        assert sorted(hits) == ["2", "3"]
        assert re.search(r"\* [23] +Thread [23] \(vCPU [12], ring 0, runs\) +0x\w+ in ap_main", output)
        lines(output, "[Inferior 1 (Remote target) exited with code 01]")  # debug-exit 0, as QEMU has it
        assert vm.wait(gdbs.SECONDS) == Outcome("DEBUG_EXIT", 0)
        assert guests.text(vm).endswith("smp: 3 of 3 cpus\n")


def test_a_step_of_one_thread_leaves_the_others() -> None:
    """With scheduler-locking only the current thread moves."""
    with guests.pc("smp.elf", "cpus=2", cpus=2) as vm:
        output = gdb(
            vm, "break ap_main", "continue", "delete", "set scheduler-locking on", "thread 1", "p/x $rip", "thread 2",
            "stepi", "p/x $rip - (long)&ap_main", "thread 1", "p/x $rip", "set scheduler-locking off", "continue",
            symbols="obj/smp.elf64", arch="64",
        )  # fmt: skip
        first, moved, again = re.findall(r"^\$\d = (0x\w+)", output, re.MULTILINE)
        assert first == again
        assert int(moved, 16) != 0
        assert vm.wait(gdbs.SECONDS) == Outcome("DEBUG_EXIT", 0)


def test_hardware_breakpoints() -> None:
    """Four are to be had, the fifth is refused in words; a host that honours none says that."""
    with guests.pc("hello64.elf") as vm:
        places = ["hbreak next", *(f"hbreak *(next + {offset})" for offset in (1, 3, 5, 6))]
        output = gdb(vm, *places, "continue", "delete 5", "continue", "detach", symbols="hello64.elf")
        assert "Could not insert hardware breakpoint 5" in output or "Cannot insert hardware breakpoint 5" in output
        if debug_support().breakpoints:
            lines(output, f"Breakpoint 1, 0x{vm.symbols['next']:016x} in next ()")
        assert DETACHED in output
        assert vm.wait(gdbs.SECONDS) == Outcome.HALTED


@pytest.mark.parametrize(("kind", "word"), [("watch", "watchpoint"), ("awatch", "access (read/write) watchpoint")])
def test_watchpoints(kind: str, word: str) -> None:
    """A watched variable stops the guest after it changed; where KVM cannot watch, gdb is told so and nothing hangs."""
    with guests.pc("smp.elf", "cpus=2", cpus=2) as vm:
        output = gdb(
            vm, f"{kind} *(int *)&ap_next", "continue", "info symbol $pc", "delete", "kill",
            symbols="obj/smp.elf64", arch="64",
        )  # fmt: skip
        if debug_support().watchpoints:
            assert f"hit Hardware {word} 1: *(int *)&ap_next" in output
            assert "ap_start64" in output
        else:
            assert "Could not insert hardware watchpoint 1." in output
        assert vm.wait(gdbs.SECONDS) == Outcome.STOPPED


def test_ctrl_c_stops_a_running_guest() -> None:
    """SIGINT to gdb interrupts a guest that spins; afterwards it can be looked at and ended."""
    gdbs.need_gdb()
    with machine(SPIN) as vm:
        server = vm.gdb_server(wait=True)
        vm.start()
        words = gdbs.command(server, "echo going\\n", "continue", "info registers eip", "kill")
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while process.stdout.readline() != "going\n":
                pass
            while not vm.vcpus[0].running:
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=gdbs.SECONDS)
        lines(output, "Program received signal SIGINT, Interrupt.")
        assert re.search(rf"eip +{BASE:#x} ", output)
        assert vm.wait(gdbs.SECONDS) == Outcome.STOPPED


@pytest.mark.parametrize(
    ("ending", "shown", "kind"),
    [
        ("crash", "Program received signal SIGILL, Illegal instruction.", "CRASH"),
        ("triple-fault", "Program received signal SIGSEGV, Segmentation fault.", "TRIPLE_FAULT"),
    ],
)
def test_a_crash_can_be_looked_at(ending: str, shown: str, kind: str) -> None:
    """A guest that cannot go on stops as after a signal, its registers still there; going on ends the machine."""
    with guests.pc("endings.elf", f"ending={ending}") as vm:
        output = gdb(vm, "continue", "p $pc != 0", "continue", symbols="obj/endings.elf64", arch="64")
        assert f"pykvm: {kind}: " in output
        lines(output, shown, "$1 = 1", "[Inferior 1 (Remote target) exited with code 06]")
        outcome = vm.wait(gdbs.SECONDS)
        assert outcome is not None
        assert outcome.kind == kind
        assert outcome.report is not None


SOURCE = """\
volatile int total;
__attribute__((noinline)) int add(int a, int b) {
    int sum = a + b;
    total += sum;
    return sum;
}
void kernel(void) {
    __asm__ volatile("mov $0x9000, %esp");
    for (int i = 0; i < 5; i++)
        add(i, 10 * i);
    __asm__ volatile("outb %%al, $0xf4" : : "a"(total));
    for (;;)
        __asm__ volatile("hlt");
}
"""


def test_source_level(tmp_path: Path) -> None:
    """With the kernel's DWARF gdb breaks at lines, on conditions, walks lines, finishes functions, shows variables."""
    image = ckernel.build(tmp_path, SOURCE, "-O0")
    with Pc(str(image), memory="16M") as vm:
        output = gdb(
            vm, f"file {image}", "break add if a == 3", "continue", "print a + b", "next", "next", "print sum", "bt",
            "finish", "print total", "delete", "set can-use-hw-watchpoints 0", "watch total", "continue",
            "delete", "continue",
        )  # fmt: skip
        lines(output, "Breakpoint 1, add (a=3, b=30) at kernel.c:3", "$1 = 33", "$2 = 33")
        assert re.search(r"#0 +add \(a=3, b=30\) at kernel.c:5\n#1 +0x\w+ in kernel \(\) at kernel.c:10", output)
        lines(output, "Value returned is $3 = 33", "$4 = 66")
        lines(output, "Watchpoint 2: total", "Old value = 66", "New value = 110")  # by single steps
        assert vm.wait(gdbs.SECONDS) == Outcome("DEBUG_EXIT", 110)


def test_monitor_commands() -> None:
    """`monitor` shows exits, registers and page walks; what it does not know it says."""
    with guests.pc("hello64.elf") as vm:
        output = gdb(
            vm, "monitor help", "monitor support", "monitor walk 0x100000", "monitor walk 0x8000000000", "monitor regs",
            "monitor exits", "monitor dance", "monitor walk x", "detach", symbols="hello64.elf",
        )  # fmt: skip
        assert "walk ADDRESS" in output
        assert f"software breakpoints by {debug_support().trap.name}" in output
        assert "0x100000 (4-level paging) -> 0x100000" in output
        assert "0x8000000000 (4-level paging) is not present (PML4E)" in output
        assert "rip 0000000000100000" in output
        assert "exits by reason" in output
        assert "pykvm has no monitor command 'dance'" in output
        assert "walk: invalid literal" in output


def test_monitor_snapshot_and_restore() -> None:
    """A kept state comes back with its registers and memory, breakpoints stay, and the guest goes on from there."""
    with guests.pc("hello64.elf") as vm:
        output = gdb(
            vm, "break next", "continue", "monitor snapshot here", "stepi", "stepi", "set $rsi = 0",
            "set var *(char *)&message = 'J'", "monitor restore here", "maintenance flush register-cache",
            "p $pc == next", "x/s message", "monitor restore there", "stepi", "continue", "delete", "detach",
            symbols="hello64.elf",
        )  # fmt: skip
        address = vm.symbols["next"]
        lines(output, "snapshot here: done", "restore here: done; now: maintenance flush register-cache", "$1 = 1")
        assert '"Hello from long mode\\r\\n"' in output
        assert "no snapshot 'there'; there are: here" in output
        assert output.count(f"Breakpoint 1, 0x{address:016x} in next ()") == 2
        assert vm.wait(gdbs.SECONDS) == Outcome.HALTED
        assert guests.text(vm) == "Hello from long mode\n"


def test_physical_memory() -> None:
    """Qqemu.PhyMemMode turns addresses into physical ones and back."""
    with guests.pc("hello64.elf") as vm:
        output = gdb(
            vm, "x/x 0x8000000000", "x/3xb 0x100000", "maintenance packet Qqemu.PhyMemMode:1", "x/3xb 0x100000",
            "x/x 0x8000000000", "maintenance packet Qqemu.PhyMemMode:0", "set var *(char *)0x9000000 = 1", "detach",
            symbols="hello64.elf",
        )  # fmt: skip
        assert output.count("0x100000 <_start>:\t0xfa\t0xfc\t0x48") == 2
        assert output.count("Cannot access memory at address 0x8000000000") == 2
        assert "Cannot access memory at address 0x9000000" in output


def test_ring3_steps_or_says_that_it_cannot() -> None:
    """stepi in ring 3 either moves on or is an error at once; the guest stays alive."""
    gdbs.need_gdb()
    with guests.pc("ring3.elf", "count=100000000") as vm:
        server = vm.gdb_server(arch="64")
        vm.start()
        for _ in range(100):
            vm.wait(0.1)
            vm.pause()
            ring = vm.vcpus[0].sregs.ss.dpl
            vm.start()
            if ring == 3:
                break
        else:
            pytest.fail("the guest does not reach ring 3")
        output = gdb(server, "p/x $cs", "set $before = $pc", "stepi", "p $pc != $before", "detach")
        lines(output, "$1 = 0x2b")
        if debug_support().user_step:
            lines(output, "$2 = 1", DETACHED)
        else:
            assert "pykvm: this host's KVM cannot single-step ring 3" in output
            assert "Remote failure reply: E5f" in output
            lines(output, "$2 = 0", DETACHED)
        assert vm.wait(0.1) is None
        assert vm.running


def test_registers_can_be_written() -> None:
    """General, SSE, AVX, x87 and system registers keep what gdb writes, and KVM has it."""
    with guests.pc("hello64.elf") as vm:
        output = gdb(
            vm, "set $r9 = 0x123456789abcdef0", "p/x $r9", "set $xmm3.uint128 = 7", "p $xmm3.uint128", "set $st0 = 1.5",
            "p $st0", "set $fs_base = 0x1234", "p/x $fs_base", "set $eflags = 0x246", "p $eflags", "set $cs = 8",
            "p $mxcsr", "detach", symbols="hello64.elf",
        )  # fmt: skip
        lines(output, "$1 = 0x123456789abcdef0", "$2 = 7", "$3 = 1.5", "$4 = 0x1234", "$5 = [ PF ZF IF ]")
        assert 'Could not write register "cs"' in output  # no descriptor is loaded by that
        lines(output, "$6 = [ IM DM ZM OM UM PM ]")
        vm.wait(gdbs.SECONDS)
        assert vm.vcpus[0].regs.r9 == 0x123456789ABCDEF0
        assert bytes(vm.vcpus[0].fd.get_fpu().xmm[3]) == b"\7" + bytes(15)


def test_avx_registers() -> None:
    """Where the guest's CPU has AVX, the upper halves are there to read and write."""
    with guests.pc("hello64.elf") as vm:
        entry = next(each for each in vm.vcpus[0].fd.get_cpuid2() if each[0] == 1)
        output = gdb(vm, "set $ymm5.v2_int128[1] = 99", "p $ymm5.v2_int128", "detach", symbols="hello64.elf")
        if entry[5] >> 28 & 1:
            lines(output, "$1 = {0, 99}")
        else:
            assert "component of a value that is not a structure" in output
