"""Builds pykvm._native by cffi in API mode: the C compiler supplies every number, size and offset.

`kvm.cdef.h` lists the structures by field name. The constants (KVM_*, VIRTIO_*, ...) are taken from the installed
headers by asking the preprocessor for all their macros, so a newer header brings its new capabilities and exit reasons
by itself.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCES = (
    "runloop.c",
    "kick.c",
    "trace.c",
    "dynlib.c",
    "virtio.c",
    "guestmem.c",
    "virtqueue.c",
    "ioloop.c",
    "lock.c",
    "uring.c",
    "blk.c",
    "blkio.c",
    "net.c",
    "tap.c",
    "snapmem.c",
    "confine.c",
    "filemem.c",
)
LOCAL_HEADERS = (
    "clock.h",
    "runloop.h",
    "trace.h",
    "dynlib.h",
    "virtio.h",
    "guestmem.h",
    "virtqueue.h",
    "ioloop.h",
    "lock.h",
    "uring.h",
    "blk.h",
    "net.h",
    "tap.h",
    "snapmem.h",
    "confine.h",
    "filemem.h",
)

HEADERS = (
    "asm/errno.h",
    "asm/unistd.h",
    "linux/falloc.h",
    "linux/fs.h",
    "linux/if_tun.h",
    "linux/kvm.h",
    "linux/ptrace.h",
    "linux/vhost.h",
    "linux/virtio_balloon.h",
    "linux/virtio_blk.h",
    "linux/virtio_config.h",
    "linux/virtio_console.h",
    "linux/virtio_fs.h",
    "linux/virtio_ids.h",
    "linux/virtio_mmio.h",
    "linux/virtio_net.h",
    "linux/virtio_pmem.h",
    "linux/virtio_ring.h",
    "linux/virtio_vsock.h",
)
INCLUDES = "".join(f"#include <{name}>\n" for name in HEADERS)
PREFIXES = (
    "KVM_",
    "VIRTIO_",
    "VRING_",
    "VHOST_",
    "BLK",
    "FALLOC_",
    "IFF_",
    "TUN",
    "PTRACE_",
    "EHWPOISON",
    "__NR_ioctl",
    "__NR_mmap",
    "_IOC_",
)

TYPES = """
typedef uint8_t __u8; typedef uint16_t __u16; typedef uint32_t __u32; typedef unsigned long long __u64;
typedef int16_t __s16; typedef int32_t __s32; typedef long long __s64;
"""


def compile_c(*arguments: str, source: str) -> subprocess.CompletedProcess[str]:
    """Run the C compiler on `source` from standard input."""
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
    return subprocess.run(
        [*command, *arguments, "-x", "c", "-"], input=source, capture_output=True, text=True, check=False
    )


def header_macros() -> list[str]:
    """The names of all object-like macros after including HEADERS."""
    listing = compile_c("-E", "-dM", source=INCLUDES)
    if listing.returncode:
        raise SystemExit(f"cannot read the kernel's headers (Debian package linux-libc-dev):\n{listing.stderr}")
    return re.findall(r"^#define (\w+) .", listing.stdout, re.MULTILINE)


def constants_of(macros: list[str]) -> list[str]:
    """The macros with one of PREFIXES that are integer constants on x86.

    <linux/kvm.h> also holds other architectures' ioctls, whose structures do not exist here: the compiler says which.
    """
    names = sorted(name for name in macros if name.startswith(PREFIXES))
    lines = [*INCLUDES.splitlines(), *(f"int p_{name}[1 + 0 * (long long)({name})];" for name in names)]
    probe = compile_c("-fsyntax-only", "-w", "-fmax-errors=0", source="\n".join(lines) + "\n")
    broken = {int(line) for line in re.findall(r"^<stdin>:(\d+):\d+: error", probe.stderr, re.MULTILINE)}
    return [name for number, name in enumerate(names, start=1 + len(HEADERS)) if number not in broken]


def kvm_ioctls(names: list[str]) -> str:
    """A C string with a line "NAME type" for each KVM ioctl among `names`: what its argument points to, by the header.

    The type is "void" for an ioctl that takes a number or nothing.
    """
    listing = compile_c("-E", "-dM", source="#include <linux/kvm.h>\n")
    found = re.findall(r"^#define (KVM_\w+) _IOW?R?\(KVMIO, *\w+(?:, *([\w ]+))?\)", listing.stdout, re.MULTILINE)
    known = set(names)
    return "".join(f'"{name} {kind or "void"}\\n"\n' for name, kind in sorted(found) if name in known)


def select(source: str, macros: list[str]) -> str:
    """Resolve the #ifdef/#endif sections of the cdef (not nested) against the header."""
    kept: list[str] = []
    keep = True
    for line in source.splitlines():
        if line.startswith("#ifdef "):
            keep = line.split()[1] in macros
        elif line.startswith("#endif"):
            keep = True
        elif keep:
            kept.append(line)
    return "\n".join(kept)


def make_builder() -> FFI:
    """The configured cffi builder."""
    macros = header_macros()
    names = constants_of(macros)
    constants = "\n".join(f"#define {name} ..." for name in names)
    builder = FFI()
    builder.cdef(TYPES + constants + "\n" + select((HERE / "kvm.cdef.h").read_text(), macros))
    builder.set_source(
        "pykvm._native",
        "#include <sys/mman.h>\n"
        + INCLUDES
        + "".join(f'#include "{name}"\n' for name in LOCAL_HEADERS)
        + f"static const char pk_kvm_ioctls[] =\n{kvm_ioctls(names)};\n",
        sources=[os.path.relpath(HERE / name, ROOT) for name in SOURCES],
        include_dirs=[os.path.relpath(HERE, ROOT)],
        depends=[os.path.relpath(HERE / name, ROOT) for name in (*LOCAL_HEADERS, "kvm.cdef.h")],
        # cffi's own: wrappers of functions without arguments, and checks of the fields of packed structures
        extra_compile_args=[
            *("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror"),
            *("-Wno-unused-parameter", "-Wno-address-of-packed-member"),
        ],
    )
    return builder


ffibuilder = make_builder()
