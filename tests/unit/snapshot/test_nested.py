"""Guests that are hypervisors: what no snapshot can hold is refused (KVM API documentation, 4.114)."""

from __future__ import annotations

import pytest

from pykvm._native import ffi, lib
from pykvm.errors import SnapshotError
from pykvm.snapshot.cpu import refuse_nested
from pykvm.x86.segments import CR4_VMXE

SVM, VMX = lib.KVM_STATE_NESTED_FORMAT_SVM, lib.KVM_STATE_NESTED_FORMAT_VMX
SIZE = ffi.sizeof("struct kvm_nested_state")


class Fd:
    """A vCPU of a KVM with this nested state."""

    def __init__(self, form: int, flags: int, cr4: int) -> None:
        self._state = ffi.new("struct kvm_nested_state *", {"format": form, "flags": flags, "size": SIZE})
        self._sregs = ffi.new("struct kvm_sregs *", {"cr4": cr4})

    def get_nested_state(self, size: int) -> bytes:
        assert size == SIZE
        return bytes(ffi.buffer(self._state))

    def get_sregs(self) -> object:
        return self._sregs


@pytest.mark.parametrize(
    ("form", "flags", "cr4"),
    [
        (SVM, lib.KVM_STATE_NESTED_GUEST_MODE, 0),
        (SVM, lib.KVM_STATE_NESTED_GIF_SET | lib.KVM_STATE_NESTED_RUN_PENDING, 0),
        (VMX, lib.KVM_STATE_NESTED_GUEST_MODE, CR4_VMXE),
        (VMX, 0, CR4_VMXE),
    ],
)
def test_hypervisors_are_refused(form: int, flags: int, cr4: int) -> None:
    """In guest mode, on the way there, or with VMX on: one line says which vCPU, and what to do."""
    with pytest.raises(SnapshotError, match=r"^vCPU 3 runs a guest of its own, .*: take it before"):
        refuse_nested(3, Fd(form, flags, cr4), SIZE)  # type: ignore[arg-type]


@pytest.mark.parametrize(("form", "flags"), [(SVM, lib.KVM_STATE_NESTED_GIF_SET), (SVM, 0), (VMX, 0)])
def test_others_are_not(form: int, flags: int) -> None:
    """A guest that could be a hypervisor and is none goes into a snapshot."""
    refuse_nested(0, Fd(form, flags, 0), SIZE)  # type: ignore[arg-type]


def test_nothing_is_asked_of_a_kvm_without() -> None:
    """Where there is no KVM_CAP_NESTED_STATE there is no ioctl for it."""
    refuse_nested(0, None, 0)  # type: ignore[arg-type]
