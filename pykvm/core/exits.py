"""The exit table: what happens for each KVM_EXIT_*. Layer: core.

A handler gets the vCPU and the exit's key (native/runloop.h) and returns None (run on) or an Outcome. Handlers run on
the vCPU's thread. A test walks every exit reason of the header and fails if one is in neither TABLE nor NOT_ON_X86.

Source: KVM API documentation, section 5 "The kvm_run structure".
"""

from __future__ import annotations

from pykvm._native import ffi, lib
from pykvm.core.outcome import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.vcpu import Vcpu

    Handler = Callable[[Vcpu, int], Outcome | None]

KEY_WRITE = lib.PK_KEY_WRITE
KEY_STRING = lib.PK_KEY_STRING
KEY_COALESCED = lib.PK_KEY_COALESCED
SIZE_SHIFT = lib.PK_KEY_SIZE_SHIFT
PORT_SHIFT = lib.PK_KEY_PORT_SHIFT


MASK64 = (1 << 64) - 1
NO_HYPERCALL = -1000  # KVM_ENOSYS (<linux/kvm_para.h>)


class Hooks:
    """What the machine's owner wants to handle himself; None means: the default of the exit table.

    hypercall(vcpu, number, args) -> int         the guest's RAX
    rdmsr(vcpu, index) -> int | None             None: #GP, as for an MSR that does not exist
    wrmsr(vcpu, index, value) -> bool            False: #GP
    ioapic_eoi(vector)                           split irqchip: a level interrupt was acknowledged
    debug(vcpu, exit) -> Outcome | None          KVM_EXIT_DEBUG; `exit` has exception, pc, dr6, dr7
    internal_error(vcpu, key) -> Outcome | None  KVM_EXIT_INTERNAL_ERROR; `on_fatal` is what is done without a hook
    irq_window(vcpu) -> Outcome | None           the guest can take an interrupt (no in-kernel irqchip)
    """

    __slots__ = ("debug", "hypercall", "internal_error", "ioapic_eoi", "irq_window", "rdmsr", "wrmsr")

    def __init__(self) -> None:
        self.hypercall: Callable[[Vcpu, int, tuple[int, ...]], int] | None = None
        self.rdmsr: Callable[[Vcpu, int], int | None] | None = None
        self.wrmsr: Callable[[Vcpu, int, int], bool] | None = None
        self.ioapic_eoi: Callable[[int], None] | None = None
        self.debug: Callable[[Vcpu, object], Outcome | None] | None = None
        self.internal_error: Callable[[Vcpu, int], Outcome | None] | None = None
        self.irq_window: Callable[[Vcpu], Outcome | None] | None = None


# -- port and memory accesses ----------------------------------------------------------------------------------


def on_io(vcpu: Vcpu, key: int) -> Outcome | None:
    """IN, OUT and their string forms. Remembers the way to the device, so that the next one is a dict lookup."""
    if key & KEY_STRING:
        return _string_io(vcpu, key)
    port, size, write = key >> PORT_SHIFT & 0xFFFF, key >> SIZE_SHIFT & 0x7F, bool(key & KEY_WRITE)
    bus = vcpu.bus
    region = bus.ports.find(port, size)
    if region is not None and len(bus.routes) < bus.MAX_ROUTES:
        function = region.device.write if write else region.device.read
        bus.routes[key] = (function, port - region.base, size, write)
    if write:
        return bus.ports.write(port, size, vcpu.state.value)
    vcpu.state.value = bus.ports.read(port, size)
    return None


def _string_io(vcpu: Vcpu, key: int) -> Outcome | None:
    port, size, ports = key >> PORT_SHIFT & 0xFFFF, key >> SIZE_SHIFT & 0x7F, vcpu.bus.ports
    count = vcpu.state.run.io.count  # KVM bounds size * count by a page
    data = ffi.buffer(lib.pk_io_data(vcpu.state), size * count)
    for at in range(0, size * count, size):
        if key & KEY_WRITE:
            outcome = ports.write(port, size, int.from_bytes(data[at : at + size], "little"))
            if outcome is not None:
                return outcome
        else:
            data[at : at + size] = ports.read(port, size).to_bytes(size, "little")
    return None


