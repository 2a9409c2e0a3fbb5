"""The debug console."""

from __future__ import annotations

from pykvm.devices.debugcon import DebugCon


def test_debug_console_prints_and_is_found():
    """Bytes reach the sink; a read gives the 0xe9 that firmware looks for."""
    printed = bytearray()
    console = DebugCon(printed.extend)
    for byte in b"SeaBIOS":
        assert console.write(0, 1, byte) is None
    assert (printed, console.read(0, 1)) == (b"SeaBIOS", 0xE9)


def test_debug_console_prints_only_its_own_byte_of_a_wide_write():
    """The upper bytes of a wide write belong to the next ports."""
    printed = bytearray()
    DebugCon(printed.extend).write(0, 4, 0x44434241)
    assert printed == b"A"
