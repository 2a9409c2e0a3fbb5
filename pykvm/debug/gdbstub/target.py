"""What gdb is told about the CPU: a Layout for each width that a session can have. Layer: debug.

gdb takes the description when it connects; a guest that changes its mode later is shown through the same one.

Source: GDB manual, appendix G "Target Descriptions", "i386 Features"; the register order is that of GDB's own
features/i386.
"""

from __future__ import annotations

from pykvm.debug.gdbstub.registers import (
    AVX_OFFSET,
    XSTATE_AVX,
    XSTATE_SSE,
    Register,
    Snapshot,
    area,
    control,
    general,
    kernel_gs_base,
    program_counter,
    segment_base,
    selector,
    table_register,
    x87,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.core.vcpu import Vcpu

_GPR64 = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
_GPR32 = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")


class Layout:
    """The registers of a session of `bits` 16, 32 or 64, in gdb's order."""

    def __init__(self, bits: int, *, avx: bool = False) -> None:
        self.bits = bits
        self.avx = avx
        features = [("org.gnu.gdb.i386.core", _core(bits)), ("org.gnu.gdb.i386.sse", _sse(bits))]
        if bits == 64:
            features.append(("org.gnu.gdb.i386.segments", [segment_base("fs"), segment_base("gs")]))
        if avx:
            features.append(("org.gnu.gdb.i386.avx", _avx(bits)))
        features.append(("org.pykvm.gdb.system", _system(bits)))
        self.features = features
        self.registers = [register for _, registers in features for register in registers]
        self.numbers = {register.name: number for number, register in enumerate(self.registers)}

    def xml(self) -> str:
        """target.xml."""
        from pykvm.debug.gdbstub.targettypes import TYPES

        name = {16: "i8086", 32: "i386", 64: "i386:x86-64"}[self.bits]
        lines = ['<?xml version="1.0"?>', '<!DOCTYPE target SYSTEM "gdb-target.dtd">', "<target>"]
        lines.append(f"<architecture>{name}</architecture>")
        for feature, registers in self.features:
            lines.append(f'<feature name="{feature}">')
            lines += TYPES.get(feature, ())
            lines += [register.xml() for register in registers]
            lines.append("</feature>")
        return "\n".join([*lines, "</target>", ""])

    def read(self, vcpu: Vcpu, numbers: Sequence[int] | None = None) -> bytes:
        """These registers (None: all) one after the other. Raises IndexError for a number that is none."""
        values = Snapshot(vcpu)
        chosen = self.registers if numbers is None else [self.registers[number] for number in numbers]
        return b"".join((each.get(values) & (1 << each.bits) - 1).to_bytes(each.size, "little") for each in chosen)

    def write(self, vcpu: Vcpu, data: bytes, number: int | None = None) -> None:
        """Store one register, or all. Raises ValueError for data of another length, UsageError, KvmError."""
        chosen = self.registers if number is None else [self.registers[number]]
        if len(data) != sum(each.size for each in chosen):
            raise ValueError("wrong length of register data")
        values, at = Snapshot(vcpu), 0
        for each in chosen:
            value = int.from_bytes(data[at : at + each.size], "little")
            if value != each.get(values) & (1 << each.bits) - 1:  # segment registers: an equal one is no reload
                each.put(values, value)
            at += each.size
        values.store()


def _core(bits: int) -> list[Register]:
    if bits == 64:
        first = [general(name, 64, name, "data_ptr" if name in ("rbp", "rsp") else "int64") for name in _GPR64]
    else:
        first = [
            general(f"e{name[1:]}", 32, name, "data_ptr" if name in ("rbp", "rsp") else "int32") for name in _GPR32
        ]
    return [
        *first,
        program_counter(64 if bits == 64 else 32),
        general("eflags", 32, "rflags", "i386_eflags"),
        *(selector(name) for name in _SEGMENTS),
        *x87(),
    ]


def _sse(bits: int) -> list[Register]:
    count = 16 if bits == 64 else 8
    vectors = [area(f"xmm{index}", "vec128", 160 + 16 * index, 16, XSTATE_SSE) for index in range(count)]
    return [*vectors, area("mxcsr", "i386_mxcsr", 24, 4, XSTATE_SSE, group="vector")]


def _avx(bits: int) -> list[Register]:
    count = 16 if bits == 64 else 8
    return [area(f"ymm{index}h", "uint128", AVX_OFFSET + 16 * index, 16, XSTATE_AVX) for index in range(count)]


def _system(bits: int) -> list[Register]:
    registers = [control(name) for name in _CONTROL]
    registers += [table_register(name, field) for name in ("gdt", "idt") for field in ("base", "limit")]
    if bits == 64:
        registers.append(kernel_gs_base())
    else:
        registers.append(general("ip", 32, "rip", "int32"))  # without the base of CS, which eip includes
        registers[-1].group = "system"
    return registers
