"""Finding kernels, reading modules, and the initramfs of `pykvm run`."""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
from pathlib import Path

import pytest
import zstandard

from pykvm.cli import run as run_module
from pykvm.errors import HostError, ImageError, UsageError
from pykvm.kernels import find, initramfs
from pykvm.kernels.cpio import Cpio
from pykvm.kernels.modules import Modules, read_module


def bzimage(path: Path, version: str) -> Path:
    """A file with the header fields that say a kernel's version."""
    head = bytearray(0x400)
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x20E, 0x100)
    text = version.encode() + b" (someone@somewhere) #1"
    head[0x300 : 0x300 + len(text)] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head)
    return path


def module_folder(folder: Path, modules: dict[str, str], builtin: str = "") -> Path:
    """lib/modules/VERSION with these modules: file name -> what it needs."""
    for name, needs in modules.items():
        elf = b"\x7fELF\0depends=" + needs.encode() + b"\0name=x\0"
        pack = {"xz": lzma.compress, "gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
        (folder / "kernel").mkdir(parents=True, exist_ok=True)
        (folder / "kernel" / name).write_bytes(pack(elf))
    (folder / "modules.builtin").write_text(builtin)
    return folder


def test_order_of_modules(tmp_path: Path) -> None:
    """What a module needs comes before it, once; compressed ones are unpacked; a built-in one needs no file."""
    folder = module_folder(
        tmp_path, {"virtio-fs.ko.xz": "fuse,virtio", "fuse.ko.zst": "", "virtio.ko.gz": "ring", "ring.ko": ""},
        "kernel/fs/overlayfs/overlay.ko\n",
    )  # fmt: skip
    files = Modules(folder).order(["virtio_fs", "overlay", "ring"])
    assert list(files) == ["fuse", "ring", "virtio", "virtio_fs"]
    assert all(content.startswith(b"\x7fELF") for content in files.values())
    with pytest.raises(ImageError, match="no module nothing"):
        Modules(folder).order(["nothing"])


@pytest.mark.parametrize("name", ["bad.ko.xz", "bad.ko.zst", "bad.ko.gz"])
def test_damaged_module(tmp_path: Path, name: str) -> None:
    """A module that cannot be unpacked is named in one line."""
    (tmp_path / name).write_bytes(b"no archive at all")
    with pytest.raises(ImageError, match="cannot be read"):
        read_module(tmp_path / name)


def test_the_modules_of_a_named_kernel(tmp_path: Path) -> None:
    """--kernel goes with --modules, with the folder beside it, or with nothing: then all is built in."""
    image = bzimage(tmp_path / "a" / "vmlinuz", "6.9.1-test")
    assert find.kernel_version(image) == "6.9.1-test"
    assert find.named_kernel(image, None).initramfs_modules(["virtiofs"]) == {}
    beside = module_folder(tmp_path / "a" / "modules" / "6.9.1-test", {"virtiofs.ko": ""})
    kernel = find.named_kernel(image, None)
    assert kernel.modules is not None and kernel.modules.folder == beside
    other = module_folder(tmp_path / "other", {"virtiofs.ko": ""})
    kernel = find.named_kernel(image, other)
    assert kernel.modules is not None and kernel.modules.folder == other
    with pytest.raises(ImageError, match="no folder of modules"):
        find.named_kernel(image, tmp_path / "none")


def test_the_newest_kernel_that_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are compared as numbers, and a kernel without the modules is passed over."""
    images = [bzimage(tmp_path / v / "vmlinuz", v) for v in ("6.9.2-1", "6.10.0-1", "6.11.0-1")]
    for version, name in (("6.9.2-1", "virtiofs.ko"), ("6.10.0-1", "virtiofs.ko"), ("6.11.0-1", "other.ko")):
        module_folder(tmp_path / version / "modules" / version, {name: ""})
    key = [find._sort_key(version) for version in ("6.9.2-1", "6.10.0-1", "6.11.0-1")]
    assert key == sorted(key)
    monkeypatch.setattr(find, "_candidates", lambda: iter(reversed(images)))
    assert find.find_kernel(["virtiofs"]).image == images[1]


def test_a_kernel_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any, Debian's package is downloaded and unpacked into the cache, and nothing else stays there."""
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {
        "apt-cache": "echo '  Depends: linux-image-6.1.0-9-cloud-amd64'",
        "apt-get": 'for last; do :; done; echo data >"${last}_1_amd64.deb"',
        "dpkg-deb": "mkdir -p root/boot root/lib/modules/6.1.0-9/kernel; echo kernel >root/boot/vmlinuz-6.1.0-9",
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    image = find.fetch_kernel(tmp_path / "cache" / "kernel")
    assert image.read_text() == "kernel\n" and (image.parent / "modules" / "6.1.0-9").is_dir()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["kernel"]
    (tools / "apt-get").write_text("#!/bin/sh\necho 'E: no network' >&2; exit 100\n")
    with pytest.raises(HostError, match="E: no network; give a kernel with --kernel FILE"):
        find.fetch_kernel(tmp_path / "cache" / "kernel")
    assert image.exists() and [path.name for path in (tmp_path / "cache").iterdir()] == ["kernel"]


def test_initramfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive is one that cpio can list: init, busybox, modules in order, command and shares."""
    folder = module_folder(tmp_path / "m", {f"{name}.ko": "" for name in initramfs.MODULES})
    monkeypatch.setattr(initramfs, "find_busybox", lambda: b"\x7fELF")
    command = initramfs.command_script(["echo", "a b", "$x"], "/some where", {"A": "it's"}, stdin=False)
    assert command == "export A='it'\"'\"'s'\ncd '/some where' || exit 125\nexec echo 'a b' '$x' </dev/null\n"
    shares = initramfs.shares_script([("share0", "/a b", True)])
    assert "mount -t virtiofs -o ro share0 '/root/a b'" in shares
    archive = initramfs.build_initramfs(find.Kernel(tmp_path, Modules(folder)), command, shares)
    listed = subprocess.run(["cpio", "-t"], input=archive, capture_output=True, check=True).stdout.decode().split()
    assert [name for name in listed if name.startswith("modules/")] == [
        f"modules/{place:02}-{name}.ko" for place, name in enumerate(initramfs.MODULES)
    ]
    assert {"init", "bin", "bin/busybox", "command", "shares", "dev/console", "proc"} <= set(listed)


def test_parents_come_first() -> None:
    """A file's folders stand before it, once."""
    archive = Cpio()
    archive.add_file("a/b/c", b"1")
    archive.add_file("a/d", b"2")
    data = archive.finish()
    assert data.index(b"a\0") < data.index(b"a/b\0") < data.index(b"a/b/c\0") and data.count(b"a/b\0") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["uname"], "unexpected argument 'uname'"),
        ([], "no command given"),
        (["--"], "no command given"),
        (["--modules", "/x", "--", "true"], "--modules belongs to a kernel"),
        (["--timeout", "x", "--", "true"], "no number of seconds"),
    ],
)
def test_wrong_usage(words: list[str], said: str) -> None:
    """What cannot be run is said in one line."""
    with pytest.raises(UsageError, match=said):
        run_module.run(words)
