"""What the numbers of a fatal exit mean. Layer: debug, plain data in and out.

`decode` turns the facts of one exit into a Reason: a title, lines of detail, the instruction bytes that KVM
recorded. Sources: KVM API documentation, section 5; Intel SDM vol. 3D appendix C (exit reasons), vol. 3C 27.8
(VM-entry failures) and 31.4 (VM-instruction errors); AMD APM vol. 2 appendix C (exit codes) and 15.5.1.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


class ExitFacts:
    """The last exit as kvm_run has it. `reason` is its name without KVM_EXIT_; fields of other reasons stay 0.

    suberror, data        INTERNAL_ERROR: internal.suberror and the ndata words of internal.data
    hardware_reason, cpu  FAIL_ENTRY: hardware_entry_failure_reason and cpu; UNKNOWN: hardware_exit_reason
    vector, error_code    EXCEPTION
    gpa, size, flags      MEMORY_FAULT
    event                 SYSTEM_EVENT: its type
    """

    __slots__ = (
        "cpu", "data", "error_code", "event", "flags", "gpa", "hardware_reason", "reason", "size", "suberror",
        "vector",
    )  # fmt: skip

    def __init__(
        self,
        reason: str,
        *,
        suberror: int = 0,
        data: Sequence[int] = (),
        hardware_reason: int = 0,
        cpu: int = 0,
        vector: int = 0,
        error_code: int = 0,
        gpa: int = 0,
        size: int = 0,
        flags: int = 0,
        event: int = 0,
    ) -> None:
        self.reason = reason
        self.suberror = suberror
        self.data = tuple(value & MASK64 for value in data)[:16]
        self.hardware_reason = hardware_reason
        self.cpu = cpu
        self.vector = vector
        self.error_code = error_code
        self.gpa = gpa
        self.size = size
        self.flags = flags
        self.event = event


class Reason:
    """A decoded exit.

    name         KVM_EXIT_INTERNAL_ERROR and the like, or what else ended the guest
    title        one line for people
    details      more lines, most telling first
    instruction  the bytes that KVM had fetched for the instruction it failed on; empty if it gave none
    emulation    KVM's emulator met an instruction that it does not know
    """

    __slots__ = ("details", "emulation", "instruction", "name", "title")

    def __init__(self, name: str, title: str, details: Sequence[str] = (), instruction: bytes = b"") -> None:
        self.name = name
        self.title = title
        self.details = list(details)
        self.instruction = instruction
        self.emulation = False


# KVM_INTERNAL_ERROR_*: number -> (name, meaning)
SUBERRORS = {
    1: ("KVM_INTERNAL_ERROR_EMULATION", "KVM could not emulate an instruction"),
    2: ("KVM_INTERNAL_ERROR_SIMUL_EX", "unexpected simultaneous exceptions"),
    3: ("KVM_INTERNAL_ERROR_DELIVERY_EV", "an unexpected VM exit while an event was delivered to the guest"),
    4: ("KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON", "the CPU left the guest for a reason that KVM does not know"),
}  # fmt: skip

SYSTEM_EVENTS = {1: "shutdown", 2: "reset", 3: "crash", 4: "wakeup", 5: "suspend", 6: "SEV termination"}

EXCEPTIONS = (
    "#DE divide error", "#DB debug", "NMI", "#BP breakpoint", "#OF overflow", "#BR bound range",
    "#UD invalid opcode", "#NM device not available", "#DF double fault", "coprocessor segment overrun",
    "#TS invalid TSS", "#NP segment not present", "#SS stack segment fault", "#GP general protection",
    "#PF page fault", "vector 15", "#MF x87 error", "#AC alignment check", "#MC machine check",
    "#XM SIMD error", "#VE virtualization", "#CP control protection",
)  # fmt: skip

# Basic exit reasons (bits 15:0 of the VMCS field), SDM vol. 3D appendix C
VMX_EXITS = dict(enumerate((
    "exception or NMI", "external interrupt", "triple fault", "INIT signal", "start-up IPI", "I/O SMI",
    "other SMI", "interrupt window", "NMI window", "task switch", "CPUID", "GETSEC", "HLT", "INVD", "INVLPG",
    "RDPMC", "RDTSC", "RSM", "VMCALL", "VMCLEAR", "VMLAUNCH", "VMPTRLD", "VMPTRST", "VMREAD", "VMRESUME",
    "VMWRITE", "VMXOFF", "VMXON", "control-register access", "MOV DR", "I/O instruction", "RDMSR", "WRMSR",
    "VM-entry failure: invalid guest state", "VM-entry failure: MSR loading", "", "MWAIT",
    "monitor trap flag", "", "MONITOR", "PAUSE", "VM-entry failure: machine check", "", "TPR below threshold",
    "APIC access", "virtualized EOI", "GDTR or IDTR access", "LDTR or TR access", "EPT violation",
    "EPT misconfiguration", "INVEPT", "RDTSCP", "VMX-preemption timer", "INVVPID", "WBINVD", "XSETBV",
    "APIC write", "RDRAND", "INVPCID", "VMFUNC", "ENCLS", "RDSEED", "page-modification log full", "XSAVES",
    "XRSTORS", "PCONFIG", "SPP event", "UMWAIT", "TPAUSE", "LOADIWKEY", "ENCLV", "", "ENQCMD PASID",
    "ENQCMDS PASID", "bus lock", "notify",
)))  # fmt: skip

# VM-instruction error numbers, SDM vol. 3C 31.4: what KVM puts into FAIL_ENTRY when VMLAUNCH itself fails
VMX_INSTRUCTION_ERRORS = {
    1: "VMCALL in VMX root operation", 4: "VMLAUNCH with a VMCS that is not clear",
    5: "VMRESUME with a VMCS that was not launched", 6: "VMRESUME after VMXOFF",
    7: "VM entry with invalid control fields", 8: "VM entry with invalid host-state fields",
    25: "VM entry with an invalid executive-VMCS pointer", 26: "VM entry with events blocked by MOV SS",
}  # fmt: skip

# AMD APM vol. 2 appendix C; exceptions are 0x40 + vector
SVM_EXITS = {
    0x60: "physical interrupt", 0x61: "physical NMI", 0x62: "SMI", 0x63: "INIT", 0x64: "virtual interrupt",
    0x65: "CR0 selective write", 0x6E: "RDTSC", 0x6F: "RDPMC", 0x70: "PUSHF", 0x71: "POPF", 0x72: "CPUID",
    0x73: "RSM", 0x74: "IRET", 0x75: "INT n", 0x76: "INVD", 0x77: "PAUSE", 0x78: "HLT", 0x79: "INVLPG",
    0x7A: "INVLPGA", 0x7B: "I/O instruction", 0x7C: "MSR access", 0x7D: "task switch", 0x7E: "FERR freeze",
    0x7F: "shutdown (triple fault)", 0x80: "VMRUN", 0x81: "VMMCALL", 0x82: "VMLOAD", 0x83: "VMSAVE",
    0x84: "STGI", 0x85: "CLGI", 0x86: "SKINIT", 0x87: "RDTSCP", 0x88: "ICEBP", 0x89: "WBINVD",
    0x8A: "MONITOR", 0x8B: "MWAIT", 0x8D: "XSETBV", 0x8E: "RDPRU", 0xA2: "INVPCID",
    0x400: "nested page fault", 0x401: "AVIC incomplete IPI", 0x402: "AVIC access to an unaccelerated register",
    0x403: "VMGEXIT",
}  # fmt: skip

_VMX_ENTRY_FAILURE = 1 << 31


def decode(facts: ExitFacts, *, backend: str = "") -> Reason:
    """The meaning of `facts`; `backend` (vmx, svm, pvm or "") says whose numbers the hardware reasons are."""
    function = {
        "INTERNAL_ERROR": _internal_error,
        "FAIL_ENTRY": _fail_entry,
        "UNKNOWN": _unknown,
        "EXCEPTION": _exception,
        "MEMORY_FAULT": _memory_fault,
        "SYSTEM_EVENT": _system_event,
        "SHUTDOWN": _shutdown,
    }.get(facts.reason)
    if function is not None:
        return function(facts, backend)
    # "reason 39" where the header that pykvm was built with has no name for it
    name = f"KVM_EXIT_{facts.reason}" if facts.reason.isidentifier() else f"exit {facts.reason}"
    return Reason(name, f"KVM left the guest with {name}, which pykvm cannot continue from")


def _shutdown(facts: ExitFacts, backend: str) -> Reason:
    what = "an exception could not be delivered, nor the double fault that followed"
    return Reason("KVM_EXIT_SHUTDOWN", "triple fault", [what])


def _internal_error(facts: ExitFacts, backend: str) -> Reason:
    name, title = SUBERRORS.get(facts.suberror, ("unknown", "KVM gave up"))
    reason = Reason("KVM_EXIT_INTERNAL_ERROR", title, [f"suberror {facts.suberror} ({name})"])
    if facts.suberror == 1:
        reason.emulation = True
        reason.instruction = instruction_bytes(facts.data)
        # What follows the defined words is not ABI; it begins with the hardware's exit reason since Linux 5.15
        debug = facts.data[3:]
        if debug and backend in ("vmx", "svm"):
            reason.details.append(f"hardware exit {describe_hardware_exit(debug[0], backend)}")
        if debug:
            reason.details.append(f"debug data {' '.join(f'{word:#x}' for word in debug)}")
        return reason
    if facts.suberror == 3 and len(facts.data) >= 2:
        reason.details.append(f"event being delivered {_vectoring(facts.data[0])}")
        reason.details.append(f"hardware exit {describe_hardware_exit(facts.data[1], backend)}")
    elif facts.suberror == 4 and facts.data:
        reason.details.append(f"hardware exit {describe_hardware_exit(facts.data[0], backend)}")
    if facts.data:
        reason.details.append(f"data {' '.join(f'{word:#x}' for word in facts.data)}")
    return reason


def instruction_bytes(data: Sequence[int]) -> bytes:
    """The instruction of struct emulation_failure, if its flags say that it is there (at most 15 bytes)."""
    if len(data) < 3 or not data[0] & 1:  # KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        return b""
    raw = b"".join((word & MASK64).to_bytes(8, "little") for word in data[1:3])
    return raw[1 : 1 + min(raw[0], 15)]


def _fail_entry(facts: ExitFacts, backend: str) -> Reason:
    code = facts.hardware_reason
    reason = Reason("KVM_EXIT_FAIL_ENTRY", "the CPU refused to enter the guest")
    reason.details.append(f"hardware reason {code:#x} on host CPU {facts.cpu}: {describe_entry_failure(code, backend)}")
    return reason


def describe_entry_failure(code: int, backend: str) -> str:
    """hardware_entry_failure_reason in words."""
    if backend == "svm" or code & MASK32 == MASK32:
        # SVM_EXIT_ERR is -1, in 64 or (before Linux 5.10) 32 bits
        return (
            "invalid VMCB: VMRUN found the guest's state inconsistent"
            if code & MASK32 == MASK32
            else (f"SVM exit code {describe_svm_exit(code)}")
        )
    if code & _VMX_ENTRY_FAILURE:
        text = VMX_EXITS.get(code & 0xFFFF, "")
        return f"VMX exit reason {code & 0xFFFF}, {text or 'unknown'}"
    text = VMX_INSTRUCTION_ERRORS.get(code, "")
    return f"VM-instruction error {code}, {text}" if text else f"code {code:#x}"


def describe_hardware_exit(code: int, backend: str) -> str:
    """An exit reason of VT-x or AMD-V in words; only the number where the backend is neither."""
    if backend == "vmx":
        text = VMX_EXITS.get(code & 0xFFFF, "") or "unknown"
        failed = " (VM entry failed)" if code & _VMX_ENTRY_FAILURE else ""
        return f"{code & 0xFFFF} ({text}){failed}"
    if backend == "svm":
        return describe_svm_exit(code)
    return f"{code:#x}"


def describe_svm_exit(code: int) -> str:
    """A #VMEXIT code in words (KVM passes it as 32 or 64 bits)."""
    if code & MASK32 == MASK32:
        return "-1 (invalid VMCB)"
    if code < 0x20:
        return f"{code:#x} ({'write' if code & 0x10 else 'read'} of CR{code & 0xF})"
    if code < 0x40:
        return f"{code:#x} ({'write' if code & 0x10 else 'read'} of DR{code & 0xF})"
    if 0x40 <= code < 0x60:
        return f"{code:#x} (exception {describe_exception(code - 0x40)})"
    return f"{code:#x} ({SVM_EXITS.get(code, 'unknown')})"


