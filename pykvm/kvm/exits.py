"""Exit reasons and their names, read from the header. Layer: kvm."""

from __future__ import annotations

from pykvm._native import lib

# Macros that share the prefix but are no exit reasons: they are values of a reason's own fields.
FIELD_PREFIXES = tuple(f"KVM_EXIT_{reason}_" for reason in ("IO", "HYPERV", "XEN", "HYPERCALL", "TDX"))

_names: dict[int, str] = {}


def reason_names() -> dict[int, str]:
    """Every exit reason of the header that pykvm was compiled with: number -> name without KVM_EXIT_."""
    if not _names:
        for name in dir(lib):
            if name.startswith("KVM_EXIT_") and not name.startswith(FIELD_PREFIXES):
                _names[getattr(lib, name)] = name.removeprefix("KVM_EXIT_")
    return _names


def reason_name(reason: int) -> str:
    """IO, MMIO, HLT, ... for KVM_EXIT_IO, ...; the number where the header is older than the kernel."""
    return reason_names().get(reason, f"reason {reason}")
