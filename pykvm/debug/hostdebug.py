"""What this host's KVM can do for a debugger, found by trying. Layer: debug.

Not every KVM keeps the API's word. kvm_pvm interprets ring 0: debug registers and single steps work there, data
watchpoints and INT3 do not, and in ring 3, which runs on the CPU, nothing does: the guest itself gets the #DB.
kvm_amd on a CPU that QEMU emulates steps everywhere, but that CPU loads no debug registers for its guest and does not
intercept INT3. So small guests of a few instructions are run once per process, 1 to 3 ms together.
"""

from __future__ import annotations

from pykvm.core.machine import Machine
from pykvm.debug.guestdebug import ACCESS, DebugRegister, GuestDebug
from pykvm.x86 import layout
from pykvm.x86.paging import PTE_US
from pykvm.x86.states import long_mode, protected_flat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.vcpu import Exit


class Trap:
    """An instruction that makes KVM exit, to be put where a software breakpoint is.

    `code` replaces the guest's bytes.
    """

    __slots__ = ("code", "name")

    def __init__(self, name: str, code: bytes) -> None:
        self.name = name
        self.code = code

    def __repr__(self) -> str:
        return f"<Trap {self.name}>"


INT3 = Trap("int3", b"\xcc")  # KVM_EXIT_DEBUG, or KVM_EXIT_INTERNAL_ERROR from an emulator that lacks it
FWAIT = Trap("fwait", b"\x9b")  # the emulator lacks this one in any mode, INT3 in real mode it has
OUT = Trap("out", bytes([0xE6, layout.PORT_DEBUG_TRAP]))  # out %al, $port: KVM_EXIT_IO, in ring 0 (or with IOPL)


class DebugSupport:
    """What works. `user_step` and `user_breakpoints` speak of ring 3, the others of ring 0.

    `trap` is for software breakpoints in protected and long mode, `real_trap` for those in real mode; both are equally
    long.
    """

    __slots__ = ("breakpoints", "real_trap", "step", "trap", "user_breakpoints", "user_step", "watchpoints")

    def __init__(
        self,
        trap: Trap,
        real_trap: Trap,
        *,
        breakpoints: bool,
        watchpoints: bool,
        step: bool,
        user_step: bool,
        user_breakpoints: bool,
    ) -> None:
        self.trap = trap
        self.real_trap = real_trap
        self.breakpoints = breakpoints
        self.watchpoints = watchpoints
        self.step = step
        self.user_step = user_step
        self.user_breakpoints = user_breakpoints

    def lines(self) -> list[str]:
        """For people."""
        word = {True: "yes", False: "no"}
        return [
            f"software breakpoints by {self.trap.name}",
            f"hardware breakpoints: {word[self.breakpoints]}, watchpoints: {word[self.watchpoints]}",
            f"single steps: {word[self.step]}",
            f"in ring 3: breakpoints {word[self.user_breakpoints]}, single steps {word[self.user_step]}",
        ]


_BASE = 0x8000
_DATA = 0x9000
_END = b"\xf4"  # hlt
_TOUCH = b"\xa2" + _DATA.to_bytes(4, "little") + _END  # mov %al, _DATA; hlt (32-bit code)
_support: list[DebugSupport] = []


def debug_support() -> DebugSupport:
    """What this host's KVM can do; tried when first asked. Raises what Machine raises."""
    if not _support:
        _support.append(_try_all())
    return _support[0]


def _try_all() -> DebugSupport:
    execute, access = DebugRegister(_BASE + 1), DebugRegister(_DATA, ACCESS)
    seen = _try(INT3.code + _END)
    trap = INT3 if seen in ("DEBUG", "INTERNAL_ERROR") else OUT
    return DebugSupport(
        trap,
        FWAIT if seen == "INTERNAL_ERROR" else trap,
        breakpoints=_try(b"\x90\x90" + _END, register=execute) == "DEBUG",
        watchpoints=_try(_TOUCH, register=access) == "DEBUG",
        step=_try(b"\x90" + _END, step=True) == "DEBUG",
        user_step=_try(b"\x90" + _END, step=True, user=True) == "DEBUG",
        user_breakpoints=_try(INT3.code, user=True) == "DEBUG",
    )


def _try(code: bytes, *, register: DebugRegister | None = None, step: bool = False, user: bool = False) -> str:
    """The first exit of a guest that runs `code` with INT3 intercepted; the IDT is empty: what it gets kills it."""
    with Machine(memory=layout.MIB, irqchip="none") as vm:
        vcpu = vm.vcpus[0]
        vm.memory.write(_BASE, code)
        state = long_mode(vm.memory, _BASE) if user else protected_flat(vm.memory, _BASE)
        if user:
            _open_to_ring3(vm)
            for segment in (state.cs, *state.data_segments):
                segment.dpl = 3
                segment.selector |= 3
        vcpu.load_state(state)
        vm.hooks.debug = lambda vcpu, arch: None
        debug = GuestDebug(vcpu, block_irq=False)
        debug.stepping = step
        debug.apply([register, None, None, None], software=True)
        return _run(vcpu.run_once)


def _run(run_once: Callable[[], Exit]) -> str:
    while (seen := run_once()).reason == "INTR":
        pass  # a signal of the process, not the guest's doing
    return seen.reason


def _open_to_ring3(vm: Machine) -> None:
    for table in (layout.BOOT_PML4, layout.BOOT_PDPT, layout.BOOT_PD):
        vm.memory.write_uint(table, 8, vm.memory.read_u64(table) | PTE_US)
