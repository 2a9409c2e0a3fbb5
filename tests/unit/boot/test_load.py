"""Which loader a file gets."""

from __future__ import annotations

import subprocess
import sys

import pytest
from builders import (
    CODE,
    MIB,
    Section,
    Segment,
    elf,
    file,
    guest_ram,
    multiboot2_header,
    multiboot_header,
    note,
    options,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.boot.image import Boot
from pykvm.boot.load import find_loader, load
from pykvm.errors import ImageError
from pykvm.x86.guest_checks import check_guest_state

BZIMAGE = bytes(0x1FE) + b"\x55\xaa\x00\x00HdrS" + bytes(0x3000)
HIGH = Segment(MIB, b"\0Linux version 6.12 " + CODE, vaddr=0xFFFFFFFF80100000)
PVH = note(b"Xen", 18, MIB.to_bytes(4, "little"))
BOTH = multiboot_header() + bytes(4) + multiboot2_header()

CASES = [
    ("empty", b"", "load_flat"),
    ("code", CODE, "load_flat"),
    ("boot sector", CODE + bytes(505) + b"\x55\xaa", "load_flat"),
    ("bzImage", BZIMAGE, "load_linux"),
    ("bzImage with a multiboot header inside", BZIMAGE[:0x400] + multiboot_header() + BZIMAGE, "load_linux"),
    ("HdrS without the boot flag", BZIMAGE.replace(b"\x55\xaa", b"\0\0"), "load_flat"),
    ("multiboot", multiboot_header(), "load_multiboot"),
    ("multiboot 2", multiboot2_header(), "load_multiboot2"),
    ("both multiboot headers", BOTH, "load_multiboot"),
    ("broken multiboot, good multiboot 2", multiboot_header(checksum=1) + bytes(4) + multiboot2_header(),
     "load_multiboot2"),
    ("broken multiboot header", multiboot_header(checksum=1), "load_flat"),
    ("multiboot ELF", elf(64, [Segment(MIB)], prefix=multiboot_header()), "load_multiboot"),
    ("multiboot 2 ELF", elf(64, [Segment(MIB)], prefix=multiboot2_header()), "load_multiboot2"),
    ("multiboot before PVH", elf(32, [PVH, Segment(MIB)], prefix=multiboot_header()), "load_multiboot"),
    ("elf32", elf(32, [Segment(MIB)]), "load_elf"),
    ("elf64", elf(64, [Segment(MIB)]), "load_elf"),
    ("elf64 in the higher half", elf(64, [Segment(MIB, vaddr=0xFFFFFFFF80100000)]), "load_elf"),
    ("PVH, 32-bit", elf(32, [PVH, Segment(MIB)]), "load_vmlinux"),
    ("PVH, 64-bit", elf(64, [PVH, Segment(MIB)]), "load_vmlinux"),
    ("another of Xen's notes", elf(64, [note(b"Xen", 6, b"linux\0"), Segment(MIB)]), "load_elf"),
    ("another's note 18", elf(64, [note(b"GNU", 18, bytes(4)), Segment(MIB)]), "load_elf"),
    ("vmlinux", elf(64, [HIGH]), "load_vmlinux"),
    ("a text about Linux", elf(64, [Segment(MIB, b"Linux version 6.12")]), "load_elf"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "loader"), CASES, ids=[name for name, _, _ in CASES])
def test_the_first_rule_that_applies_wins(name: str, data: bytes, loader: str) -> None:
    """The order of the rules is the documented one."""
    assert find_loader(file(data), options()).__name__ == loader, name


@pytest.mark.parametrize(("name", "data", "loader"), CASES, ids=[name for name, _, _ in CASES])
def test_an_explicit_mode_means_flat(name: str, data: bytes, loader: str) -> None:
    """With a mode nothing in the file counts."""
    assert find_loader(file(data), options(mode="protected")).__name__ == "load_flat", (name, loader)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x1f\x8b\x08" + CODE, "compressed by gzip"),
        (b"\xfd7zXZ\0" + CODE, "compressed by xz"),
        (b"\x28\xb5\x2f\xfd" + CODE, "compressed by zstd"),
        (b"BZh9" + CODE, "compressed by bzip2"),
        (b"MZ" + bytes(600), "DOS, Windows or EFI program"),
        (b"QFI\xfb" + CODE, "qcow2"),
        (b"#!/bin/sh\n", "a script"),
        (b"!<arch>\n", "archive"),
        (b"\x7fELF" + CODE, "wrong ELF class"),
    ],
)
def test_what_plainly_is_no_kernel_is_refused(data: bytes, what: str) -> None:
    """Better a name for the mistake than a guest that executes a compressed file; --mode still forces it."""
    with guest_ram() as memory:
        with pytest.raises(ImageError, match=what) as caught:
            load(memory, file(data, "thing"), options())
        assert caught.value.path == "thing"
        assert load(memory, file(data, "thing"), options(mode="real")).protocol == "flat-real"


