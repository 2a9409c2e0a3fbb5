"""What the guest's CPUID answers, as a real machine monitor sets it up. Layer: x86, pure functions.

`configure` takes what KVM_GET_SUPPORTED_CPUID gave and returns the entries of one vCPU for KVM_SET_CPUID2.
The machine is one package of `cpus` cores with one thread each, numbered by APIC id from 0; the last-level
cache is shared by all.

Sources: Intel SDM vol. 2A CPUID and vol. 3A 10.9 (topology); AMD APM vol. 3 appendix E; Linux
Documentation/virt/kvm/x86/cpuid.rst and 4.20 KVM_SET_CPUID2 of the KVM API documentation.
"""

from __future__ import annotations

from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FLAG_SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
APIC_BUS_KHZ = 1_000_000  # KVM's local APIC timer counts nanoseconds (KVM_CAP_X86_APIC_BUS_CYCLES_NS default)
KVM_SIGNATURE = (0x4B4D564B, 0x564B4D56, 0x0000004D)  # "KVMKVMKVM\0\0\0" in EBX, ECX, EDX
LEAF_HYPERVISOR, LEAF_KVM_FEATURES, LEAF_TIMING = 0x40000000, 0x40000001, 0x40000010

# leaf 1
_ECX_MONITOR, _ECX_X2APIC, _ECX_TSC_DEADLINE = 1 << 3, 1 << 21, 1 << 24
_ECX_OSXSAVE, _ECX_HYPERVISOR = 1 << 27, 1 << 31
_EDX_APIC, _EDX_HTT = 1 << 9, 1 << 28
# leaf 0x80000001
_ECX_CMP_LEGACY, _ECX_TOPOEXT = 1 << 1, 1 << 22
_AMD_MIRROR = 0x0183F3FF  # EDX bits that repeat leaf 1 EDX on AMD (APM vol. 3 E.4.2)
# leaf 0x40000001: PV_EOI, PV_UNHALT, PV_SEND_IPI, ASYNC_PF_INT live in KVM's local APIC
_KVM_NEEDS_LAPIC = 1 << 6 | 1 << 7 | 1 << 11 | 1 << 14


class CpuidEntry:
    """One CPUID leaf (and subleaf): the fields of struct kvm_cpuid_entry2, all unsigned 32-bit."""

    __slots__ = ("eax", "ebx", "ecx", "edx", "flags", "function", "index")

    def __init__(
        self,
        function: int,
        index: int = 0,
        flags: int = 0,
        eax: int = 0,
        ebx: int = 0,
        ecx: int = 0,
        edx: int = 0,
    ) -> None:
        self.function = function
        self.index = index
        self.flags = flags
        self.eax = eax
        self.ebx = ebx
        self.ecx = ecx
        self.edx = edx

    def fields(self) -> tuple[int, int, int, int, int, int, int]:
        """(function, index, flags, eax, ebx, ecx, edx)."""
        return (self.function, self.index, self.flags, self.eax, self.ebx, self.ecx, self.edx)

    def copy(self) -> CpuidEntry:
        """An entry of its own with the same values."""
        return CpuidEntry(*self.fields())

    def __eq__(self, other: object) -> bool:
        return self.fields() == other.fields() if isinstance(other, CpuidEntry) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        registers = f"eax={self.eax:#x} ebx={self.ebx:#x} ecx={self.ecx:#x} edx={self.edx:#x}"
        return f"<CpuidEntry {self.function:#x}.{self.index:#x} {registers}>"


# -- looking at a list of entries -------------------------------------------------------------------


def find(entries: Iterable[CpuidEntry], function: int, index: int = 0) -> CpuidEntry | None:
    """The entry that answers CPUID with EAX=function, ECX=index, or None."""
    for entry in entries:
        if entry.function == function and (entry.index == index or not entry.flags & FLAG_SIGNIFICANT_INDEX):
            return entry
    return None


