"""The setup header of a bzImage, and the protocol by which its kernel is entered. Layer: boot.

Source: Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
"""

from __future__ import annotations

import struct

from pykvm.boot.rules import encode_string

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from pykvm.boot.image import ImageFile

    Protocol = Literal["linux64", "linux32", "linux16"]

MAGIC_AT, MAGIC = 0x202, b"HdrS"
HEADER_AT = 0x1F1
HEADER_LIMIT = 0x290  # boot_params has room for the header up to here
SECTOR = 512

# loadflags
LOADED_HIGH, CAN_USE_HEAP = 1 << 0, 1 << 7
# xloadflags
XLF_KERNEL_64, XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 0, 1 << 1

ENTRY64_OFFSET = 0x200
OLDEST_VERSION = 0x202  # older ones take the command line by another way; Linux 2.4.0 has 2.02
OLD_CMDLINE_SIZE = 255
OLD_INITRD_MAX = 0x37FF_FFFF

# name, offset, struct format, first protocol version that has it, value before that
_FIELDS = (
    ("setup_sects", 0x1F1, "B", 0x200, 0),
    ("version", 0x206, "H", 0x200, 0),
    ("loadflags", 0x211, "B", 0x200, 0),
    ("code32_start", 0x214, "I", 0x200, 0),
    ("initrd_addr_max", 0x22C, "I", 0x203, OLD_INITRD_MAX),
    ("syssize", 0x1F4, "I", 0x204, 0),
    ("kernel_alignment", 0x230, "I", 0x205, 0),
    ("relocatable_kernel", 0x234, "B", 0x205, 0),
    ("cmdline_size", 0x238, "I", 0x206, OLD_CMDLINE_SIZE),
    ("payload_offset", 0x248, "I", 0x208, 0),
    ("payload_length", 0x24C, "I", 0x208, 0),
    ("pref_address", 0x258, "Q", 0x20A, 0),
    ("init_size", 0x260, "I", 0x20A, 0),
    ("xloadflags", 0x236, "H", 0x20C, 0),
)


class SetupHeader:
    """The fields that a loader reads, under the names of boot.rst; one that the version lacks has a default.

    setup_bytes is the size of boot sector and setup code: where the protected-mode code starts in the file.
    """

    __slots__ = (*(field[0] for field in _FIELDS), "image", "setup_bytes")

    setup_sects: int
    version: int
    loadflags: int
    code32_start: int
    initrd_addr_max: int
    syssize: int
    kernel_alignment: int
    relocatable_kernel: int
    cmdline_size: int
    payload_offset: int
    payload_length: int
    pref_address: int
    init_size: int
    xloadflags: int

    def __init__(self, image: ImageFile) -> None:
        """Read the header of `image`; ImageError if it is none, truncated or of a version before 2.02."""
        data = image.data
        if data[MAGIC_AT : MAGIC_AT + 4] != MAGIC:
            raise image.error("is not a Linux kernel image (no HdrS signature at 0x202)")
        if len(data) < HEADER_LIMIT:
            raise image.error(f"truncated setup header: the file has {len(data)} bytes")
        self.image = image
        version = struct.unpack_from("<H", data, 0x206)[0]
        if version < OLDEST_VERSION:
            raise image.error(f"boot protocol {_dotted(version)} is too old: 2.02 (Linux 2.4) is the first")
        for name, offset, form, since, default in _FIELDS:
            value = struct.unpack_from("<" + form, data, offset)[0] if version >= since else default
            setattr(self, name, value)
        self.setup_bytes = ((self.setup_sects or 4) + 1) * SECTOR
        self._check_length()

    def _check_length(self) -> None:
        rest = len(self.image.data) - self.setup_bytes
        if rest <= 0:
            raise self.image.error(
                f"truncated: {self.setup_bytes} bytes of setup code, the file has {len(self.image.data)}"
            )
        # syssize counts paragraphs, rounded up; signed kernels have more than it says, never less
        if rest + 15 < self.syssize * 16:
            raise self.image.error(f"truncated: {self.syssize * 16} bytes of code, the file has {rest}")

    @property
    def code(self) -> memoryview:
        """The protected-mode code: everything after the setup code."""
        return memoryview(self.image.data)[self.setup_bytes :]

    @property
    def raw(self) -> bytes:
        """The header as boot_params takes it: from 0x1f1 to the end that its jump instruction names."""
        end = min(0x202 + self.image.data[0x201], HEADER_LIMIT)
        return self.image.data[HEADER_AT:end]

    @property
    def loaded_high(self) -> bool:
        """A bzImage, whose code goes to 1 MiB; a zImage's goes to 64 KiB."""
        return bool(self.loadflags & LOADED_HIGH)

    @property
    def protocol(self) -> Protocol:
        """The way in, the most direct that the header offers.

        linux64  XLF_KERNEL_64 (2.12): long mode at offset 0x200 of the code
        linux32  2.06 and later (where the 32-bit protocol was defined) with a code32_start: 32-bit mode at
                 the start of the code
        linux16  everything else: the setup code in real mode. That is kernels before 2.06, zImages, and
                 images such as ipxe.lkrn whose code32_start is 0: their high part is no code
        """
        if self.xloadflags & XLF_KERNEL_64 and self.loaded_high and len(self.code) > ENTRY64_OFFSET:
            return "linux64"
        if self.version >= 0x206 and self.loaded_high and self.code32_start:
            return "linux32"
        return "linux16"

    @property
    def initrd_limit(self) -> int:
        """The first address that an initrd may not occupy."""
        return self.initrd_addr_max + 1


def encode_cmdline(image: ImageFile, cmdline: str, limit: int) -> bytes:
    """The command line with its NUL. ImageError if it has more than `limit` bytes before that."""
    encoded = encode_string(image, cmdline)
    if len(encoded) > limit + 1:
        raise image.error(f"the command line has {len(encoded) - 1} bytes; this kernel takes at most {limit}")
    return encoded


def _dotted(version: int) -> str:
    return f"{version >> 8}.{version & 0xFF:02}"
