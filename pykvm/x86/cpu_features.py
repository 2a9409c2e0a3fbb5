"""Names of CPUID feature bits, and the +name,-name lists in which people write them. Layer: x86, plain data.

Names are those of Linux's /proc/cpuinfo; where Linux has none, QEMU's. `-` and `.` may be written for `_`.
Loaded only when somebody names a feature: machines without such options never import it.

Sources: Intel SDM vol. 2A CPUID; AMD APM vol. 3 appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from pykvm.errors import ConfigError

# CPUID leaf, subleaf, register ("eax" to "edx") and bit number
FeatureBit = tuple[int, int, str, int]

OPTION = "cpu-feature"

# One row per register: names by bit from 0 upwards, `.` for a bit that has no name.
_WORDS = (
    (0x1, 0, "edx",
     "fpu vme de pse tsc msr pae mce cx8 apic . sep mtrr pge mca cmov pat pse36 pn clflush . dts acpi "
     "mmx fxsr sse sse2 ss ht tm ia64 pbe"),
    (0x1, 0, "ecx",
     "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm . pcid dca "
     "sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"),
    (0x6, 0, "eax", "dtherm ida arat . pln . pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req"),
    (0x6, 0, "ecx", "aperfmperf . . epb"),
    (0x7, 0, "ebx",
     "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds "
     "mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma . clflushopt clwb intel_pt avx512pf avx512er "
     "avx512cd sha_ni avx512bw avx512vl"),
    (0x7, 0, "ecx",
     "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 user_shstk gfni vaes vpclmulqdq "
     "avx512_vnni avx512_bitalg tme avx512_vpopcntdq . la57 . . . . . rdpid . bus_lock_detect cldemote . "
     "movdiri movdir64b enqcmd sgx_lc pks"),
    (0x7, 0, "edx",
     ". sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr . . avx512_vp2intersect srbds_ctrl md_clear "
     "rtm_always_abort . tsx_force_abort serialize hybrid_cpu tsxldtrk . pconfig arch_lbr ibt . amx_bf16 "
     "avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities "
     "ssbd"),
    (0x7, 1, "eax",
     "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd archperfmonext . fzrm fsrs fsrc . . . . "
     "fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma . . lam msrlist . . . movrs"),
    (0x7, 1, "edx",
     ". . . . avx_vnni_int8 avx_ne_convert . . amx_complex . avx_vnni_int16 . . . prefetchi user_msr . "
     "uiret_uif cet_sss avx10 . apx_f"),
    (0x7, 2, "edx", "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    (0xD, 1, "eax", "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (0x40000001, 0, "eax",
     "kvmclock_old kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt "
     ". kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield "
     "kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control . . . . . . "
     "kvmclock_stable_bit"),
    (0x40000001, 0, "edx", "kvm_hint_dedicated"),
    (0x80000001, 0, "edx",
     ". . . . . . . . . . . syscall . . . . . . . mp nx . mmxext . . fxsr_opt pdpe1gb rdtscp . lm "
     "3dnowext 3dnow"),
    (0x80000001, 0, "ecx",
     "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit "
     "wdt . lwp fma4 tce . nodeid_msr . tbm topoext perfctr_core perfctr_nb . bpext ptsc perfctr_llc "
     "mwaitx"),
    (0x80000007, 0, "ebx", "overflow_recov succor . smca"),
    (0x80000007, 0, "edx", ". . . . . . . hw_pstate nonstop_tsc cpb"),
    (0x80000008, 0, "ebx",
     "clzero irperf xsaveerptr . rdpru . . . . wbnoinvd . . amd_ibpb . amd_ibrs amd_stibp . "
     "amd_stibp_always_on . . . . . amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret "
     "brs"),
    (0x8000000A, 0, "edx",
     "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists . . pausefilter . "
     "pfthreshold avic . v_vmsave_vmload vgif . . . v_spec_ctrl . . . . vnmi"),
    (0x8000001F, 0, "eax", "sme sev vm_page_flush sev_es sev_snp"),
    (0x80000021, 0, "eax",
     "no_nested_data_bp . lfence_rdtsc . . . null_sel_clr_base . autoibrs no_smm_ctl_msr . . . . . . . . "
     ". . . . . . . . . sbpb ibpb_brtype srso_no"),
)  # fmt: skip


def _table() -> dict[str, FeatureBit]:
    table: dict[str, FeatureBit] = {}
    for leaf, subleaf, register, names in _WORDS:
        for bit, name in enumerate(names.split()):
            if name != ".":
                table[name] = (leaf, subleaf, register, bit)
    return table


# name -> (leaf, subleaf, register, bit)
FEATURES = _table()

# What other people call them (QEMU, the SDM, compilers).
ALIASES = {
    "sse3": "pni", "pclmul": "pclmulqdq", "sse41": "sse4_1", "sse42": "sse4_2", "cmpxchg8b": "cx8",
    "cmpxchg16b": "cx16", "clfsh": "clflush", "mwait": "monitor", "tsc_deadline": "tsc_deadline_timer",
    "aesni": "aes", "aes_ni": "aes", "sha": "sha_ni", "lzcnt": "abm", "gbpages": "pdpe1gb", "xd": "nx",
    "i64": "lm", "lahf": "lahf_lm", "ffxsr": "fxsr_opt", "invtsc": "nonstop_tsc",
    "constant_tsc": "nonstop_tsc", "htt": "ht", "ds": "dts", "stibp": "intel_stibp", "ibpb": "amd_ibpb",
    "ibrs": "amd_ibrs", "shstk": "user_shstk", "kvm_clock": "kvmclock",
    "kvmclock_stable": "kvmclock_stable_bit", "kvm_pv_send_ipi": "kvm_pv_ipi", "5level_paging": "la57",
    "prefetchw": "3dnowprefetch", "nrips": "nrip_save",
}  # fmt: skip

# One name for several bits: both sets of kvmclock MSRs go together, as guests try one and then the other.
GROUPS = {"kvmclock": ("kvmclock_old", "kvmclock2")}

# Masking the first masks these too: a CPU that had them without it would break the SDM's detection rules.
_AVX512 = tuple(name for name in FEATURES if name.startswith("avx512") and name != "avx512f")
_AMX = ("amx_bf16", "amx_int8", "amx_fp16", "amx_complex")
DEPENDENTS = {
    "xsave": ("xsaveopt", "xsavec", "xgetbv1", "xsaves", "xfd", "avx", "pku", "mpx", "amx_tile"),
    "avx": (
        "avx2", "fma", "f16c", "vaes", "vpclmulqdq", "fma4", "xop", "avx512f", "avx_vnni", "avx_ifma",
        "avx_vnni_int8", "avx_vnni_int16", "avx_ne_convert", "avx10",
    ),
    "avx512f": _AVX512,
    "amx_tile": _AMX,
    "sse2": ("pni", "aes", "pclmulqdq", "sha_ni", "avx"),
    "svm": tuple(name for name, where in FEATURES.items() if where[0] == 0x8000000A),
    "kvmclock2": ("kvmclock_stable_bit",),
}  # fmt: skip


def parse_features(text: str) -> list[tuple[bool, tuple[str, ...]]]:
    """`"+avx2,-x2apic"` as [(True, ("avx2",)), (False, ("x2apic",))], in order; a group gives several names.

    Raises ConfigError that names every unknown feature together with the closest known names.
    """
    wanted: list[tuple[bool, tuple[str, ...]]] = []
    unknown: list[str] = []
    for item in (part.strip() for part in text.split(",")):
        if not item:
            continue
        if item[0] not in "+-":
            raise ConfigError(OPTION, f"write +{item} to force the feature or -{item} to mask it")
        name = canonical(item[1:])
        if name in GROUPS:
            wanted.append((item[0] == "+", GROUPS[name]))
        elif name in FEATURES:
            wanted.append((item[0] == "+", (name,)))
        else:
            unknown.append(_describe_unknown(item[1:]))
    if unknown:
        raise ConfigError(OPTION, "; ".join(unknown))
    return wanted


def canonical(name: str) -> str:
    """The name under which FEATURES or GROUPS knows `name`, if they do."""
    plain = name.strip().lower().replace("-", "_").replace(".", "_")
    return ALIASES.get(plain, plain)


def with_dependents(name: str) -> list[str]:
    """`name` and every feature that makes no sense without it."""
    found = [name]
    for each in found:  # grows while it is walked
        found += [other for other in DEPENDENTS.get(each, ()) if other not in found]
    return found


def _describe_unknown(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(canonical(name), [*FEATURES, *ALIASES, *GROUPS], n=3, cutoff=0.6)
    hint = f" (did you mean {', '.join(near)}?)" if near else " (names are those of /proc/cpuinfo)"
    return f"unknown CPU feature {name.strip()!r}{hint}"
