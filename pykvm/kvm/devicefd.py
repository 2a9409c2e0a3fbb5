"""In-kernel devices and their attributes. Layer: kvm. KVM API documentation 4.79 to 4.81."""

from __future__ import annotations

import errno

from pykvm._native import ffi
from pykvm.errors import KvmError
from pykvm.kvm.handle import Handle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm._native import CData


class Attributes(Handle):
    """Device attributes, which VMs, vCPUs and devices all have: `value` is a cffi pointer to the attribute's data."""

    __slots__ = ()

    def get_attribute(self, group: int, attribute: int, value: CData) -> None:
        """KVM_GET_DEVICE_ATTR (4.80)."""
        self.ioctl("KVM_GET_DEVICE_ATTR", _attribute(group, attribute, value))

    def set_attribute(self, group: int, attribute: int, value: CData) -> None:
        """KVM_SET_DEVICE_ATTR (4.80)."""
        self.ioctl("KVM_SET_DEVICE_ATTR", _attribute(group, attribute, value))

    def has_attribute(self, group: int, attribute: int) -> bool:
        """KVM_HAS_DEVICE_ATTR (4.81)."""
        try:
            self.ioctl("KVM_HAS_DEVICE_ATTR", _attribute(group, attribute, ffi.NULL))
        except KvmError as error:
            if error.errno in (errno.ENXIO, errno.EPERM, errno.EINVAL, errno.ENOTTY):
                return False
            raise
        return True


class DeviceFd(Attributes):
    """A device made by KVM_CREATE_DEVICE."""

    __slots__ = ()


def _attribute(group: int, attribute: int, value: CData) -> CData:
    request = ffi.new("struct kvm_device_attr *")
    request.group, request.attr = group, attribute
    request.addr = int(ffi.cast("uintptr_t", value))
    return request
