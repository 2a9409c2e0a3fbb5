"""Every guest of images/README.md on a PC: what it prints and how it ends, with each irqchip, with and without C."""

from __future__ import annotations

import random
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from guests import IMAGES, Talk, pc, run, text

from pykvm import BootConfig, Device, ImageError, Outcome, Pc, Vcpu
from pykvm.debug.stats import collect_stats
from pykvm.devices.serial import Serial

pytestmark = pytest.mark.usefixtures("images")

OK = Outcome("DEBUG_EXIT", 0)

PAGING = """\
paging: alias ok
paging: #PF error 0x0 at 0x8000001000
paging: read of a page not present ok
paging: #PF error 0x2 at 0x8000003000
paging: write to a page not present ok
paging: #PF error 0x3 at 0x8000002000
paging: write to a read-only page ok
paging: remapping ok
paging: ok
"""
EXITS = """\
exits: out1 0xa5, in1 0xff
exits: out2 0xa55a, in2 0xffff
exits: out4 0xa55a1234, in4 0xffffffff
exits: rep outs1 1..16, rep ins1 sum 0xff0
exits: rep outs2 1..16, rep ins2 sum 0xffff0
exits: rep outs4 1..16, rep ins4 sum 0xffffffff0
exits: mmio write1 0xa5, read1 0xff
exits: mmio write2 0xa55a, read2 0xffff
exits: mmio write4 0xa55a1234, read4 0xffffffff
exits: mmio write8 0xa55a123456789abc, read8 0xffffffffffffffff
exits: mmio read8 across pages 0xffffffffffffffff
exits: rdmsr 0x12345678 #GP
exits: wrmsr 0x12345678 #GP
exits: cpuid vendor "VENDOR", hypervisor "KVMKVMKVM"
"""
TIMER = """\
timer: PIT 4 ticks at 50 Hz
timer: LAPIC timer N kHz
timer: LAPIC one-shot, 1 interrupt
timer: ok
"""
IRQCHIPS = ("kernel", "split", "none")
# guest, irqchips that it can run with, command line, how it ends, what it prints (as `same` leaves it)
GUESTS: list[tuple[str, tuple[str, ...], str, Outcome, str]] = [
    ("hello.bin", IRQCHIPS, "", Outcome.HALTED, "Hello from real mode\n"),
    ("hello32.elf", IRQCHIPS, "", Outcome.HALTED, "Hello from protected mode\n"),
    ("hello64.elf", IRQCHIPS, "", Outcome.HALTED, "Hello from long mode\n"),
    ("paging.elf", IRQCHIPS, "", OK, PAGING),
    ("exits.elf", ("split", "none"), "hlt=0", OK, EXITS + "exits: done\n"),
    ("exits.elf", ("kernel",), "", OK, EXITS + "exits: hlt, woken by an interrupt\nexits: done\n"),
    ("timer.elf", ("kernel",), "ticks=4 hz=50", OK, TIMER),
    ("ring3.elf", IRQCHIPS, "count=300", OK, ""),
    ("touch.elf", IRQCHIPS, "mib=4", OK, "touch: 4 MiB from 16 MiB, 1024 pages, 1 passes\n"),
]
CASES = [
    pytest.param(name, irqchip, cmdline, outcome, printed, id=f"{name}-{irqchip}")
    for name, irqchips, cmdline, outcome, printed in GUESTS
    for irqchip in irqchips
]


def same(printed: str) -> str:
    """`printed` without what depends on the host."""
    printed = re.sub(r"LAPIC timer \d+ kHz", "LAPIC timer N kHz", printed)
    return re.sub(r'vendor "\w{12}"', 'vendor "VENDOR"', printed)


@pytest.mark.parametrize("c_actions", [True, False], ids=["c", "python"])
@pytest.mark.parametrize(("name", "irqchip", "cmdline", "outcome", "printed"), CASES)
def test_guest(name: str, irqchip: str, cmdline: str, outcome: Outcome, printed: str, c_actions: bool) -> None:
    """The guest prints exactly what its documentation says and ends as it says."""
    ended, seen = run(name, cmdline, irqchip=irqchip, c_actions=c_actions)
    assert (ended, same(seen)) == (outcome, printed)