def put(entries: list[CpuidEntry], entry: CpuidEntry) -> None:
    """Set `entry` in place of the one for the same leaf and subleaf, or add it."""
    for position, old in enumerate(entries):
        if old.function == entry.function and old.index == entry.index:
            entries[position] = entry
            return
    entries.append(entry)


def has_feature(entries: Iterable[CpuidEntry], name: str) -> bool:
    """Whether the feature bit `name` (as in cpu_features.FEATURES) is set."""
    from pykvm.x86.cpu_features import FEATURES

    leaf, subleaf, register, bit = FEATURES[name]
    entry = find(entries, leaf, subleaf)
    return entry is not None and bool(getattr(entry, register) >> bit & 1)


def vendor(entries: Iterable[CpuidEntry]) -> str:
    """The vendor string of leaf 0, for example GenuineIntel."""
    entry = find(entries, 0)
    if entry is None:
        return ""
    raw = b"".join(part.to_bytes(4, "little") for part in (entry.ebx, entry.edx, entry.ecx))
    return raw.decode("latin-1").rstrip("\0 ")


def is_amd(entries: Iterable[CpuidEntry]) -> bool:
    """Whether AMD's extended leaves apply (AMD and Hygon)."""
    return vendor(entries) in ("AuthenticAMD", "HygonGenuine")


def apic_id_bits(cpus: int) -> int:
    """Bits of the APIC id that number the cores of a package with `cpus` of them."""
    return (cpus - 1).bit_length()


# -- configuring a vCPU -----------------------------------------------------------------------------


def configure(
    supported: Sequence[CpuidEntry],
    *,
    vcpu_index: int,
    cpus: int,
    apic_id: int | None = None,
    features: str = "",
    irqchip_in_kernel: bool = True,
    tsc_deadline: bool = True,
    tsc_khz: int = 0,
    phys_bits: int = 0,
) -> list[CpuidEntry]:
    """The CPUID entries of vCPU `vcpu_index` of `cpus`; `supported` is left as it was.

    apic_id            its x2APIC id; vcpu_index if None
    features           "+name,-name": forced and masked features, in that order (see cpu_features)
    irqchip_in_kernel  KVM emulates the local APIC (irqchip kernel or split); without, there is none at all
    tsc_deadline       KVM_CAP_TSC_DEADLINE_TIMER is there (KVM_GET_SUPPORTED_CPUID need not show the bit)
    tsc_khz            the vCPU's TSC frequency, 0 if unknown
    phys_bits          guest physical address width to report, 0 for the host's

    Raises ConfigError for an unknown feature name and for a forced feature that this host's KVM lacks.
    """
    entries = [entry.copy() for entry in supported]
    for function in (0x0, 0x1, LEAF_HYPERVISOR, LEAF_KVM_FEATURES):
        if find(entries, function) is None:
            entries.append(CpuidEntry(function, eax=1 if function == 0 else 0))
    ident = vcpu_index if apic_id is None else apic_id
    _set_leaf_1(entries, cpus, ident, irqchip_in_kernel, tsc_deadline)
    _share_caches(entries, cpus)
    _set_topology(entries, cpus, ident)
    if is_amd(entries):
        _set_amd_topology(entries, cpus, ident)
    elif tsc_khz:
        _set_intel_frequency(entries, tsc_khz)
    _set_hypervisor(entries, irqchip_in_kernel, tsc_khz)
    wide = find(entries, 0x80000008)
    if wide is not None and phys_bits:
        wide.eax = wide.eax & ~0xFF | phys_bits
    if features:
        _apply_features(entries, features)
    return entries