@pytest.mark.parametrize(
    ("data", "protocol"),
    [
        (CODE, "flat-real"),
        (elf(32, [Segment(MIB)]), "elf32"),
        (elf(64, [Segment(MIB)]), "elf64"),
        (elf(32, [Segment(MIB)], prefix=multiboot_header()), "multiboot"),
        (elf(64, [Segment(MIB)], prefix=multiboot2_header()), "multiboot2"),
    ],
)
def test_the_chosen_loader_loads(data: bytes, protocol: str) -> None:
    """load() gives the Boot of the loader that it chose."""
    with guest_ram() as memory:
        assert load(memory, file(data), options()).protocol == protocol


OTHERS = ("elf", "mbinfo", "multiboot", "multiboot2", "linux", "pvh", "unpack", "firmware")


@pytest.mark.parametrize("mode", [None, "long"])
def test_a_flat_start_imports_only_its_loader(mode: str | None) -> None:
    """No other loader, and none of the slow standard modules, is imported for a flat binary."""
    code = f"""
import sys
before = set(sys.modules)
from pykvm.boot.image import BootOptions, ImageFile
from pykvm.boot.load import load
from pykvm.core.memory import GuestMemory
memory = GuestMemory()
memory.add(0, 16 << 20)
load(memory, ImageFile("k", b"\\xf4"), BootOptions(mode={mode!r}))
print(" ".join(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "pykvm.boot.flat" in imported
    assert not imported & {f"pykvm.boot.{name}" for name in OTHERS}
    assert not imported & {"dataclasses", "typing", "enum", "re", "argparse", "logging", "json", "collections"}


SEEDS = [data for _, data, loader in CASES if "flat" not in loader and "linux" not in loader and len(data) < 4096] + [
    elf(64, [Segment(MIB)], sections=[Section(2, b"symbols")], prefix=BOTH)
]


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=600))
def test_arbitrary_bytes_load_or_are_refused(data: bytes) -> None:
    """Any file gives a Boot or an ImageError, nothing else."""
    with guest_ram() as memory:
        try:
            boot = load(memory, file(data), options())
        except ImageError:
            return
        assert check_guest_state(boot.state) == []


@settings(max_examples=200, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=4)), max_size=4),
    mode=st.sampled_from([None, None, "protected", "long"]),
)
def test_mutated_files_load_or_are_refused(seed: bytes, edits: list[tuple[int, bytes]], mode: str | None) -> None:
    """A valid image with any bytes changed gives a Boot or an ImageError, whichever loader it ends up with."""
    data = bytearray(seed)
    for at, piece in edits:
        data[at % len(data) : at % len(data) + len(piece)] = piece
    with guest_ram() as memory:
        try:
            boot = load(memory, file(bytes(data)), options(mode=mode))
        except ImageError:
            return
        assert isinstance(boot, Boot)
        assert check_guest_state(boot.state) == []