@pytest.mark.parametrize(
    ("mode", "name", "printed"),
    [
        ("real", "hello.bin", "Hello from real mode\n"),
        ("protected", "hello32.bin", "Hello from protected mode\n"),
        ("long", "hello64.bin", "Hello from long mode\n"),
    ],
)
def test_flat_image_by_its_mode(mode: str, name: str, printed: str) -> None:
    """A flat image with a named mode starts in that mode."""
    assert run(name, boot={"mode": mode}) == (Outcome.HALTED, printed)


def test_flat_image_at_another_place(tmp_path: Path) -> None:
    """--load-addr places a flat image and --entry starts it there: here behind a jump to itself."""
    image = tmp_path / "image.bin"
    image.write_bytes(b"\xeb\xfe" * 8 + (IMAGES / "hello.bin").read_bytes())
    boot = BootConfig(str(image), mode="real", load_addr=0x8000 - 16, entry=16)
    with Pc(boot, memory="1M") as machine:
        code = machine.memory.read(0x8000, 4)
        assert code == (IMAGES / "hello.bin").read_bytes()[:4]
        assert machine.vcpus[0].regs.rip == 16


# -- ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("irqchip", IRQCHIPS)
@pytest.mark.parametrize(
    ("ending", "options", "outcome"),
    [
        ("debug-exit", "", OK),
        ("debug-exit", "code=42", Outcome("DEBUG_EXIT", 42)),
        ("power-off", "", Outcome.POWER_OFF),
        ("i8042", "", Outcome.RESET),
        ("cf9", "", Outcome.RESET),
        ("port92", "", Outcome.RESET),
        ("pvpanic", "", Outcome("CRASH")),
        ("triple-fault", "", Outcome("TRIPLE_FAULT")),
        ("crash", "", Outcome("CRASH")),
        ("halt", "", Outcome.HALTED),
        ("spin", "", Outcome.TIMEOUT),
        ("spin-user", "", Outcome.TIMEOUT),
    ],
)
def test_ending(ending: str, options: str, outcome: Outcome, irqchip: str) -> None:
    """Each way that a guest can end is the Outcome that belongs to it."""
    timeout = {"timeout": 0.5} if outcome == Outcome.TIMEOUT else {}
    ended, seen = run("endings.elf", f"ending={ending} {options}", irqchip=irqchip, **timeout)
    assert (ended, seen) == (outcome, f"ending: {ending}\n")


def test_unexpected_exception() -> None:
    """A guest's own report of a page fault arrives complete, and its code is the end's."""
    ended, seen = run("endings.elf", "ending=exception")
    assert ended == Outcome("DEBUG_EXIT", 0x7F)
    assert re.fullmatch(r"ending: exception\nunexpected exception 14 error 0x0 rip 0x\w+ cr2 0x8000000000\n", seen), (
        seen
    )


def test_waiting_for_ever_is_no_end() -> None:
    """A guest that halts with interrupts on is not dead, though all of them are masked."""
    assert run("endings.elf", "ending=halt-if", timeout=1.5) == (Outcome.TIMEOUT, "ending: halt-if\n")


def test_a_byte_wakes_a_halted_guest() -> None:
    """A guest that has halted for longer than the halt detection looks wakes by the serial port's interrupt."""
    with pc("endings.elf", "ending=halt-serial") as machine:
        talk = Talk(machine)
        machine.start()
        talk.wait_for("halt-serial")
        assert machine.wait(1.0) is None
        talk.send(b"!")
        assert machine.wait(60) == OK
        assert text(machine) == "ending: halt-serial\nending: woken\n"


def test_no_debug_exit_without_the_device() -> None:
    """Without isa-debug-exit the same guest runs on behind the write, and halts."""
    ended, seen = run("endings.elf", "ending=debug-exit", debug_exit=False)
    assert (ended, seen) == (Outcome.HALTED, "ending: debug-exit\n")