def on_mmio(vcpu: Vcpu, key: int) -> Outcome | None:
    """A memory access outside the slots, or a write to a read-only one."""
    size, state = key >> SIZE_SHIFT & 0x7F, vcpu.state
    if key & KEY_WRITE:
        return vcpu.bus.mmio.write(state.address, size, state.value)
    state.value = vcpu.bus.mmio.read(state.address, size)
    return None


def drain_coalesced(vcpu: Vcpu) -> Outcome | None:
    """Deliver the batched writes of the coalesced ring, oldest first."""
    entry, bus = ffi.new("struct kvm_coalesced_mmio *"), vcpu.bus
    with vcpu.coalesced_lock:  # one reader at a time: the ring is the VM's
        while lib.pk_coalesced_pop(vcpu.state, entry):
            size = min(entry.len, 8)
            value = int.from_bytes(bytes(entry.data)[:size], "little")
            space = bus.ports if entry.pio else bus.mmio
            outcome = space.write(entry.phys_addr, size, value)
            if outcome is not None:
                return outcome
    return None


# -- the guest's ends ------------------------------------------------------------------------------------------


def on_hlt(vcpu: Vcpu, key: int) -> Outcome:
    """HLT without an in-kernel local APIC: nothing inside KVM can wake the vCPU."""
    return Outcome("HALTED", vcpu=vcpu.index)


def on_shutdown(vcpu: Vcpu, key: int) -> Outcome:
    """A triple fault (or an INIT while SVM intercepts it)."""
    return Outcome("TRIPLE_FAULT", vcpu=vcpu.index, detail="triple fault")


def on_system_event(vcpu: Vcpu, key: int) -> Outcome | None:
    """Shutdown, reset or crash that the guest asked of the hypervisor (Hyper-V, SEV)."""
    kind = vcpu.state.run.system_event.type
    if kind == lib.KVM_SYSTEM_EVENT_SHUTDOWN:
        return Outcome("POWER_OFF", vcpu=vcpu.index, detail="system event")
    if kind == lib.KVM_SYSTEM_EVENT_RESET:
        return Outcome("RESET", vcpu=vcpu.index, detail="system event")
    return Outcome("CRASH", vcpu=vcpu.index, detail=f"system event {kind}")


def on_fatal(vcpu: Vcpu, key: int) -> Outcome:
    """KVM cannot go on. The machine adds a crash report, which decodes the facts in kvm_run."""
    return Outcome("CRASH", vcpu=vcpu.index, detail=describe_fatal(vcpu))


def describe_fatal(vcpu: Vcpu) -> str:
    """One line about the last exit: its reason and the numbers that kvm_run has for it."""
    from pykvm.kvm.exits import reason_name

    run = vcpu.state.run
    name = reason_name(run.exit_reason)
    if run.exit_reason == lib.KVM_EXIT_INTERNAL_ERROR:
        return f"KVM_EXIT_INTERNAL_ERROR, suberror {run.internal.suberror}"
    if run.exit_reason == lib.KVM_EXIT_FAIL_ENTRY:
        return f"KVM_EXIT_FAIL_ENTRY, hardware reason {run.fail_entry.hardware_entry_failure_reason:#x}"
    if run.exit_reason == lib.KVM_EXIT_UNKNOWN:
        return f"KVM_EXIT_UNKNOWN, hardware reason {run.hw.hardware_exit_reason:#x}"
    if run.exit_reason == lib.KVM_EXIT_EXCEPTION:
        return f"KVM_EXIT_EXCEPTION, vector {run.ex.exception}, error code {run.ex.error_code:#x}"
    return f"KVM_EXIT_{name}"


# -- the owner's hooks -----------------------------------------------------------------------------------------


def on_hypercall(vcpu: Vcpu, key: int) -> Outcome | None:
    """A hypercall of KVM's own ABI that the owner asked for by KVM_CAP_EXIT_HYPERCALL (KVM_HC_MAP_GPA_RANGE)."""
    call = vcpu.state.run.hypercall
    call.ret = _answer_hypercall(vcpu, call.nr, tuple(call.args))
    return None


def on_xen(vcpu: Vcpu, key: int) -> Outcome | None:
    """Any VMCALL or VMMCALL of the guest, once `Machine.on_hypercall` has turned the interception on."""
    exit_ = vcpu.state.run.xen
    if exit_.type != lib.KVM_EXIT_XEN_HCALL:
        return on_fatal(vcpu, key)
    call = exit_.u.hcall
    call.result = _answer_hypercall(vcpu, call.input, tuple(call.params))
    return None


