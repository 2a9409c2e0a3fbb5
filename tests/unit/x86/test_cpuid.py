"""CPUID leaves of a vCPU: topology, features by name, hypervisor leaves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.errors import ConfigError
from pykvm.x86.cpu_features import ALIASES, DEPENDENTS, FEATURES, GROUPS, canonical, parse_features
from pykvm.x86.cpuid import (
    CpuidEntry,
    apic_id_bits,
    configure,
    find,
    has_feature,
    is_amd,
    put,
    vendor,
)

SUBLEAF = 1


def intel() -> list[CpuidEntry]:
    """What KVM offers on an Intel host with 8 threads (leaf 4 shows the host's sharing)."""
    return [
        CpuidEntry(0x0, eax=0x1F, ebx=0x756E6547, edx=0x49656E69, ecx=0x6C65746E),
        CpuidEntry(0x1, eax=0x50654, ebx=0x05100800, ecx=0xFEFA3203 | 1 << 3, edx=0x178BFBFF),
        CpuidEntry(0x4, 0, SUBLEAF, 0x1C004121, 0x1C0003F, 0x3F, 0),
        CpuidEntry(0x4, 2, SUBLEAF, 0x1C004143, 0x3C0003F, 0x3FF, 0),
        CpuidEntry(0x4, 3, SUBLEAF, 0x1C01C163, 0x3C0003F, 0x7FFF, 4),
        CpuidEntry(0x7, 0, SUBLEAF, 1, 0xD19F47AB, 0x415FFE, 0xAC004410),
        CpuidEntry(0xB, 0, SUBLEAF, 1, 2, 0x100, 5),
        CpuidEntry(0xB, 1, SUBLEAF, 4, 8, 0x201, 5),
        CpuidEntry(0xD, 0, SUBLEAF, 0x7, 0x340, 0x340, 0),
        CpuidEntry(0xD, 1, SUBLEAF, 0xF, 0x340, 0, 0),
        CpuidEntry(0xD, 2, SUBLEAF, 0x100, 0x240, 0, 0),
        CpuidEntry(0x40000000, eax=0x40000001, ebx=0x4B4D564B, ecx=0x564B4D56, edx=0x4D),
        CpuidEntry(0x40000001, eax=0x01007EFB),
        CpuidEntry(0x80000000, eax=0x80000008),
        CpuidEntry(0x80000001, ecx=0x121, edx=0x2C100800),
        CpuidEntry(0x80000008, eax=0x302E),
    ]


def amd() -> list[CpuidEntry]:
    """What KVM offers on an AMD host with two cores."""
    return [
        CpuidEntry(0x0, eax=0xD, ebx=0x68747541, edx=0x69746E65, ecx=0x444D4163),
        CpuidEntry(0x1, eax=0xA00F11, ebx=0x01020800, ecx=0x81202000, edx=0x078BFBFF),
        CpuidEntry(0xD, 0, SUBLEAF, 0x7, 0x340, 0x340, 0),
        CpuidEntry(0x80000000, eax=0x80000026),
        CpuidEntry(0x80000001, ecx=0x400393, edx=0x23D3FBFF),
        CpuidEntry(0x80000008, eax=0x3030, ebx=0x10000005, ecx=0x7001),
        CpuidEntry(0x8000001D, 0, SUBLEAF, 0x121, 0x1C0003F, 0x3F, 0),
        CpuidEntry(0x8000001D, 3, SUBLEAF, 0x4163, 0x3C0003F, 0x7FFF, 1),
        CpuidEntry(0x8000001E, eax=9, ebx=0x103, ecx=0x701),
        CpuidEntry(0x80000026, 0, SUBLEAF, 1, 2, 0x100, 9),
    ]


def leaf(entries: list[CpuidEntry], function: int, index: int = 0) -> CpuidEntry:
    """The entry, which must be there."""
    entry = find(entries, function, index)
    assert entry is not None
    return entry


def test_leaf_1_numbers_the_vcpu() -> None:
    """Leaf 1 EBX carries APIC id, count of logical CPUs and CLFLUSH size; HTT follows the count."""
    got = leaf(configure(intel(), vcpu_index=2, cpus=6), 1)
    assert got.ebx == 2 << 24 | 6 << 16 | 8 << 8
    assert got.edx >> 28 & 1
    alone = leaf(configure(intel(), vcpu_index=0, cpus=1), 1)
    assert alone.ebx == 1 << 16 | 8 << 8
    assert not alone.edx >> 28 & 1


def test_hypervisor_and_mwait() -> None:
    """The hypervisor bit is always set, MONITOR and the live OSXSAVE bit never are."""
    entries = configure(intel(), vcpu_index=0, cpus=1)
    assert has_feature(entries, "hypervisor")
    assert not has_feature(entries, "monitor")
    assert not has_feature(entries, "osxsave")


@pytest.mark.parametrize(
    ("in_kernel", "capability", "deadline"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_tsc_deadline_needs_the_kernels_lapic(in_kernel: bool, capability: bool, deadline: bool) -> None:
    """TSC deadline appears with KVM's LAPIC and the capability only, x2APIC and APIC with the LAPIC."""
    source = intel()
    leaf(source, 1).ecx &= ~(1 << 24)  # KVM need not list it
    entries = configure(source, vcpu_index=0, cpus=1, irqchip_in_kernel=in_kernel, tsc_deadline=capability, features="")
    assert has_feature(entries, "tsc_deadline_timer") is deadline
    assert has_feature(entries, "x2apic") is in_kernel
    assert has_feature(entries, "apic") is in_kernel
    assert has_feature(entries, "kvm_pv_eoi") is in_kernel


def test_intel_caches_are_shared_as_in_the_machine() -> None:
    """Leaf 4: L1 and L2 belong to one core, L3 to all; the rest of the leaf stays the host's."""
    entries = configure(intel(), vcpu_index=0, cpus=6)
    l1, l3 = leaf(entries, 4, 0), leaf(entries, 4, 3)
    assert l1.eax == 0x121 | 0 << 14 | 7 << 26
    assert l3.eax == 0x163 | 7 << 14 | 7 << 26
    assert (l3.ebx, l3.ecx) == (0x3C0003F, 0x7FFF)


def test_amd_leaves() -> None:
    """AMD: core count, APIC id size, cache sharing, extended APIC id, CmpLegacy; no host topology leaks."""
    entries = configure(amd(), vcpu_index=3, cpus=5)
    assert leaf(entries, 0x80000008).ecx == 4 | 3 << 12
    assert leaf(entries, 0x8000001D, 0).eax == 0x121
    assert leaf(entries, 0x8000001D, 3).eax == 0x163 | 4 << 14
    assert leaf(entries, 0x8000001E).fields()[3:] == (3, 3, 0, 0)
    assert has_feature(entries, "cmp_legacy")
    assert find(entries, 0x80000026) is None
    assert leaf(entries, 0x80000000).eax == 0x80000025
    assert not has_feature(configure(amd(), vcpu_index=0, cpus=1), "cmp_legacy")


@pytest.mark.parametrize(("source", "functions"), [(intel, (0xB, 0x1F)), (amd, (0xB,))])
def test_topology_leaves(source: object, functions: tuple[int, ...]) -> None:
    """Leaves 0xB and 0x1F give one thread a core, all cores, and each vCPU its x2APIC id."""
    entries = configure(source(), vcpu_index=4, cpus=5)  # type: ignore[operator]
    for function in functions:
        smt, core, end = (leaf(entries, function, index) for index in range(3))
        assert (smt.eax, smt.ebx, smt.ecx) == (0, 1, 0x100)
        assert (core.eax, core.ebx, core.ecx) == (3, 5, 0x201)
        assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
        assert {smt.edx, core.edx, end.edx} == {4}
        assert all(each.flags == SUBLEAF for each in (smt, core, end))
    if source is amd:
        assert find(entries, 0x1F) is None


def test_old_cpu_gets_a_topology_leaf() -> None:
    """A host whose largest leaf is below 0xB still reports 0xB."""
    source = intel()
    leaf(source, 0).eax = 0x5
    assert leaf(configure(source, vcpu_index=0, cpus=2), 0).eax == 0xB


@pytest.mark.parametrize(("cpus", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6)])
def test_apic_id_bits(cpus: int, bits: int) -> None:
    """Every core's number fits in the bits, and one bit fewer would not do."""
    assert apic_id_bits(cpus) == bits


def test_hypervisor_leaves() -> None:
    """KVM's signature, its features, and the timing leaf with TSC and APIC bus in kHz."""
    entries = configure(amd(), vcpu_index=0, cpus=1, tsc_khz=2_445_432)
    base = leaf(entries, 0x40000000)
    signature = b"".join(part.to_bytes(4, "little") for part in (base.ebx, base.ecx, base.edx))
    assert signature == b"KVMKVMKVM\0\0\0"
    assert base.eax == 0x40000010
    assert leaf(entries, 0x40000010).fields()[3:] == (2_445_432, 1_000_000, 0, 0)
    assert leaf(configure(amd(), vcpu_index=0, cpus=1), 0x40000000).eax == 0x40000001


@pytest.mark.parametrize("tsc_khz", [1_000_000, 2_100_000, 2_445_432, 3_999_997, 5_799_999])
def test_intel_frequency_leaf(tsc_khz: int) -> None:
    """Leaf 0x15 gives the TSC to a part per million in Linux's 32-bit arithmetic, 0x16 the MHz."""
    entries = configure(intel(), vcpu_index=0, cpus=1, tsc_khz=tsc_khz)
    ratio = leaf(entries, 0x15)
    crystal_khz = ratio.ecx // 1000
    assert crystal_khz == 1_000_000
    assert crystal_khz * ratio.ebx <= 0xFFFFFFFF
    assert crystal_khz * ratio.ebx / ratio.eax == pytest.approx(tsc_khz, rel=1e-6)
    assert leaf(entries, 0x16).eax == round(tsc_khz / 1000)
    assert find(configure(amd(), vcpu_index=0, cpus=1, tsc_khz=tsc_khz), 0x15) is None


def test_supported_list_is_not_changed() -> None:
    """The host's list serves all vCPUs: configure leaves it alone."""
    source = amd()
    configure(source, vcpu_index=1, cpus=4, features="-sse2", tsc_khz=1_000_000, phys_bits=40)
    assert source == amd()


def test_xsave_sizes_are_untouched() -> None:
    """Leaf 0xD is KVM's business, unless the user takes XSAVE away: then it is empty."""
    entries = configure(intel(), vcpu_index=0, cpus=1)
    assert [each for each in entries if each.function == 0xD] == [e for e in intel() if e.function == 0xD]
    without = configure(intel(), vcpu_index=0, cpus=1, features="-xsave")
    assert all(not any(each.fields()[3:]) for each in without if each.function == 0xD)


def test_mask_takes_dependents_along() -> None:
    """Masking AVX masks what is built on it, and nothing else."""
    entries = configure(intel(), vcpu_index=0, cpus=1, features="-avx")
    assert not any(has_feature(entries, name) for name in ("avx", "avx2", "fma", "avx512f", "avx512vl"))
    assert has_feature(entries, "xsave")
    assert has_feature(entries, "sse4_2")


def test_mask_reaches_amds_copy() -> None:
    """On AMD leaf 0x80000001 EDX repeats leaf 1's bits: masking clears both, and SYSCALL stays."""
    entries = configure(amd(), vcpu_index=0, cpus=1, features="-pae,-mmx")
    assert not leaf(entries, 0x80000001).edx & (1 << 6 | 1 << 23)
    assert has_feature(entries, "syscall")
    assert has_feature(entries, "lm")


def test_later_wish_wins() -> None:
    """The list is read from left to right."""
    assert has_feature(configure(intel(), vcpu_index=0, cpus=1, features="-avx,+avx"), "avx")
    assert not has_feature(configure(intel(), vcpu_index=0, cpus=1, features="+avx,-avx"), "avx")


def test_kvmclock_is_both_generations() -> None:
    """-kvmclock hides the old and the new MSRs and the stability bit."""
    entries = configure(intel(), vcpu_index=0, cpus=1, features="-kvmclock")
    assert not leaf(entries, 0x40000001).eax & (1 << 0 | 1 << 3 | 1 << 24)


def test_user_can_take_away_what_configure_adds() -> None:
    """Features that the machine itself adds can be masked: TSC deadline, x2APIC, the hypervisor bit."""
    entries = configure(amd(), vcpu_index=0, cpus=1, features="-tsc-deadline, -x2apic ,-hypervisor")
    assert not leaf(entries, 1).ecx & (1 << 24 | 1 << 21 | 1 << 31)


def test_forced_feature_must_be_supported() -> None:
    """Forcing what KVM lacks names every such feature and its bit."""
    with pytest.raises(ConfigError, match=r"does not support avx2 \(CPUID 0x7.0 EBX bit 5\).*la57") as caught:
        configure(amd(), vcpu_index=0, cpus=1, features="+avx2,+la57")
    assert caught.value.option == "cpu-feature"


def test_unknown_feature_suggests() -> None:
    """An unknown name gives its nearest relatives; several unknown names come in one error."""
    with pytest.raises(ConfigError, match=r"'avx3' \(did you mean avx.*'qqqq'"):
        parse_features("-avx3,+qqqq")


def test_sign_is_required() -> None:
    """A name without + or - is refused with both spellings."""
    with pytest.raises(ConfigError, match=r"\+avx2 .* -avx2"):
        parse_features("avx2")


def test_empty_list_wishes_nothing() -> None:
    """Empty items are no features."""
    assert parse_features(" , ,") == []


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("avx2", (7, 0, "ebx", 5)), ("x2apic", (1, 0, "ecx", 21)), ("la57", (7, 0, "ecx", 16)),
        ("pcid", (1, 0, "ecx", 17)), ("smep", (7, 0, "ebx", 7)), ("smap", (7, 0, "ebx", 20)),
        ("umip", (7, 0, "ecx", 2)), ("xsave", (1, 0, "ecx", 26)), ("vmx", (1, 0, "ecx", 5)),
        ("svm", (0x80000001, 0, "ecx", 2)), ("hypervisor", (1, 0, "ecx", 31)), ("pbe", (1, 0, "edx", 31)),
        ("nx", (0x80000001, 0, "edx", 20)), ("lm", (0x80000001, 0, "edx", 29)), ("fsrm", (7, 0, "edx", 4)),
        ("ssbd", (7, 0, "edx", 31)), ("avx512vl", (7, 0, "ebx", 31)), ("lam", (7, 1, "eax", 26)),
        ("fred", (7, 1, "eax", 17)), ("nonstop_tsc", (0x80000007, 0, "edx", 8)),
        ("kvmclock2", (0x40000001, 0, "eax", 3)), ("kvmclock_stable_bit", (0x40000001, 0, "eax", 24)),
        ("topoext", (0x80000001, 0, "ecx", 22)), ("brs", (0x80000008, 0, "ebx", 31)),
        ("xsaves", (0xD, 1, "eax", 3)), ("vgif", (0x8000000A, 0, "edx", 16)), ("arat", (6, 0, "eax", 2)),
        ("amx_int8", (7, 0, "edx", 25)), ("pks", (7, 0, "ecx", 31)), ("srso_no", (0x80000021, 0, "eax", 29)),
    ],
)  # fmt: skip
def test_feature_positions(name: str, where: tuple[int, int, str, int]) -> None:
    """Spot checks of the table against the manuals, the last bit of most registers among them."""
    assert FEATURES[name] == where