def test_crash_keeps_the_place() -> None:
    """The report of a guest that jumped out of memory has its registers and its last words."""
    with pc("endings.elf", "ending=crash") as machine:
        outcome = machine.run(60)
        assert outcome.report is not None
        assert outcome.report.rip == 0xFD000000
        assert outcome.report.console[-1] == "ending: crash"


# -- what boot protocols hand over -----------------------------------------------------------------------------

MULTIBOOT = {"multiboot.elf": "multiboot", "multiboot_kludge.bin": "multiboot", "multiboot2.elf": "multiboot2"}


def regions(machine: Pc, prefix: str) -> list[str]:
    """The lines that a guest prints for the memory map."""
    return [f"{prefix}: region {base:#x} + {size:#x} type {kind}" for base, size, kind in machine.e820()]


@pytest.mark.parametrize("irqchip", IRQCHIPS)
@pytest.mark.parametrize("name", MULTIBOOT)
def test_multiboot_information(name: str, irqchip: str, tmp_path: Path) -> None:
    """A multiboot kernel sees its command line, its modules with their strings, and the memory map."""
    contents = [b"first", random.Random(1).randbytes(70_000), b""]
    files = [tmp_path / f"module {number}" for number in range(3)]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    modules = [(str(files[1]), 'args of "one"'), (str(files[2]), "")]
    prefix = MULTIBOOT[name]
    with pc(name, "a=b  c", boot={"initrd": str(files[0]), "modules": modules}, irqchip=irqchip) as machine:
        outcome = machine.run(60)
        lines = text(machine).splitlines()
        expected = regions(machine, prefix)
    assert outcome == OK, lines
    assert lines[-1] == f"{prefix}: ok"
    path = f"{IMAGES / name} " if prefix == "multiboot" else ""
    assert f'{prefix}: cmdline "{path}a=b  c"' in lines
    assert f'{prefix}: loader "pykvm"' in lines
    assert [line for line in lines if ": region" in line] == expected
    assert f"{prefix}: memory lower 639 KiB, upper {63 << 10} KiB" in lines
    # as GRUB does it: multiboot 2 leaves the file's name out
    strings = ["", 'args of "one"', ""] if prefix == "multiboot2" else []
    strings = strings or [f"{files[0]}", f'{files[1]} args of "one"', f"{files[2]}"]
    assert [line for line in lines if ": module" in line] == [
        f'{prefix}: module "{string}" {len(content)} bytes adler32 {zlib.adler32(content):#x}'
        for string, content in zip(strings, contents, strict=True)
    ]


@pytest.mark.parametrize("irqchip", IRQCHIPS)
def test_pvh_information(irqchip: str, tmp_path: Path) -> None:
    """A PVH kernel sees its command line, its initrd, the memory map and the ACPI tables' root."""
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(range(256)) * 20)
    with pc("pvh.elf", "x=1", boot={"initrd": str(initrd)}, irqchip=irqchip) as machine:
        outcome = machine.run(60)
        lines = text(machine).splitlines()
        assert [line for line in lines if ": region" in line] == regions(machine, "pvh")
    assert (outcome, lines[-1]) == (OK, "pvh: ok")
    assert 'pvh: cmdline "x=1"' in lines
    assert 'pvh: rsdp signature "RSD PTR"' in lines
    adler = zlib.adler32(initrd.read_bytes())
    assert [line for line in lines if ": module" in line] == [f'pvh: module "" 5120 bytes adler32 {adler:#x}']


def test_memory_above_the_pci_hole() -> None:
    """RAM that does not fit under the hole appears at 4 GiB, and costs nothing until it is touched."""
    with pc("multiboot2.elf", memory="6G") as machine:
        assert machine.run(60) == OK
        assert regions(machine, "multiboot2")[-1] in text(machine)
        base, size, _ = machine.e820()[-1]
        assert base == 4 << 30 and base + size - (4 << 30) + machine.memory.slots[0].size == 6 << 30


def test_too_little_memory_is_an_image_error() -> None:
    """A kernel that does not fit is refused with its name, before anything runs."""
    with pytest.raises(ImageError, match=r"multiboot\.elf"):
        pc("multiboot.elf", memory="1M")


