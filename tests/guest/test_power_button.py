"""The power button, by way of the split irqchip: a level interrupt through our own I/O APIC into Linux's ACPI."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from pykvm import BootConfig, Outcome, Pc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

BOOT_SECONDS = 120  # the lab's CPU is emulated and may share its machine
COUNTER = "/sys/firmware/acpi/interrupts/ff_pwr_btn"  # the kernel's count of this fixed event
READY = b"pykvm-initramfs: cpus online"  # the module is loaded by then
SCRIPT = f"until grep -q ' [1-9]' {COUNTER}; do sleep 0.1; done; grep -H . {COUNTER} /sys/firmware/acpi/interrupts/sci"


def test_power_button(guest_kernel: Path, initrd_with: Callable[..., Path]) -> None:
    """One press is one event in the guest, and the interrupt line falls again: the SCI does not storm."""
    initrd = initrd_with("button")
    boot = BootConfig(str(guest_kernel), initrd=str(initrd), cmdline=f'console=ttyS0 quiet pykvm.run="{SCRIPT}"')
    up = threading.Event()
    with Pc(boot, memory="256M", irqchip="split") as pc:
        pc.console.sink = lambda data: up.set() if READY in pc.console.data else None
        pc.start()
        assert up.wait(BOOT_SECONDS), pc.console.text[-2000:]
        pc.press_power_button()
        assert pc.wait(BOOT_SECONDS) == Outcome.POWER_OFF, pc.console.text[-2000:]
        counts = dict(re.findall(r"interrupts/(\w+):\s*(\d+)", pc.console.text))
    assert counts["ff_pwr_btn"] == "1"
    assert 1 <= int(counts["sci"]) < 10
