"""/dev/kvm itself: version, capabilities, CPUID and MSR lists, new VMs. Layer: kvm.

Source: KVM API documentation, section 4 (ioctls of type "system ioctl").
"""

from __future__ import annotations

import errno
import os

from pykvm._native import ffi, lib
from pykvm.errors import KvmError, KvmUnavailable, MissingCapability
from pykvm.kvm.handle import Handle
from pykvm.kvm.vm import VmFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

API_VERSION = 12  # fixed for ever since Linux 2.6.22 (KVM API documentation, 4.1)

ABSENT = (
    "{path} does not exist: enable virtualisation (VT-x or AMD-V) in the firmware, load kvm_intel or kvm_amd, "
    "and inside a VM ask its host for nested virtualisation"
)
FORBIDDEN = (
    "no permission to open {path}: run `sudo usermod -aG kvm $USER` and log in again; on a CI runner install the udev "
    'rule KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm"'
)
NO_DRIVER = "{path} exists but no KVM module serves it: load kvm_intel or kvm_amd (`dmesg | grep -i kvm` says why not)"
BUSY = "{path} is busy: another hypervisor (VirtualBox, VMware) may hold VT-x or AMD-V"


# What KVM said once is true for the process: facts about the host, not about a machine.
_cpuid: dict[str, list[tuple[int, ...]]] = {}
_present: set[str] = set()


class Kvm(Handle):
    """An open /dev/kvm.

    Raises KvmUnavailable, whose `reason` tells apart absent, permission, busy, version and other.
    """

    __slots__ = ("vcpu_mmap_size",)

    def __init__(self, path: str = "/dev/kvm") -> None:
        super().__init__(_open(path))
        try:
            version = self.api_version()
        except KvmError as error:
            self.close()
            raise KvmUnavailable("other", f"{path} is not a KVM device: {error}") from error
        if version != API_VERSION:
            self.close()
            raise KvmUnavailable("version", f"{path} speaks KVM API {version}; pykvm needs {API_VERSION}")
        self.vcpu_mmap_size = self.ioctl_value("KVM_GET_VCPU_MMAP_SIZE")

    def api_version(self) -> int:
        """KVM_GET_API_VERSION (4.1)."""
        return self.ioctl_value("KVM_GET_API_VERSION")

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION (4.4): 0 if absent. Prefer the VM's own, which knows more."""
        return self.ioctl_value("KVM_CHECK_EXTENSION", capability)

    def require(self, names: Iterable[str]) -> None:
        """Raise one MissingCapability that names every KVM_CAP_* in `names` that is absent."""
        missing = [name for name in names if name not in _present and not self._has(name)]
        if missing:
            raise MissingCapability(missing)

    def _has(self, name: str) -> bool:
        if self.check_extension(getattr(lib, name, 0x7FFFFFFF)):
            _present.add(name)
        return name in _present

    def create_vm(self, vm_type: int = 0) -> VmFd:
        """KVM_CREATE_VM (4.2). The kernel may answer EINTR when a signal arrives: it is asked again."""
        while True:
            try:
                return VmFd(self.ioctl_value("KVM_CREATE_VM", vm_type), self)
            except KvmError as error:
                if error.errno != errno.EINTR:
                    raise

    def supported_cpuid(self) -> list[tuple[int, ...]]:
        """KVM_GET_SUPPORTED_CPUID (4.46): (function, index, flags, eax, ebx, ecx, edx) tuples.

        Asked once per process: the kernel needs most of a millisecond for it.
        """
        return self._cpuid_list("KVM_GET_SUPPORTED_CPUID")

    def emulated_cpuid(self) -> list[tuple[int, ...]]:
        """KVM_GET_EMULATED_CPUID (4.88): features that KVM can emulate though the CPU lacks them."""
        return self._cpuid_list("KVM_GET_EMULATED_CPUID")

    def _cpuid_list(self, name: str) -> list[tuple[int, ...]]:
        if name not in _cpuid:
            _cpuid[name] = self._read_cpuid(name)
        return _cpuid[name]

    def _read_cpuid(self, name: str) -> list[tuple[int, ...]]:
        capacity = 128
        while True:
            table = ffi.new("struct kvm_cpuid2 *", {"entries": capacity})
            table.nent = capacity
            try:
                self.ioctl(name, table)
            except KvmError as error:
                if error.errno != errno.E2BIG or capacity > 4096:
                    raise
                capacity *= 2
                continue
            return [cpuid_tuple(table.entries[i]) for i in range(table.nent)]

    def msr_indices(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST (4.3): MSRs that a snapshot has to save."""
        return self._msr_list("KVM_GET_MSR_INDEX_LIST")

    def msr_feature_indices(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST (4.3): MSRs that describe the CPU's features."""
        return self._msr_list("KVM_GET_MSR_FEATURE_INDEX_LIST")

    def _msr_list(self, name: str) -> list[int]:
        probe = ffi.new("struct kvm_msr_list *", {"indices": 0})
        try:
            self.ioctl(name, probe)
        except KvmError as error:
            if error.errno != errno.E2BIG:
                raise
        table = ffi.new("struct kvm_msr_list *", {"indices": probe.nmsrs})
        table.nmsrs = probe.nmsrs
        self.ioctl(name, table)
        return [table.indices[i] for i in range(table.nmsrs)]

    def feature_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS on the system fd (4.18): values of feature MSRs."""
        wanted = list(indices)
        table = ffi.new("struct kvm_msrs *", {"entries": len(wanted)})
        table.nmsrs = len(wanted)
        for i, index in enumerate(wanted):
            table.entries[i].index = index
        done = self.ioctl("KVM_GET_MSRS", table)
        return {table.entries[i].index: table.entries[i].data for i in range(done)}


def cpuid_tuple(entry: object) -> tuple[int, ...]:
    """(function, index, flags, eax, ebx, ecx, edx) of a struct kvm_cpuid_entry2."""
    e = entry
    return (e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)  # type: ignore[attr-defined]


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise KvmUnavailable("absent", ABSENT.format(path=path)) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise KvmUnavailable("permission", FORBIDDEN.format(path=path)) from error
        if error.errno in (errno.ENODEV, errno.ENXIO):
            raise KvmUnavailable("absent", NO_DRIVER.format(path=path)) from error
        if error.errno == errno.EBUSY:
            raise KvmUnavailable("busy", BUSY.format(path=path)) from error
        raise KvmUnavailable("other", f"cannot open {path}: {error.strerror}") from error