def _answer_hypercall(vcpu: Vcpu, number: int, arguments: tuple[int, ...]) -> int:
    hook = vcpu.hooks.hypercall
    return (NO_HYPERCALL if hook is None else hook(vcpu, number, arguments)) & MASK64


def on_rdmsr(vcpu: Vcpu, key: int) -> Outcome | None:
    """RDMSR of an MSR that KVM does not know or that the filter denies."""
    msr, hook = vcpu.state.run.msr, vcpu.hooks.rdmsr
    value = None if hook is None else hook(vcpu, msr.index)
    msr.error = value is None
    msr.data = (value or 0) & MASK64
    return None


def on_wrmsr(vcpu: Vcpu, key: int) -> Outcome | None:
    """WRMSR of such an MSR."""
    msr, hook = vcpu.state.run.msr, vcpu.hooks.wrmsr
    msr.error = hook is None or not hook(vcpu, msr.index, msr.data)
    return None


def on_eoi(vcpu: Vcpu, key: int) -> Outcome | None:
    """Split irqchip: the guest acknowledged a level-triggered vector."""
    if vcpu.hooks.ioapic_eoi is not None:
        vcpu.hooks.ioapic_eoi(vcpu.state.run.eoi.vector)
    return None


def on_debug(vcpu: Vcpu, key: int) -> Outcome | None:
    """A breakpoint or single step that the host asked for."""
    hook = vcpu.hooks.debug
    return on_fatal(vcpu, key) if hook is None else hook(vcpu, vcpu.state.run.debug.arch)


def on_internal_error(vcpu: Vcpu, key: int) -> Outcome | None:
    """KVM cannot emulate an instruction, perhaps because a debugger has put it there."""
    hook = vcpu.hooks.internal_error
    return on_fatal(vcpu, key) if hook is None else hook(vcpu, key)


def on_irq_window(vcpu: Vcpu, key: int) -> Outcome | None:
    """The interrupt window that the host asked for is open."""
    hook = vcpu.hooks.irq_window
    return None if hook is None else hook(vcpu)


def on_nothing(vcpu: Vcpu, key: int) -> Outcome | None:
    """Exits that only want KVM_RUN again: a task-priority change, a bus lock, an NMI for the host."""
    return None


HANDLERS: dict[str, Handler] = {
    "UNKNOWN": on_fatal,
    "EXCEPTION": on_fatal,
    "IO": on_io,
    "HYPERCALL": on_hypercall,
    "DEBUG": on_debug,
    "HLT": on_hlt,
    "MMIO": on_mmio,
    "IRQ_WINDOW_OPEN": on_irq_window,
    "SHUTDOWN": on_shutdown,
    "FAIL_ENTRY": on_fatal,
    "INTR": on_nothing,
    "SET_TPR": on_nothing,
    "TPR_ACCESS": on_nothing,
    "NMI": on_nothing,
    "INTERNAL_ERROR": on_internal_error,
    "SYSTEM_EVENT": on_system_event,
    "IOAPIC_EOI": on_eoi,
    "HYPERV": on_fatal,
    "X86_RDMSR": on_rdmsr,
    "X86_WRMSR": on_wrmsr,
    "DIRTY_RING_FULL": on_fatal,
    "AP_RESET_HOLD": on_fatal,
    "X86_BUS_LOCK": on_nothing,
    "XEN": on_xen,
    "NOTIFY": on_fatal,
    "MEMORY_FAULT": on_fatal,
    "TDX": on_fatal,
    "SNP_REQ_CERTS": on_fatal,
}

# Reasons that only other architectures use
NOT_ON_X86 = frozenset({
    "S390_SIEIC", "S390_RESET", "DCR", "OSI", "PAPR_HCALL", "S390_UCONTROL", "WATCHDOG", "S390_TSCH", "EPR",
    "S390_STSI", "ARM_NISV", "ARM_SEA", "ARM_LDST64B", "RISCV_SBI", "RISCV_CSR", "LOONGARCH_IOCSR",
})  # fmt: skip

# By number. Reasons newer than the header are not in it: the vCPU treats them as fatal.
TABLE: dict[int, Handler] = {}
for _name, _handler in HANDLERS.items():
    if hasattr(lib, f"KVM_EXIT_{_name}"):
        TABLE[getattr(lib, f"KVM_EXIT_{_name}")] = _handler
