"""Which KVM module this host has, and what it does with guest ring 0. Layer: debug (reads /sys and /proc only)."""

from __future__ import annotations

import os


class Backend:
    """How KVM runs guests here.

    name         vmx, svm, pvm, other, or "" if no module is loaded
    module       the kernel module, for example kvm_intel
    interpreted  what KVM's instruction emulator runs instead of the CPU: "" (nothing but single instructions),
                 "real mode" (VT-x without unrestricted guest) or "ring 0" (kvm_pvm)
    """

    __slots__ = ("interpreted", "module", "name")

    def __init__(self, name: str, module: str, interpreted: str = "") -> None:
        self.name = name
        self.module = module
        self.interpreted = interpreted

    def __repr__(self) -> str:
        return f"<Backend {self.name or 'none'} ({self.module})>"


# module -> backend name
_MODULES = {"kvm_intel": "vmx", "kvm_amd": "svm", "kvm_pvm": "pvm"}


def read_line(path: str, limit: int = 4096) -> str | None:
    """The first `limit` bytes of a small file, stripped; None if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return os.read(fd, limit).decode("ascii", "replace").strip()
    except OSError:
        return None
    finally:
        os.close(fd)


def is_yes(value: str | None) -> bool:
    """Whether a module parameter is on: boolean ones read Y or N, older ones 1 or 0."""
    return value in ("Y", "y", "1")


def detect_backend(sysfs: str = "/sys") -> Backend:
    """The backend whose module is loaded (KVM takes one at a time). `sysfs` is where sysfs is mounted."""
    for module, name in _MODULES.items():
        # a module compiled into the kernel has a directory here as well when it has parameters
        directory = f"{sysfs}/module/{module}"
        if not os.path.isdir(directory):
            continue
        interpreted = "ring 0" if name == "pvm" else ""
        unrestricted = read_line(f"{directory}/parameters/unrestricted_guest")
        if name == "vmx" and unrestricted is not None and not is_yes(unrestricted):
            interpreted = "real mode"
        return Backend(name, module, interpreted)
    return Backend("other", "kvm") if os.path.isdir(f"{sysfs}/module/kvm") else Backend("", "")
