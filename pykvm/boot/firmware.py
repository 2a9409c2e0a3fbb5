"""Firmware (SeaBIOS, OVMF, coreboot): entered at the reset vector. Layer: boot.

A PC decodes the flash chip twice: all of it just below 4 GiB, where the reset vector is, and its last 128 KiB
below 1 MiB, where 16-bit code lives and where chipsets let it be shadowed by RAM. The second place is RAM here
(SeaBIOS writes to it), the first is read-only to the guest.
"""

from __future__ import annotations

from pykvm.boot.image import Boot
from pykvm.boot.rules import refuse_options
from pykvm.core.memory import PAGE_SIZE
from pykvm.x86 import layout
from pykvm.x86.states import reset_vector

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot.image import BootOptions, ImageFile
    from pykvm.core.memory import GuestMemory

SLOT_NAME = "firmware"
LOW_COPY = 128 * layout.KIB


def load_firmware(memory: GuestMemory, image: ImageFile, options: BootOptions) -> Boot:
    """Map the firmware so that its last byte is the last below 4 GiB; adds a read-only slot to `memory`.

    The image may have any size up to layout.MAX_FIRMWARE_SIZE: what a partial page needs is put in front of it.
    Loading again (a machine reset) rewrites the slot that is there. A kernel, an initrd and a command line are no
    business of this loader: firmware gets them from fw_cfg.
    """
    refuse_options(image, options, "firmware", "mode", "entry", "load_addr")
    data = image.data
    if not 0 < len(data) <= layout.MAX_FIRMWARE_SIZE:
        limit = layout.MAX_FIRMWARE_SIZE >> 20
        raise image.error(f"firmware of {len(data)} bytes: at least 1 byte and at most {limit} MiB are expected")
    low_copy = data[-LOW_COPY:]
    low_start = layout.BIOS_AREA_END - len(low_copy)
    if not memory.contains(low_start, len(low_copy)):
        raise image.error(f"firmware needs RAM at [{low_start:#x}, {layout.BIOS_AREA_END:#x})")
    _map_below_4_gib(memory, image)
    memory.write(layout.FIRMWARE_TOP - len(data), data)
    memory.write(low_start, low_copy)
    return Boot("firmware", image.path, layout.RESET_VECTOR, reset_vector())


def _map_below_4_gib(memory: GuestMemory, image: ImageFile) -> None:
    size = (len(image.data) + PAGE_SIZE - 1) & -PAGE_SIZE
    gpa = layout.FIRMWARE_TOP - size
    for slot in memory.slots:
        if (slot.name, slot.gpa, slot.size) == (SLOT_NAME, gpa, size):
            return
        if slot.gpa < layout.FIRMWARE_TOP and gpa < slot.end:
            raise image.error(f"firmware needs [{gpa:#x}, {layout.FIRMWARE_TOP:#x}), which {slot.name} occupies")
    memory.add(gpa, size, readonly=True, name=SLOT_NAME)
