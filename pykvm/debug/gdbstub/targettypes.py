"""The types that the target description defines for flags and vectors. Layer: debug, plain data."""

from __future__ import annotations


def _flags(name: str, size: int, fields: dict[int, str]) -> list[str]:
    lines = [f'<flags id="{name}" size="{size}">']
    lines += [f'<field name="{field}" start="{bit}" end="{bit}"/>' for bit, field in fields.items()]
    return [*lines, "</flags>"]


_EFLAGS = {
    0: "CF", 2: "PF", 4: "AF", 6: "ZF", 7: "SF", 8: "TF", 9: "IF", 10: "DF", 11: "OF", 14: "NT", 16: "RF", 17: "VM",
    18: "AC", 19: "VIF", 20: "VIP", 21: "ID",
}  # fmt: skip
_MXCSR = {
    0: "IE", 1: "DE", 2: "ZE", 3: "OE", 4: "UE", 5: "PE", 6: "DAZ", 7: "IM", 8: "DM", 9: "ZM", 10: "OM", 11: "UM",
    12: "PM", 15: "FZ",
}  # fmt: skip
_CR0 = {0: "PE", 1: "MP", 2: "EM", 3: "TS", 4: "ET", 5: "NE", 16: "WP", 18: "AM", 29: "NW", 30: "CD", 31: "PG"}
_CR4 = {
    0: "VME", 1: "PVI", 2: "TSD", 3: "DE", 4: "PSE", 5: "PAE", 6: "MCE", 7: "PGE", 8: "PCE", 9: "OSFXSR",
    10: "OSXMMEXCPT", 11: "UMIP", 12: "LA57", 13: "VMXE", 16: "FSGSBASE", 17: "PCIDE", 18: "OSXSAVE", 20: "SMEP",
    21: "SMAP", 22: "PKE",
}  # fmt: skip
_EFER = {0: "SCE", 8: "LME", 10: "LMA", 11: "NXE", 12: "SVME", 14: "FFXSR"}

_VECTORS = (
    '<vector id="v4f" type="ieee_single" count="4"/>',
    '<vector id="v2d" type="ieee_double" count="2"/>',
    '<vector id="v16i8" type="int8" count="16"/>',
    '<vector id="v8i16" type="int16" count="8"/>',
    '<vector id="v4i32" type="int32" count="4"/>',
    '<vector id="v2i64" type="int64" count="2"/>',
    '<union id="vec128">',
    *(
        f'<field name="{name}" type="{kind}"/>'
        for name, kind in (
            ("v4_float", "v4f"), ("v2_double", "v2d"), ("v16_int8", "v16i8"), ("v8_int16", "v8i16"),
            ("v4_int32", "v4i32"), ("v2_int64", "v2i64"), ("uint128", "uint128"),
        )
    ),
    "</union>",
)  # fmt: skip

# feature -> what stands before its registers
TYPES = {
    "org.gnu.gdb.i386.core": _flags("i386_eflags", 4, _EFLAGS),
    "org.gnu.gdb.i386.sse": [*_VECTORS, *_flags("i386_mxcsr", 4, _MXCSR)],
    "org.pykvm.gdb.system": [
        *_flags("pykvm_cr0", 8, _CR0),
        *_flags("pykvm_cr4", 8, _CR4),
        *_flags("pykvm_efer", 8, _EFER),
    ],
}
