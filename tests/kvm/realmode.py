"""Tiny real-mode guests as bytes, and the machine that runs them."""

from __future__ import annotations

from typing import Any

from pykvm import Machine
from pykvm.x86.states import real_mode

BASE = 0x1000

HLT = b"\xf4"
CLI_HLT = b"\xfa\xf4"
STI_HLT = b"\xfb\xf4"
SPIN = b"\xeb\xfe"  # jmp .


def mov_al(value: int) -> bytes:
    """mov $value, %al"""
    return bytes([0xB0, value])


def out_al(port: int) -> bytes:
    """out %al, $port"""
    return bytes([0xE6, port])


def in_al(port: int) -> bytes:
    """in $port, %al"""
    return bytes([0xE4, port])


def out_loop(port: int, count: int) -> bytes:
    """mov $count, %cx; 1: out %al, $port; loop 1b"""
    return b"\xb9" + count.to_bytes(2, "little") + out_al(port) + b"\xe2\xfc"


def machine(code: bytes, **options: Any) -> Machine:
    """A bare machine without irqchip (unless asked for) that starts `code` in real mode at BASE."""
    options.setdefault("memory", "1M")
    options.setdefault("irqchip", "none")
    vm = Machine(**options)
    vm.memory.write(BASE, code)
    vm.vcpus[0].load_state(real_mode(BASE >> 4, 0, sp=0x800))
    return vm