def _set_leaf_1(entries: list[CpuidEntry], cpus: int, ident: int, irqchip_in_kernel: bool, tsc_deadline: bool) -> None:
    leaf = find(entries, 0x1)
    assert leaf is not None
    clflush = leaf.ebx >> 8 & 0xFF or 8  # in 8-byte units
    leaf.ebx = leaf.ebx & 0xFF | clflush << 8 | min(cpus, 255) << 16 | (ident & 0xFF) << 24
    # MWAIT would only be a busy loop: KVM runs it as a NOP. OSXSAVE follows the guest's CR4, KVM keeps it.
    leaf.ecx &= ~(_ECX_MONITOR | _ECX_OSXSAVE | _ECX_X2APIC | _ECX_TSC_DEADLINE)
    leaf.ecx |= _ECX_HYPERVISOR
    if irqchip_in_kernel:
        leaf.ecx |= _ECX_X2APIC | (_ECX_TSC_DEADLINE if tsc_deadline else 0)
        leaf.edx |= _EDX_APIC
    else:
        leaf.edx &= ~_EDX_APIC
    leaf.edx = leaf.edx | _EDX_HTT if cpus > 1 else leaf.edx & ~_EDX_HTT


def _share_caches(entries: list[CpuidEntry], cpus: int) -> None:
    """Leaf 4 (Intel) and 0x8000001d (AMD): who shares each cache, in this machine and not in the host."""
    for entry in entries:
        if entry.function not in (0x4, 0x8000001D) or not entry.eax & 0x1F:
            continue
        shared = (entry.eax >> 5 & 0x7) >= 3  # levels 1 and 2 belong to a core, level 3 to the package
        if entry.function == 0x4:
            # both fields are "maximum number of addressable ids", which are powers of two
            ids = 1 << apic_id_bits(cpus)
            entry.eax = entry.eax & 0x3FFF | (ids - 1 if shared else 0) << 14 | min(ids - 1, 0x3F) << 26
        else:
            entry.eax = entry.eax & ~(0xFFF << 14) | (cpus - 1 if shared else 0) << 14


def _set_topology(entries: list[CpuidEntry], cpus: int, ident: int) -> None:
    """Leaf 0xB, and 0x1F where the CPU has it: one thread a core, `cpus` cores (SDM vol. 3A 10.9.1)."""
    basic = find(entries, 0x0)
    assert basic is not None
    basic.eax = max(basic.eax, 0xB)
    entries[:] = [entry for entry in entries if entry.function not in (0xB, 0x1F)]
    flags = FLAG_SIGNIFICANT_INDEX
    for function in (0xB, 0x1F) if basic.eax >= 0x1F else (0xB,):
        entries += [
            CpuidEntry(function, 0, flags, 0, 1, 0 | 1 << 8, ident),  # SMT
            CpuidEntry(function, 1, flags, apic_id_bits(cpus), cpus, 1 | 2 << 8, ident),  # core
            CpuidEntry(function, 2, flags, 0, 0, 2, ident),  # the end
        ]


def _set_amd_topology(entries: list[CpuidEntry], cpus: int, ident: int) -> None:
    """0x80000001, 0x80000008 and 0x8000001e, and no 0x80000026 (that would be the host's topology)."""
    entries[:] = [entry for entry in entries if entry.function != 0x80000026]
    largest = find(entries, 0x80000000)
    if largest is not None and largest.eax == 0x80000026:
        largest.eax = 0x80000025
    leaf = find(entries, 0x80000001)
    if leaf is not None:
        leaf.ecx = leaf.ecx | _ECX_CMP_LEGACY if cpus > 1 else leaf.ecx & ~_ECX_CMP_LEGACY
        if leaf.ecx & _ECX_TOPOEXT:
            # extended APIC id; core id, one thread a core; node 0, one node a processor
            put(entries, CpuidEntry(0x8000001E, eax=ident, ebx=ident & 0xFF))
    size = find(entries, 0x80000008)
    if size is not None:
        size.ecx = size.ecx & ~0xF0FF | min(cpus - 1, 0xFF) | apic_id_bits(cpus) << 12


