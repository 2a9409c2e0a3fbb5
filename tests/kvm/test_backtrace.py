"""Stack traces by frame pointers, with symbols and source lines."""

from __future__ import annotations

from pathlib import Path

import ckernel
import pytest

from pykvm import Outcome, Pc
from pykvm.debug.backtrace import MAX_FRAMES

RUN_S = 60
SOURCE = """\
__attribute__((noinline)) void inner(int n) {
    __asm__ volatile("outb %%al, $0xf4" : : "a"(n));
}
__attribute__((noinline)) void middle(int n) {
    inner(n + 1);
    __asm__ volatile("");
}
void kernel(void) {
    __asm__ volatile("mov $0x9000, %esp; xor %ebp, %ebp");
    middle(1);
    for (;;)
        __asm__ volatile("hlt");
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 32-bit kernel with frame pointers and DWARF."""
    return ckernel.build(tmp_path_factory.mktemp("kernel"), SOURCE, "-O1", "-fno-omit-frame-pointer")


def test_frames_symbols_lines(kernel: Path) -> None:
    """From the innermost function outward, each with its line."""
    with Pc(str(kernel), memory="16M") as pc:
        assert pc.run(RUN_S) == Outcome("DEBUG_EXIT", 2)
        frames = pc.backtrace()
        names = [frame.text.split("+")[0] for frame in frames]
        assert names[:2] == ["inner", "middle"]
        assert "kernel.c:5)" in frames[1].text
        assert repr(frames[1]).startswith("#1  0x1000")


def test_a_stack_that_leads_nowhere(kernel: Path) -> None:
    """Loops, wild and endless frame chains end the walk; nothing raises."""
    with Pc(str(kernel), memory="16M") as pc:
        regs = pc.vcpus[0].regs
        regs.rbp = 0x200000
        pc.memory.write(0x200000, (0x200000).to_bytes(4, "little") + b"\1\0\0\0")  # a loop
        assert len(pc.backtrace()) == 2
        regs.rbp = 0xFFFF0000  # no memory
        assert len(pc.backtrace()) == 1
        for at in range(0x200000, 0x210000, 8):  # more frames than anybody wants to see
            pc.memory.write(at, (at + 8).to_bytes(4, "little") + b"\1\0\0\0")
        regs.rbp = 0x200000
        assert len(pc.backtrace()) == MAX_FRAMES