def test_feature_table_is_consistent() -> None:
    """No two names share a bit; aliases, groups and dependents lead to names that exist and hide none."""
    assert len(set(FEATURES.values())) == len(FEATURES)
    assert all(0 <= bit < 32 for _, _, _, bit in FEATURES.values())
    known = {*FEATURES, *GROUPS}
    assert set(ALIASES.values()) <= known
    assert not set(ALIASES) & known
    assert {each for group in GROUPS.values() for each in group} <= set(FEATURES)
    assert {each for first, rest in DEPENDENTS.items() for each in (first, *rest)} <= set(FEATURES)


@pytest.mark.parametrize("name", ["TSC-Deadline", "tsc_deadline_timer", "SSE4.2", "sse4-2", "sse42"])
def test_spellings(name: str) -> None:
    """Dashes, dots, case and the other projects' names are understood."""
    assert canonical(name) in ("tsc_deadline_timer", "sse4_2")


def test_vendor() -> None:
    """The vendor string comes from EBX, EDX, ECX in that order."""
    assert vendor(intel()) == "GenuineIntel"
    assert is_amd(amd())
    assert not is_amd(intel())
    assert vendor([]) == ""


def test_put_replaces_or_adds() -> None:
    """put() leaves one entry per leaf and subleaf."""
    entries = [CpuidEntry(1), CpuidEntry(4, 1, SUBLEAF)]
    put(entries, CpuidEntry(4, 1, SUBLEAF, eax=7))
    put(entries, CpuidEntry(4, 2, SUBLEAF, eax=8))
    assert [(each.function, each.index, each.eax) for each in entries] == [(1, 0, 0), (4, 1, 7), (4, 2, 8)]


