"""A bzImage split into the parts that firmware takes from fw_cfg."""

from __future__ import annotations

import struct

import pytest
from kernels import MIB, field, make_bzimage, make_e820, make_image

from pykvm.boot.fwlinux import split_for_firmware
from pykvm.boot.image import ImageFile
from pykvm.errors import ImageError

CODE = bytes(range(256)) * 16
INITRD = ImageFile("initrd", b"cpio" * 3000)


def split(data: bytes, *, cmdline: str = "quiet", initrd: ImageFile | None = None, size: int = 64 * MIB):  # type: ignore[no-untyped-def]
    """Split `data` for a machine of `size` bytes."""
    return split_for_firmware(make_image(data), cmdline=cmdline, initrd=initrd, e820=make_e820(size))


def test_parts_are_where_the_option_rom_expects_them() -> None:
    """Setup at 64 KiB, command line at 128 KiB, code at 1 MiB; together they are the file."""
    image = make_bzimage(code=CODE)
    parts = split(image)
    assert [parts[name][0] for name in ("setup", "cmdline", "kernel")] == [0x10000, 0x20000, 0x100000]
    assert parts["kernel"][1] == CODE == image[2048:]
    assert len(parts["setup"][1]) == 2048
    assert parts["cmdline"][1] == b"quiet\0"
    assert parts["initrd"] == (0, b"")


def test_setup_header_is_filled_in() -> None:
    """The firmware does not touch it: loader type, heap, command line and initrd are already there."""
    parts = split(make_bzimage(code=CODE), initrd=INITRD)
    setup = parts["setup"][1]
    assert setup[0x210] == 0xFF
    assert setup[0x211] & 0x81 == 0x81
    assert struct.unpack_from("<H", setup, 0x224)[0] == 0xFE00
    assert field(setup, "code32_start") == 0x100000
    assert struct.unpack_from("<I", setup, 0x228)[0] == 0x20000
    assert struct.unpack_from("<II", setup, 0x218) == (parts["initrd"][0], 12000)


@pytest.mark.parametrize(("limit", "end"), [(0x7FFF_FFFF, 64 * MIB - 256 * 1024), (0x1FF_FFFF, 32 * MIB)])
def test_initrd_keeps_clear_of_limits(limit: int, end: int) -> None:
    """It lies as high as the kernel allows and leaves the firmware the top of RAM for its tables."""
    gpa, data = split(make_bzimage(code=CODE, initrd_addr_max=limit), initrd=INITRD)["initrd"]
    assert data == INITRD.data
    assert gpa % 4096 == 0 and end - 4096 < gpa + len(data) <= end


@pytest.mark.parametrize(
    ("image", "options", "reason"),
    [
        (b"\x7fELF" + bytes(5000), {}, "not a Linux kernel"),
        (make_bzimage(code=CODE, loadflags=0), {}, "zImage"),
        (make_bzimage(code=CODE)[:2048], {}, "truncated"),
        (make_bzimage(code=CODE, setup_sects=128), {}, "setup code"),
        (make_bzimage(code=CODE), {"cmdline": "x" * 2048}, "command line"),
        (make_bzimage(code=bytes(2 * MIB)), {"size": 2 * MIB}, "does not fit into RAM"),
        (make_bzimage(code=CODE), {"initrd": INITRD, "size": 9 * MIB}, "does not fit below"),
    ],
    ids=["elf", "zimage", "truncated", "setup", "cmdline", "kernel", "initrd"],
)
def test_what_firmware_could_not_boot_is_refused(image: bytes, options: dict[str, object], reason: str) -> None:
    """Before the machine starts, with the reason, because the firmware would only hang."""
    with pytest.raises(ImageError, match=reason):
        split(image, **options)
