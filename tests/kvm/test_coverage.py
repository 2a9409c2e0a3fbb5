"""Which basic blocks a guest executed, and the files that say so to other programs."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import ckernel
import command
import guests
import pytest

from pykvm import ConfigError, ImageError, Outcome, Pc, UsageError
from pykvm.debug.coverage import Coverage

RUN_S = 60
SOURCE = """\
static void out(unsigned char value) {
    __asm__ volatile("outb %0, $0xf4" : : "a"(value));
}
__attribute__((noinline)) int pick(volatile int *n) {
    if (*n > 3)
        return 7;
    while (*n < 2)
        ++*n;
    return 1;
}
__attribute__((noinline)) int never(int n) {
    return n * 3;
}
int (*volatile unused)(int) = never;
void kernel(void) {
    volatile int n = 0;
    out(pick(&n));
    for (;;)
        __asm__ volatile("hlt");
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 32-bit kernel with DWARF; its source has the lines above."""
    return ckernel.build(tmp_path_factory.mktemp("kernel"), SOURCE, "-O1")


def covered(image: Path, **options: object) -> tuple[Coverage, Pc]:
    """The image run to its end under coverage."""
    with Pc(str(image), memory="16M") as pc:
        coverage = pc.coverage(**options)  # type: ignore[arg-type]
        assert pc.run(RUN_S) == Outcome("DEBUG_EXIT", 1)
        coverage.stop()
        return coverage, pc


def test_blocks_that_ran(kernel: Path) -> None:
    """The branch that was taken and the loop are hit, the other branch and the unused function are not."""
    coverage, _ = covered(kernel)
    functions = coverage.functions()
    assert functions["never"] == (0, 1)
    hit, known = functions["pick"]
    assert 0 < hit < known
    assert coverage.percent < 100
    assert coverage.hit <= set(coverage.blocks)


def test_named_functions(kernel: Path) -> None:
    """Only the functions that were named are looked at; one that does not exist is an error."""
    coverage, _ = covered(kernel, functions=["pick"])
    assert set(coverage.functions()) == {"pick"}
    with Pc(str(kernel), memory="16M") as pc, pytest.raises(KeyError, match="pikc"):
        pc.coverage(functions=["pikc"])


def test_the_guest_is_left_as_it_was(kernel: Path) -> None:
    """Hit blocks get their bytes back at once, the others when the coverage stops."""
    with Pc(str(kernel), memory="16M") as pc:
        before = pc.memory.read(0x100000, 0x100)
        coverage = pc.coverage()
        assert pc.memory.read(0x100000, 0x100) != before
        pc.run(RUN_S)
        coverage.stop()
        assert pc.memory.read(0x100000, 0x100) == before


def test_lcov(kernel: Path, tmp_path: Path) -> None:
    """The tracefile names the source, its functions and lines with what was executed."""
    coverage, _ = covered(kernel)
    coverage.write_lcov(tmp_path / "guest.info")
    record = (tmp_path / "guest.info").read_text().splitlines()
    assert record[0] == "TN:"
    assert record[1].startswith("SF:")
    assert record[1].endswith("kernel.c")
    assert {"FN:4,pick", "FNDA:1,pick", "FN:11,never", "FNDA:0,never", "FNDA:1,kernel"} <= set(record)
    assert {"DA:5,1", "DA:8,1", "DA:12,0"} <= set(record)
    assert record[-1] == "end_of_record"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guest.info"]


def test_drcov(kernel: Path, tmp_path: Path) -> None:
    """The header says how many entries follow; each is an executed block of the module."""
    coverage, _ = covered(kernel)
    coverage.write_drcov(tmp_path / "guest.drcov")
    head, _, entries = (tmp_path / "guest.drcov").read_bytes().partition(b" bbs\n")
    lines = head.decode().splitlines()
    assert lines[:2] == ["DRCOV VERSION: 2", "DRCOV FLAVOR: drcov"]
    assert lines[-1] == f"BB Table: {len(coverage.hit)}"
    assert str(kernel) in lines[-2]
    base = int(lines[-2].split(",")[1], 16)
    found = {(base + offset, size, module) for offset, size, module in struct.iter_unpack("<IHH", entries)}
    assert found == {(address, coverage.blocks[address].size, 0) for address in coverage.hit}


def test_command_line(kernel: Path, images: Path, tmp_path: Path) -> None:
    """`pykvm start --coverage FILE` writes the file at the end; one that cannot be had is refused first."""
    for name, head in (("guest.info", b"TN:\n"), ("guest.drcov", b"DRCOV VERSION: 2\n")):
        done = command.start("--coverage", tmp_path / name, "--debug-exit", kernel)
        assert done.returncode == 3
        assert re.search(r"^pykvm: coverage: \d+ of \d+ blocks, in .*guest", done.stderr, re.MULTILINE)
        assert (tmp_path / name).read_bytes().startswith(head)
    done = command.start("--coverage", tmp_path / "none", images / "hello.bin")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no ELF file" in done.stderr
    done = command.start("--coverage", tmp_path / "x.info", "--debug-exit", images / "smp.elf")
    assert (done.returncode, done.stdout) == (2, "")
    assert "compile it with -g" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guest.drcov", "guest.info"]


def test_several_vcpus() -> None:
    """An SMP guest that runs under coverage ends as without; what all CPUs ran is hit."""
    elf = guests.IMAGES / "obj" / "smp.elf64"
    with guests.pc("smp.elf", "cpus=2", cpus=2) as pc:
        coverage = pc.coverage(elf)
        assert pc.run(RUN_S) == Outcome("DEBUG_EXIT", 0)
        assert guests.text(pc).endswith("smp: 2 of 2 cpus\n")
        hit, known = coverage.functions()["ap_main"]
        assert 0 < hit <= known
        with pytest.raises(ConfigError, match="compile it with -g"):
            coverage.write_lcov("/nonexistent/x")
        with pytest.raises(UsageError, match="/nonexistent/x: No such file"):
            coverage.write_drcov("/nonexistent/x")


def test_what_has_no_functions(images: Path, tmp_path: Path) -> None:
    """A flat image, an ELF of assembler only and a file that is cut off are refused in words."""
    with guests.pc("hello.bin") as pc:
        with pytest.raises(ImageError, match="no ELF file"):
            pc.coverage()
        with pytest.raises(ConfigError, match="no functions"):
            pc.coverage(images / "hello64.elf")
        cut = tmp_path / "cut.elf"
        cut.write_bytes((images / "hello64.elf").read_bytes()[:70])
        with pytest.raises(ImageError, match="no sound x86 ELF"):
            pc.coverage(cut)
