"""pykvm: a programmable virtual machine monitor over /dev/kvm (Linux, x86-64).

    import pykvm

    with pykvm.Pc("kernel.elf", memory="64M", cpus=2) as vm:
        outcome = vm.run(timeout=10)
        print(outcome, vm.console.text)

The names below are imported when they are first used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.board import Pc
    from pykvm.config import BootConfig, MachineConfig
    from pykvm.control.restore import restore_file
    from pykvm.core.device import Device, IrqLine
    from pykvm.core.machine import Machine
    from pykvm.core.memory import GuestMemory
    from pykvm.core.outcome import Outcome
    from pykvm.core.vcpu import Exit, Vcpu
    from pykvm.debug.symbols import Symbols
    from pykvm.errors import (
        CallError,
        ConfigError,
        DebugUnsupported,
        DeviceError,
        ExpectError,
        GuestAddressError,
        GuestError,
        HostError,
        ImageError,
        KvmError,
        KvmUnavailable,
        MachineStateError,
        MissingCapability,
        PykvmError,
        SnapshotError,
        SymbolError,
        UsageError,
    )
    from pykvm.kvm.system import Kvm
    from pykvm.x86.segments import CpuState, Segment

_HOMES = {
    "pykvm.board": ("Pc",),
    "pykvm.config": ("BootConfig", "MachineConfig"),
    "pykvm.control.restore": ("restore_file",),
    "pykvm.core.device": ("Device", "IrqLine"),
    "pykvm.core.machine": ("Machine",),
    "pykvm.core.memory": ("GuestMemory",),
    "pykvm.core.outcome": ("Outcome",),
    "pykvm.core.vcpu": ("Exit", "Vcpu"),
    "pykvm.debug.symbols": ("Symbols",),
    "pykvm.errors": (
        "CallError", "ConfigError", "DebugUnsupported", "DeviceError", "ExpectError", "GuestAddressError",
        "GuestError", "HostError", "ImageError", "KvmError", "KvmUnavailable", "MachineStateError", "MissingCapability",
        "PykvmError", "SnapshotError", "SymbolError", "UsageError",
    ),
    "pykvm.kvm.system": ("Kvm",),
    "pykvm.x86.segments": ("CpuState", "Segment"),
}  # fmt: skip

__all__ = [
    "BootConfig",
    "CallError",
    "ConfigError",
    "CpuState",
    "DebugUnsupported",
    "Device",
    "DeviceError",
    "Exit",
    "ExpectError",
    "GuestAddressError",
    "GuestError",
    "GuestMemory",
    "HostError",
    "ImageError",
    "IrqLine",
    "Kvm",
    "KvmError",
    "KvmUnavailable",
    "Machine",
    "MachineConfig",
    "MachineStateError",
    "MissingCapability",
    "Outcome",
    "Pc",
    "PykvmError",
    "Segment",
    "SnapshotError",
    "SymbolError",
    "Symbols",
    "UsageError",
    "Vcpu",
    "restore_file",
]


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            value = globals()[name] = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module 'pykvm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