def _set_intel_frequency(entries: list[CpuidEntry], tsc_khz: int) -> None:
    """Leaves 0x15 and 0x16, if the CPU has them.

    Linux without kvmclock takes the crystal for its local APIC timer's clock: so it is KVM's APIC bus.
    It multiplies kHz by the numerator in 32 bits, hence the bound on the fraction.
    """
    basic = find(entries, 0x0)
    assert basic is not None
    if basic.eax >= 0x15:
        numerator, denominator = _fraction(tsc_khz, APIC_BUS_KHZ, 0xFFFFFFFF // APIC_BUS_KHZ)
        put(entries, CpuidEntry(0x15, eax=denominator, ebx=numerator, ecx=APIC_BUS_KHZ * 1000))
    if basic.eax >= 0x16:
        mhz = min((tsc_khz + 500) // 1000, 0xFFFF)
        put(entries, CpuidEntry(0x16, eax=mhz, ebx=mhz, ecx=100))


def _fraction(numerator: int, denominator: int, limit: int) -> tuple[int, int]:
    """The last continued-fraction convergent of numerator/denominator with neither term above `limit`."""
    above, below = (1, 0), (0, 1)  # convergents h/k: (h, h_previous), (k, k_previous)
    while denominator:
        term, rest = divmod(numerator, denominator)
        high, low = term * above[0] + above[1], term * below[0] + below[1]
        if high > limit or low > limit:
            break
        above, below = (high, above[0]), (low, below[0])
        numerator, denominator = denominator, rest
    return above[0], below[0]


def _set_hypervisor(entries: list[CpuidEntry], irqchip_in_kernel: bool, tsc_khz: int) -> None:
    """Signature, KVM's paravirtual features, and the timing leaf that VMware defined and everybody reads."""
    largest = LEAF_TIMING if tsc_khz else LEAF_KVM_FEATURES
    ebx, ecx, edx = KVM_SIGNATURE
    put(entries, CpuidEntry(LEAF_HYPERVISOR, eax=largest, ebx=ebx, ecx=ecx, edx=edx))
    if tsc_khz:
        put(entries, CpuidEntry(LEAF_TIMING, eax=tsc_khz, ebx=APIC_BUS_KHZ))
    paravirtual = find(entries, LEAF_KVM_FEATURES)
    assert paravirtual is not None
    if not irqchip_in_kernel:
        paravirtual.eax &= ~_KVM_NEEDS_LAPIC


# -- features by name -------------------------------------------------------------------------------


def _apply_features(entries: list[CpuidEntry], text: str) -> None:
    from pykvm.x86.cpu_features import FEATURES, OPTION, parse_features, with_dependents

    offered = [entry.copy() for entry in entries]  # so that "-avx,+avx" works
    missing: list[str] = []
    for on, names in parse_features(text):
        for name in names if on else [each for first in names for each in with_dependents(first)]:
            leaf, subleaf, register, bit = FEATURES[name]
            if on and not has_feature(offered, name):
                where = f"CPUID {leaf:#x}.{subleaf} {register.upper()} bit {bit}"
                missing.append(f"this host's KVM does not support {name} ({where})")
                continue
            entry = find(entries, leaf, subleaf)
            if entry is not None:
                old = getattr(entry, register)
                setattr(entry, register, old | 1 << bit if on else old & ~(1 << bit))
    if missing:
        raise ConfigError(OPTION, "; ".join(missing))
    _tidy_after_masking(entries)


def _tidy_after_masking(entries: list[CpuidEntry]) -> None:
    """Keep AMD's copy of leaf 1 EDX equal to it, and no save areas without XSAVE."""
    basic, extended = find(entries, 0x1), find(entries, 0x80000001)
    assert basic is not None
    if extended is not None and is_amd(entries):
        extended.edx &= basic.edx | ~_AMD_MIRROR & 0xFFFFFFFF
    if not has_feature(entries, "xsave"):
        for entry in entries:
            if entry.function == 0xD:
                entry.eax = entry.ebx = entry.ecx = entry.edx = 0