@pytest.mark.parametrize("irqchip", IRQCHIPS)
@pytest.mark.parametrize("name", ["hello.bin", "multiboot2.elf"])
def test_reset_boots_again(name: str, irqchip: str) -> None:
    """After reset() the same kernel boots from the start and prints the same."""
    with pc(name, irqchip=irqchip) as machine:
        first = machine.run(60)
        printed = text(machine)
        machine.reset()
        assert machine.outcome is None
        assert machine.run(60) == first
        assert text(machine) == printed * 2


# -- interrupts, timers, several CPUs --------------------------------------------------------------------------


@pytest.mark.parametrize("c_actions", [True, False], ids=["c", "python"])
def test_echo(c_actions: bool) -> None:
    """What is sent to COM1 comes back by the receive interrupt, every byte and in order."""
    data = random.Random(7).randbytes(6000).translate(None, b"\x04\r\n")
    with pc("echo.elf", c_actions=c_actions) as machine:
        talk = Talk(machine)
        machine.start()
        talk.wait_for("echo: ready\n")
        talk.send(data + b"\r\n\x04")
        assert machine.wait(60) == OK
        output = machine.console.data
    start = output.index(b"ready\r\n") + len(b"ready\r\n")
    tail = b"\r\n\r\n\r\necho: %d bytes, by interrupt\r\n" % (len(data) + 2)
    assert output[start:] == data + tail


def test_echo_byte_by_byte() -> None:
    """A person typing: each key comes back before the next is sent."""
    with pc("echo.elf") as machine:
        talk = Talk(machine)
        machine.start()
        talk.wait_for("echo: ready\n")
        for key in "pykvm":
            talk.send(key.encode())
            talk.wait_for(f"{key}")
        talk.send(b"\x04")
        assert machine.wait(60) == OK
        assert text(machine) == "echo: ready\npykvm\necho: 5 bytes, by interrupt\n"


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_smp(cpus: int, irqchip: str) -> None:
    """INIT and SIPI start every other CPU; fw_cfg tells the guest how many there are."""
    ended, seen = run("smp.elf", cpus=cpus, irqchip=irqchip)
    lines = seen.splitlines()
    assert ended == OK, seen
    assert lines[0] == "smp: cpu with APIC id 0 is up"
    assert sorted(lines[:-1]) == [f"smp: cpu with APIC id {number} is up" for number in range(cpus)]
    assert lines[-1] == f"smp: {cpus} of {cpus} cpus"


# -- exits that devices and hooks answer -----------------------------------------------------------------------


class Memory(Device):
    """Remembers writes; reads give back the bytes that were written there."""

    name = "scratch"

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []
        self._bytes = bytearray(0x2000)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))
        self._bytes[offset : offset + size] = value.to_bytes(size, "little")


@pytest.mark.parametrize("c_actions", [True, False], ids=["c", "python"])
def test_exits_answered_by_devices(c_actions: bool) -> None:
    """Ports, MMIO and MSRs of every width reach the owner's devices and hooks, and the answers reach the guest."""
    ports, mmio = Memory(), Memory()
    msrs: list[int] = []

    def write_msr(vcpu: Vcpu, index: int, value: int) -> bool:
        msrs.append(value)
        return True

    with pc("exits.elf", "hlt=0", c_actions=c_actions) as machine:
        machine.attach(ports, ports=range(0x5000, 0x5004))
        machine.attach(mmio, mmio=range(0xFD000000, 0xFD002000))
        machine.on_msr(read=lambda vcpu, index: index << 8, write=write_msr)
        assert machine.run(60) == OK
        seen = text(machine)
    assert ports.writes[:3] == [(0, 1, 0xA5), (0, 2, 0xA55A), (0, 4, 0xA55A1234)]
    assert ports.writes[3:] == [(0, size, number) for size in (1, 2, 4) for number in range(1, 17)]
    # an access wider than 8 bytes, or across pages, comes in parts: here only the reads do
    assert [(size, value) for _, size, value in mmio.writes] == [
        (1, 0xA5),
        (2, 0xA55A),
        (4, 0xA55A1234),
        (8, 0xA55A123456789ABC),
    ]
    for line in (
        "exits: out1 0xa5, in1 0xa5",
        "exits: out2 0xa55a, in2 0xa55a",
        "exits: out4 0xa55a1234, in4 0xa55a1234",
        "exits: mmio write8 0xa55a123456789abc, read8 0xa55a123456789abc",
        "exits: rdmsr 0x12345678 0x1234567800",
        "exits: wrmsr 0x12345678 accepted",
    ):
        assert line in seen.splitlines(), seen
    assert msrs == [0x123400005678]