def test_find_ignores_the_index_where_it_does_not_matter() -> None:
    """An entry without the significant-index flag answers every subleaf."""
    entries = [CpuidEntry(1, eax=5), CpuidEntry(7, 0, SUBLEAF, eax=6)]
    assert leaf(entries, 1, 3).eax == 5
    assert find(entries, 7, 1) is None


u32 = st.integers(0, 0xFFFFFFFF)
functions = st.sampled_from([0, 1, 2, 4, 7, 0xB, 0xD, 0x1F, 0x40000000, 0x40000001, 0x80000000, 0x80000001,
                             0x80000008, 0x8000001D, 0x8000001E, 0x80000026])  # fmt: skip
entry_lists = st.lists(
    st.builds(CpuidEntry, functions, st.integers(0, 3), st.sampled_from([0, 1]), u32, u32, u32, u32),
    max_size=24,
)


@settings(max_examples=200, deadline=None)
@given(
    supported=entry_lists,
    cpus=st.integers(1, 1024),
    data=st.data(),
    tsc_khz=st.integers(0, 10_000_000),
    amd_host=st.booleans(),
    in_kernel=st.booleans(),
)
def test_any_host_gives_valid_registers(
    supported: list[CpuidEntry], cpus: int, data: st.DataObject, tsc_khz: int, amd_host: bool, in_kernel: bool
) -> None:
    """Whatever the host reports: registers stay 32-bit, ids are the vCPU's, masking every name works."""
    if amd_host:
        supported = [amd()[0], *supported]
    index = data.draw(st.integers(0, cpus - 1))
    masks = ",".join(f"-{name}" for name in data.draw(st.lists(st.sampled_from(sorted(FEATURES)), max_size=9)))
    entries = configure(
        supported, vcpu_index=index, cpus=cpus, tsc_khz=tsc_khz, features=masks, irqchip_in_kernel=in_kernel
    )
    assert all(0 <= value <= 0xFFFFFFFF for entry in entries for value in entry.fields())
    assert leaf(entries, 1).ebx >> 24 == index & 0xFF
    assert {each.edx for each in entries if each.function in (0xB, 0x1F)} == {index}
    assert not any(has_feature(entries, name[1:]) for name in masks.split(",") if name)
