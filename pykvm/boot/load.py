"""Which loader a file gets. Layer: boot.

With an explicit `options.mode` the file is a flat binary whatever is in it. Otherwise the first that applies:

1. bzImage: "HdrS" at 0x202 and 0xaa55 at 0x1fe (Linux, memtest86+, iPXE). Before multiboot, as QEMU does it: the
   magic is at a fixed place, and files that have both are Linux images first.
2. Multiboot 1 header in the first 8 KiB. Before multiboot 2, which QEMU's -kernel does not know: an image with
   both headers starts as it does there.
3. Multiboot 2 header in the first 32 KiB.
4. ELF with a PVH entry note, or Linux's own ELF file (vmlinux).
5. Any other ELF file, in the mode of its class.
6. A flat binary in real mode, unless the file plainly is something else (compressed, a PE program, a disk image).

Loaders are imported when they are chosen: a run pays for one of them only.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.boot.elf import Elf
    from pykvm.boot.image import Boot, BootOptions, ImageFile
    from pykvm.core.memory import GuestMemory

    Loader = Callable[[GuestMemory, ImageFile, BootOptions], Boot]

PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY, the PVH entry point (xen/include/public/elfnote.h)
LINUX_BANNER = b"Linux version "  # linux_banner, in every vmlinux's .rodata
KERNEL_MAP = 0xFFFF_FFFF_8000_0000  # __START_KERNEL_map: where an x86-64 vmlinux is linked

_NOT_KERNELS = (
    (b"\x1f\x8b", "is compressed by gzip: unpack it first"),
    (b"\xfd7zXZ\0", "is compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd: unpack it first"),
    (b"BZh", "is compressed by bzip2: unpack it first"),
    (b"MZ", "is a DOS, Windows or EFI program"),
    (b"QFI\xfb", "is a qcow2 disk image"),
    (b"!<arch>\n", "is an archive of object files"),
    (b"#!", "is a script"),
)


def load(memory: GuestMemory, image: ImageFile, options: BootOptions) -> Boot:
    """Load `image` with the loader it needs. ImageError names the file and what is wrong with it."""
    return find_loader(image, options)(memory, image, options)


def find_loader(image: ImageFile, options: BootOptions) -> Loader:
    """The loader for `image`, by the rules of this module's docstring."""
    data = image.data
    if options.mode is None:
        if data[0x202:0x206] == b"HdrS" and data[0x1FE:0x200] == b"\x55\xaa":
            from pykvm.boot.linux import load_linux

            return load_linux
        loader = _multiboot_loader(data)
        if loader is not None:
            return loader
        if data[:4] == b"\x7fELF":
            return _elf_loader(image)
        for magic, what in _NOT_KERNELS:
            if data.startswith(magic):
                raise image.error(f"{what} (if it is a flat binary, name its mode: real, protected or long)")
    from pykvm.boot.flat import load_flat

    return load_flat


def _multiboot_loader(data: bytes) -> Loader | None:
    # most files are without either magic: find that out before importing anything
    if data.find(b"\x02\xb0\xad\x1b", 0, 8192) >= 0:
        from pykvm.boot import multiboot

        if multiboot.find_header(data) is not None:
            return multiboot.load_multiboot
    if data.find(b"\xd6\x50\x52\xe8", 0, 32768) >= 0:
        from pykvm.boot import multiboot2

        if multiboot2.find_header(data) is not None:
            return multiboot2.load_multiboot2
    return None


def _elf_loader(image: ImageFile) -> Loader:
    from pykvm.boot.elf import load_elf, parse_elf

    elf = parse_elf(image)
    if is_vmlinux(image, elf) or any(note.name == b"Xen" and note.type == PHYS32_ENTRY for note in elf.notes()):
        from pykvm.boot.pvh import load_vmlinux

        return load_vmlinux
    return load_elf


def is_vmlinux(image: ImageFile, elf: Elf) -> bool:
    """Whether the file is a 64-bit Linux kernel: linked at __START_KERNEL_map, with the banner in it."""
    linked_high = any(each.vaddr >= KERNEL_MAP for each in elf.loads())
    return elf.bits == 64 and linked_high and LINUX_BANNER in image.data