@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ring3_makes_as_many_exits_as_it_says(size: int, direction: str, ring: int) -> None:
    """The statistics count each of the guest's accesses, from ring 3 as from ring 0."""
    options = f"port=0x5000 count=700 dir={direction} size={size} ring={ring}"
    with pc("ring3.elf", options, stats=True, irqchip="none") as machine:
        assert machine.run(60) == OK
        stats = collect_stats(machine)
    assert stats.ports[0x5000] == ((700, 0) if direction == "in" else (0, 700))
    assert stats.reasons["IO"] == sum(sum(access) for access in stats.ports.values())
    assert stats.reasons["IO"] >= 701  # one more ends it


def test_touch_writes_what_it_says() -> None:
    """Each page that the guest says it wrote holds its address plus the value, and its neighbours hold nothing."""
    with pc("touch.elf", "mib=3 start=20 passes=2 value=0x1000000000") as machine:
        assert machine.run(60) == OK
        assert text(machine) == "touch: 3 MiB from 20 MiB, 768 pages, 2 passes\n"
        for gpa in range(20 << 20, 23 << 20, 4096):
            assert int.from_bytes(machine.memory.read(gpa, 8), "little") == gpa + 0x1000000000
        for gpa in ((20 << 20) - 4096, 23 << 20):
            assert machine.memory.read(gpa, 8) == bytes(8)


@pytest.mark.parametrize("options", ["mib=1 start=1", "mib=100"])
def test_touch_refuses(options: str) -> None:
    """Options that lead outside the RAM end the guest with its code for a bad option."""
    assert run("touch.elf", options)[0] == Outcome("DEBUG_EXIT", 0x7E)


def test_c_answers_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """With c_actions C takes the console's bytes: hardly one of them reaches the device in Python."""
    writes: list[int] = []
    write = Serial.write

    def counted(self: Serial, offset: int, size: int, value: int) -> None:
        writes.append(value)
        write(self, offset, size, value)

    monkeypatch.setattr(Serial, "write", counted)
    assert run("paging.elf", c_actions=True)[1] == PAGING
    with_c = len(writes)
    assert run("paging.elf", c_actions=False)[1] == PAGING
    assert with_c < 20
    assert len(writes) - with_c >= len(PAGING)


def test_an_end_at_once_stops_every_cpu(tmp_path: Path) -> None:
    """A guest that ends while its other CPUs are still being started leaves none of them running."""
    image = tmp_path / "image.bin"
    image.write_bytes(b"\xea\0\0\0\xf0")  # jmp far 0xf000:0, where there is no memory
    for _ in range(30):
        with Pc(BootConfig(str(image), mode="real"), memory="256K", cpus=4) as machine:
            assert machine.run(60).kind == "CRASH"
            assert not any(vcpu.running for vcpu in machine.vcpus)


def test_machines_of_all_kinds_side_by_side() -> None:
    """Several PCs run at once in one process and do not mix their consoles."""
    jobs: list[tuple[str, dict[str, Any], str]] = [
        ("hello.bin", {}, "Hello from real mode\n"),
        ("paging.elf", {"irqchip": "split"}, PAGING),
        ("hello64.elf", {"irqchip": "none"}, "Hello from long mode\n"),
        ("paging.elf", {"cpus": 2}, PAGING),
    ]
    machines = [(pc(name, **options), printed) for name, options, printed in jobs]
    try:
        for machine, _ in machines:
            machine.start()
        for machine, printed in machines:
            assert machine.wait(60) is not None
            assert text(machine) == printed
    finally:
        for machine, _ in machines:
            machine.close()
