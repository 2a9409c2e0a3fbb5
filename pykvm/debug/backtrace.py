"""Stack traces of a paused vCPU by frame pointers. Layer: debug.

The stack is the guest's: the walk follows RBP only upward, a bounded number of times, and ends where memory does. Code
that keeps no frame pointers (gcc -O2 without -fno-omit-frame-pointer) only gives the innermost frame.

Source: System V ABI AMD64 supplement, 3.2.2 "The Stack Frame".
"""

from __future__ import annotations

from pykvm.errors import GuestAddressError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.machine import Machine
    from pykvm.core.vcpu import Vcpu

MAX_FRAMES = 64
PAGE_SIZE = 4096


class Frame:
    """One call. `pc` is the next instruction (in callers: behind the call), `text` its symbol and source line."""

    __slots__ = ("frame_pointer", "index", "pc", "text")

    def __init__(self, index: int, pc: int, frame_pointer: int, text: str) -> None:
        self.index = index
        self.pc = pc
        self.frame_pointer = frame_pointer
        self.text = text

    def __repr__(self) -> str:
        return f"#{self.index:<2} {self.pc:#x} {self.text}"


def backtrace(machine: Machine, vcpu: Vcpu) -> list[Frame]:
    """From the innermost frame outward; raises MachineStateError while the vCPU runs."""
    debugger, cs = machine.debugger, vcpu.sregs.cs
    word = 8 if cs.l else 4 if cs.db else 2
    base = 0 if cs.l else vcpu.sregs.ss.base
    pc, frame_pointer = debugger.pc(vcpu), vcpu.regs.rbp & (1 << 8 * word) - 1
    frames = [Frame(0, pc, frame_pointer, machine.symbols.locate(pc))]
    while len(frames) < MAX_FRAMES and frame_pointer:
        try:
            data = read_linear(machine, vcpu, base + frame_pointer, 2 * word)
        except GuestAddressError:
            break
        above, pc = int.from_bytes(data[:word], "little"), int.from_bytes(data[word:], "little")
        if not pc:
            break
        pc += 0 if cs.l else cs.base
        frames.append(Frame(len(frames), pc, above, machine.symbols.locate(pc - 1)))  # the call, not what is behind it
        if above <= frame_pointer:
            break
        frame_pointer = above
    return frames


def read_linear(machine: Machine, vcpu: Vcpu, address: int, length: int) -> bytes:
    """Guest memory by linear address, without our breakpoints. Raises GuestAddressError."""
    out = b""
    while len(out) < length:
        at = address + len(out)
        part = min(length - len(out), PAGE_SIZE - at % PAGE_SIZE)
        found = machine.debugger.translate(vcpu, at)
        if found.gpa is None:
            raise GuestAddressError(at, part, found.reason)
        out += machine.debugger.traps.read(found.gpa, part)
    return out