def describe_exception(vector: int) -> str:
    """An exception vector in words."""
    return EXCEPTIONS[vector] if 0 <= vector < len(EXCEPTIONS) else f"vector {vector}"


def _vectoring(info: int) -> str:
    """IDT-vectoring information (SDM vol. 3C 25.9.3; EXITINTINFO of AMD has the same layout up to bit 11)."""
    if not info & 1 << 31:
        return f"{info:#x} (not valid)"
    kind = ("external interrupt", "reserved", "NMI", "exception", "software interrupt", "privileged software exception",
            "software exception", "other")[info >> 8 & 7]  # fmt: skip
    vector = info & 0xFF
    return f"{info:#x} ({kind} {describe_exception(vector) if kind.endswith('exception') else vector})"


def _unknown(facts: ExitFacts, backend: str) -> Reason:
    what = describe_hardware_exit(facts.hardware_reason, backend)
    return Reason("KVM_EXIT_UNKNOWN", "the CPU left the guest for a reason that KVM does not know", [
        f"hardware exit {what}"
    ])  # fmt: skip


def _exception(facts: ExitFacts, backend: str) -> Reason:
    what = f"{describe_exception(facts.vector)}, error code {facts.error_code:#x}"
    return Reason("KVM_EXIT_EXCEPTION", "an exception that KVM hands to user space", [what])


def _memory_fault(facts: ExitFacts, backend: str) -> Reason:
    end = facts.gpa + facts.size
    private = " (a private page)" if facts.flags & 1 << 3 else ""
    where = f"guest physical [{facts.gpa:#x}, {end:#x}){private}"
    return Reason("KVM_EXIT_MEMORY_FAULT", "KVM could not resolve a guest memory access", [where])


def _system_event(facts: ExitFacts, backend: str) -> Reason:
    kind = SYSTEM_EVENTS.get(facts.event, "unknown")
    return Reason("KVM_EXIT_SYSTEM_EVENT", f"the guest reported a system event: {kind}", [f"type {facts.event}"])
