"""PCI host bridge: configuration mechanism #1, the functions behind it, reset control. Layer: devices.

Eight ports at 0xcf8: the address register (one 32-bit access), in the middle of it the byte-wide reset
control register 0xcf9, and the data window at 0xcfc.

Source: PCI Local Bus Specification 3.0, 3.2.2.3.2 and 6; Intel 440FX PCIset (290549), 3.2.17 (PAM); Intel
82371SB PIIX3 (290550), 2.4.3 (RC, reset control register).
"""

from __future__ import annotations

from _thread import allocate_lock

from pykvm.core.device import Device
from pykvm.core.outcome import Outcome
from pykvm.core.state import U8, U32, Bytes, ListOf, Row, Shape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pykvm.core.state import State

ADDRESS, RESET_CONTROL, DATA = 0, 1, 4

ENABLE = 1 << 31
ADDRESS_BITS = 0x80FF_FFFC
CONFIG_SIZE = 256

RST_SYSTEM, RST_CPU = 1 << 1, 1 << 2  # hard reset if the CPU's bit is set; the CPU's bit resets when it rises

# Type 0 configuration header
VENDOR_ID, DEVICE_ID, COMMAND, STATUS, REVISION, CLASS = 0x00, 0x02, 0x04, 0x06, 0x08, 0x0A
SUBSYSTEM_VENDOR_ID, SUBSYSTEM_ID = 0x2C, 0x2E
CLASS_HOST_BRIDGE = 0x0600
COMMAND_MEMORY, COMMAND_MASTER, COMMAND_SERR = 1 << 1, 1 << 2, 1 << 8

INTEL, I440FX = 0x8086, 0x1237
RED_HAT, QEMU_MACHINE = 0x1AF4, 0x1100  # a firmware takes this subsystem as the sign that fw_cfg is there
PAM, PAM_COUNT = 0x59, 7
SMRAM = 0x72


class PciFunction:
    """One function's 256 bytes of configuration space; `writable` has a one for each bit a guest may set."""

    __slots__ = ("_initial", "config", "writable")

    def __init__(self, vendor: int, device: int, device_class: int, *, revision: int = 0) -> None:
        self.config = bytearray(CONFIG_SIZE)
        self.writable = bytearray(CONFIG_SIZE)
        self.preset(VENDOR_ID, vendor)
        self.preset(DEVICE_ID, device)
        self.preset(REVISION, revision)
        self.preset(CLASS, device_class)

    def preset(self, register: int, value: int, *, writable: int = 0) -> None:
        """The power-on value and the writable bits of a 16-bit register."""
        self.config[register : register + 2] = value.to_bytes(2, "little")
        self.writable[register : register + 2] = writable.to_bytes(2, "little")
        self._initial = bytes(self.config)

    def read(self, register: int, size: int) -> int:
        """`size` bytes at `register`."""
        return int.from_bytes(self.config[register : register + size], "little")

    def write(self, register: int, size: int, value: int) -> None:
        """Change the writable ones of the bits."""
        for index, byte in enumerate(value.to_bytes(size, "little"), register):
            mask = self.writable[index]
            self.config[index] = self.config[index] & ~mask & 0xFF | byte & mask

    def reset(self) -> None:
        """Back to the power-on values."""
        self.config[:] = self._initial


def i440fx() -> PciFunction:
    """The host bridge that every PC firmware for virtual machines knows.

    Its memory attribute registers (PAM) change nothing, because everything below 1 MiB always is RAM here, but
    they keep what is written. Their power-on value, no shadow RAM, makes SeaBIOS copy all of itself from below
    4 GiB to below 1 MiB: it is larger than the 128 KiB that a PC shows there, and a reset wants a fresh copy.
    """
    bridge = PciFunction(INTEL, I440FX, CLASS_HOST_BRIDGE, revision=2)
    bridge.preset(COMMAND, COMMAND_MEMORY | COMMAND_MASTER, writable=COMMAND_SERR)
    bridge.preset(STATUS, 0x0280)  # medium DEVSEL timing, fast back-to-back
    bridge.preset(SUBSYSTEM_VENDOR_ID, RED_HAT)
    bridge.preset(SUBSYSTEM_ID, QEMU_MACHINE)
    bridge.writable[PAM : PAM + PAM_COUNT] = b"\x33" * PAM_COUNT
    return bridge


class PciHost(Device):
    """Ports 0xcf8 to 0xcff. `functions` are (device, function, PciFunction) on bus 0."""

    name = "pci_host"
    length = 8
    shape = Shape(
        1, address=U32, reset_control=U8, functions=ListOf(Row(U8, Bytes(CONFIG_SIZE)), 0, 256)
    )  # functions: (number, configuration space)

    def __init__(self, functions: Iterable[tuple[int, int, PciFunction]] | None = None) -> None:
        chosen = [(0, 0, i440fx())] if functions is None else functions
        self._functions = {device << 3 | number: function for device, number, function in chosen}
        self._lock = allocate_lock()
        self._address = 0
        self._reset_control = 0

    def read(self, offset: int, size: int) -> int:
        """The address register, the reset control register, or `size` bytes of the addressed function."""
        with self._lock:
            if offset >= DATA:
                function = self._addressed()
                if function is not None:
                    return function.read(self._register(offset), size)
            elif (offset, size) == (ADDRESS, 4):
                return self._address
            elif (offset, size) == (RESET_CONTROL, 1):
                return self._reset_control
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> Outcome | None:
        """Set the address, reset the machine, or write to the addressed function."""
        with self._lock:
            if offset >= DATA:
                function = self._addressed()
                if function is not None:
                    function.write(self._register(offset), size, value)
            elif (offset, size) == (ADDRESS, 4):
                self._address = value & ADDRESS_BITS
            elif (offset, size) == (RESET_CONTROL, 1):
                return self._write_reset_control(value)
        return None

    def _addressed(self) -> PciFunction | None:
        """The function that the address register selects; bus 0 is the only one."""
        if not self._address & ENABLE or self._address >> 16 & 0xFF:
            return None
        return self._functions.get(self._address >> 8 & 0xFF)

    def _register(self, offset: int) -> int:
        return (self._address & 0xFC) + offset - DATA

    def _write_reset_control(self, value: int) -> Outcome | None:
        rising = value & RST_CPU & ~self._reset_control
        self._reset_control = value & (RST_SYSTEM | RST_CPU)
        return Outcome.RESET if rising else None

    def save(self) -> State:
        """The two registers, and every function's configuration space."""
        with self._lock:
            spaces = [[number, bytes(each.config)] for number, each in self._functions.items()]
            return {"address": self._address, "reset_control": self._reset_control, "functions": spaces}

    def restore(self, state: State) -> None:
        """Continue from them; a function that is not here is ignored."""
        with self._lock:
            self._address, self._reset_control = state["address"], state["reset_control"]
            for number, config in state["functions"]:
                if number in self._functions:
                    self._functions[number].config[:] = config

    def reset(self) -> None:
        """Power-on state, of the functions too."""
        with self._lock:
            self._address = self._reset_control = 0
            for function in self._functions.values():
                function.reset()
