"""Cold start: one whole process from its creation to its end, with a guest that prints one line and ends."""

from __future__ import annotations

from benchmarks import peers
from benchmarks.measure import Candidate, able, alternate, spawn
from benchmarks.report import Aim, Comparison

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.peers import Setup

ROUNDS = 30
TEXT = "Hello from real mode"
ELF_ARGUMENT = "ending=debug-exit"
DEBUG_EXIT_0 = 1  # (0 << 1) | 1
NOTES = (
    "hello.bin ends with cli; hlt, which pykvm (in-kernel irqchip: it has to find out) and the floor (no irqchip: an "
    "exit) end with status 0. QEMU never ends after it, so that its guests write 0 to port 0xf4.",
    "hello.rom is hello.bin's code as a firmware image, ended by port 0xf4: the least that QEMU can do. endings.elf "
    "is the same multiboot file for all; QEMU loads it by its firmware (microvm's SeaBIOS), pykvm and the floor "
    "themselves.",
    "pykvm and QEMU build a PC with irqchip and ACPI, and their processes' ends include the kernel's closing of such "
    "a VM, which waits for grace periods; the floor has one slot, one vCPU and nothing else. `python -c pass` is what "
    "any Python program costs here.",
    "split is the irqchip without 8259s and PIT, as QEMU is told to have it (pic=off,pit=off): the kernel closes it "
    "without most of that waiting.",
    "CPU is user and system time of the process, the guest's included: it says what a busy machine hides.",
)


def write_rom(path: Path) -> str:
    """A 64 KiB firmware image that prints TEXT on COM1 as hello.bin does, then writes 0 to port 0xf4."""
    # cli; cld; mov si, message; mov dx, 0x3f8; 1: lodsb cs:; test al, al; jz 2f; out dx, al; jmp 1b;
    # 2: out 0xf4, al; 3: hlt; jmp 3b
    message = 0x100
    code = bytes.fromhex("fa fc be") + message.to_bytes(2, "little")
    code += bytes.fromhex("ba f8 03  2e ac  84 c0  74 03  ee  eb f7  e6 f4  f4  eb fd")
    rom = bytearray(b"\xff" * 0x10000)
    rom[: len(code)] = code
    text = TEXT.encode() + b"\r\n\0"
    rom[message : message + len(text)] = text
    rom[0xFFF0:0xFFF3] = b"\xe9" + (0x10000 - 0xFFF3).to_bytes(2, "little")  # the reset vector: jmp 0
    path.write_bytes(rom)
    return str(path)


def candidates(setup: Setup) -> list[Candidate]:
    """Who takes part, in the order of a round."""
    rom, flat, elf = write_rom(setup.folder / "hello.rom"), peers.guest("hello.bin"), peers.guest("endings.elf")
    start = [*setup.pykvm, "start", "--mem", f"{peers.MEMORY_MIB}M"]
    floor = [str(peers.FLOOR), "--mem", str(peers.MEMORY_MIB)]
    ours = setup.environment
    return [
        Candidate("pykvm hello.bin", [*start, flat], 0, TEXT, ours),
        Candidate("pykvm hello.bin split", [*start, "--irqchip", "split", flat], 0, TEXT, ours),
        Candidate("QEMU hello.rom", peers.qemu("-bios", rom), DEBUG_EXIT_0, TEXT),
        Candidate("pykvm hello.rom", [*start, "--debug-exit", "--bios", rom], DEBUG_EXIT_0, TEXT, ours),
        Candidate("floor hello.bin", [*floor, flat], 0, TEXT),
        Candidate(
            "pykvm endings.elf",
            [*start, "--debug-exit", "--append", ELF_ARGUMENT, elf],
            DEBUG_EXIT_0,
            "ending: debug-exit",
            ours,
        ),
        Candidate(
            "QEMU endings.elf",
            peers.qemu("-kernel", elf, "-append", ELF_ARGUMENT),
            DEBUG_EXIT_0,
            "ending: debug-exit",
        ),
        Candidate("floor endings.elf", [*floor, elf, ELF_ARGUMENT], DEBUG_EXIT_0, "ending: debug-exit"),
        Candidate("python -c pass", [setup.python, "-c", "pass"]),
    ]


def measure(candidate: Candidate) -> dict[str, float]:
    """Milliseconds of one process."""
    run = spawn(candidate)
    return {"wall": run.wall_s * 1e3, "CPU": run.cpu_s * 1e3}


def run(setup: Setup) -> Comparison:
    """Measure it."""
    good, skipped = able(candidates(setup), measure)
    rounds = setup.rounds or ROUNDS
    series = alternate(good, rounds, measure, setup.say)
    aims = []
    for ours, theirs in (
        ("pykvm hello.bin", "QEMU hello.rom"),
        ("pykvm hello.bin split", "QEMU hello.rom"),
        ("pykvm hello.rom", "QEMU hello.rom"),
        ("pykvm endings.elf", "QEMU endings.elf"),
    ):
        if ours in series and theirs in series:
            ratio = series[ours]["wall"].over(series[theirs]["wall"])
            aims.append(Aim(f"{ours} / {theirs}, aim not above 1", ratio))
    return Comparison(
        name="start",
        title=f"cold start of a whole process, {peers.MEMORY_MIB} MiB guest",
        rounds=rounds,
        candidates=good,
        units={"wall": "ms", "CPU": "ms"},
        series=series,
        references=("floor hello.bin", "QEMU hello.rom", "QEMU endings.elf"),
        aims=aims,
        skipped=skipped,
        notes=NOTES,
    )
