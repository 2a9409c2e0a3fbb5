"""What scripts/lab makes of Debian's packages: module order, modules.dep, the initramfs, the unpacked kernel."""

from __future__ import annotations

import lzma
import struct
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from _lab_kernel import Cpio, LabError, Modules, read_module, unpack_vmlinux, write_modules_dep  # noqa: E402


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder of modules: b-a needs c, c needs nothing, d (compressed) needs both, e needs one that is not there."""
    for name, needed in {"sub/b-a": "c", "c": "", "sub/e": "missing"}.items():
        path = tmp_path / f"{name}.ko"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x7fELF\0license=GPL\0depends=" + needed.encode() + b"\0name=x\0")
    (tmp_path / "d.ko.xz").write_bytes(lzma.compress(b"\x7fELF\0depends=b_a,c\0"))
    return tmp_path


def test_modules_come_after_what_they_need(modules: Path) -> None:
    """Each module once, its needs first; names with - and _ are the same."""
    assert [path.name for path in Modules(modules).order("d", "b_a")] == ["c.ko", "b-a.ko", "d.ko.xz"]


def test_an_unknown_module_is_named(modules: Path) -> None:
    """A typing mistake in --module is told as such."""
    with pytest.raises(LabError, match="no module nonsense"):
        Modules(modules).order("nonsense")


def test_modules_dep_lists_what_can_be_loaded(modules: Path) -> None:
    """The format that modprobe reads; a module whose needs were left out is left out as well."""
    write_modules_dep(modules)
    assert (modules / "modules.dep").read_text().splitlines() == [
        "c.ko:",
        "d.ko.xz: sub/b-a.ko c.ko",
        "sub/b-a.ko: c.ko",
    ]


def test_the_signature_mark_is_cut_off(tmp_path: Path) -> None:
    """The kernel checks the signature of a module only when it ends with the mark."""
    (tmp_path / "m.ko").write_bytes(b"ELF and signature~Module signature appended~\n")
    assert read_module(tmp_path / "m.ko") == b"ELF and signature"


def test_cpio_reads_the_archive_as_it_was_written(tmp_path: Path) -> None:
    """Names, modes and contents of odd lengths survive cpio's own reading."""
    archive = Cpio()
    archive.add("bin", 0o040755)
    for length in range(1, 6):
        archive.add(f"bin/{'x' * length}", 0o100644 + length, b"c" * length)
    done = subprocess.run(["cpio", "-idm"], input=archive.finish(), cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    for length in range(1, 6):
        file = tmp_path / "bin" / ("x" * length)
        assert file.read_bytes() == b"c" * length
        assert file.stat().st_mode == 0o100644 + length


def bzimage(payload: bytes) -> bytes:
    """A bzImage of two setup sectors whose payload starts 0x30 bytes into the protected-mode kernel."""
    image = bytearray(3 * 512 + 0x30)
    image[0x1F1] = 2
    struct.pack_into("<II", image, 0x248, 0x30, len(payload))
    return bytes(image) + payload + b"code after it"


def test_an_xz_kernel_is_unpacked(tmp_path: Path) -> None:
    """The payload's place comes from the setup header; the size word that follows an xz stream does no harm."""
    kernel = b"\x7fELF" + bytes(range(256)) * 40
    (tmp_path / "bz").write_bytes(bzimage(lzma.compress(kernel) + struct.pack("<I", len(kernel))))
    unpack_vmlinux(tmp_path / "bz", tmp_path / "vmlinux")
    assert (tmp_path / "vmlinux").read_bytes() == kernel


def test_another_compression_is_left_to_the_kernel(tmp_path: Path) -> None:
    """QEMU boots the bzImage itself then."""
    (tmp_path / "bz").write_bytes(bzimage(b"\x02!L\x18lz4"))
    unpack_vmlinux(tmp_path / "bz", tmp_path / "vmlinux")
    assert not (tmp_path / "vmlinux").exists()
