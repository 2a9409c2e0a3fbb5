"""What exists in the machine, as ACPI and MP table describe it to the guest. Layer: x86."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pykvm.x86.aml import AML


class Platform:
    """Which processors and which fixed devices exist; where they are is `x86.layout`'s to say.

    apic_ids   one per processor, the boot processor first
    ioapic     one IOAPIC with layout.IOAPIC_PINS inputs at layout.IOAPIC
    pic        a pair of 8259s as well (the PC-AT compatibility flag)
    serial     the UARTs present, as indexes of layout.SERIAL_PORTS
    virtio     how many virtio-mmio devices there are, at layout.VIRTIO_MMIO_BASE
    keyboard, mouse, rtc, pci, fw_cfg, pvpanic   whether these are there
    extra      further AML terms for the scope \\_SB
    """

    __slots__ = (
        "apic_ids", "extra", "fw_cfg", "ioapic", "keyboard", "mouse",
        "pci", "pic", "pvpanic", "rtc", "serial", "virtio",
    )  # fmt: skip

    def __init__(
        self,
        apic_ids: Sequence[int] = (0,),
        *,
        ioapic: bool = True,
        pic: bool = True,
        serial: Iterable[int] = (0,),
        keyboard: bool = True,
        mouse: bool = False,
        rtc: bool = True,
        pci: bool = True,
        fw_cfg: bool = False,
        pvpanic: bool = False,
        virtio: int = 0,
        extra: Sequence[AML] = (),
    ) -> None:
        self.apic_ids = tuple(apic_ids)
        self.ioapic = ioapic
        self.pic = pic
        self.serial = tuple(serial)
        self.keyboard = keyboard
        self.mouse = mouse
        self.rtc = rtc
        self.pci = pci
        self.fw_cfg = fw_cfg
        self.pvpanic = pvpanic
        self.virtio = virtio
        self.extra = tuple(extra)
