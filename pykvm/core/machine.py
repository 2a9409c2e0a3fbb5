"""A virtual machine: memory, vCPUs, bus, interrupts, and the states it can be in. Layer: core.

    created/paused --start, resume, run--> running --Outcome, pause, timeout--> paused --close--> closed

Locks, in the order in which they may be taken:

1. `_control`  serialises start, pause, reset, close and the halt check; held while vCPUs are waited for
2. `_changed`  (condition) guards `_active`, `_outcome`, `_error` and every vCPU's `running`; held briefly
3. device locks, then `coalesced_lock`, then the console's

A vCPU thread takes `_changed` and device locks only; so does the I/O thread, but for the halt check, which gives up
instead of waiting for `_control`.
"""

from __future__ import annotations

import os
import threading
from time import monotonic

from pykvm._native import ffi, lib
from pykvm.config import MachineConfig
from pykvm.core import reaper
from pykvm.core.actions import ActionTable
from pykvm.core.bus import Bus
from pykvm.core.console import Console
from pykvm.core.debugging import Debugging
from pykvm.core.driving import Driving
from pykvm.core.exits import Hooks
from pykvm.core.halt import HaltWatch
from pykvm.core.iothread import IoThread
from pykvm.core.irq import IrqController
from pykvm.core.memory import GuestMemory
from pykvm.core.outcome import Outcome
from pykvm.core.snapshots import Snapshots
from pykvm.core.vcpu import Vcpu
from pykvm.core.vmsetup import create_vcpus, create_vm, map_slot
from pykvm.errors import MachineStateError, MissingCapability
from pykvm.kvm.system import Kvm
from pykvm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self, TypeVar

    from pykvm.core.device import Device, IrqLine
    from pykvm.core.filememory import FileGuard
    from pykvm.core.memimage import SlotImage
    from pykvm.core.memory import Slot
    from pykvm.core.spare import Spare
    from pykvm.core.wires import Wires
    from pykvm.kvm.vm import VmFd
    from pykvm.testing.talk import Talk

    T = TypeVar("T")

FORGIVEN_S = 1.0  # a pause of this length is told to the guest; Linux's watchdogs complain after 10 and 20 s
STOP_TIMEOUT_S = 5.0  # a vCPU leaves the guest in microseconds; longer means that a device's Python code hangs


class Machine(Debugging, Driving, Snapshots):
    """A bare machine: RAM, vCPUs, an irqchip, no device. `pykvm.board` puts a PC together from it.

    >>> with Machine(memory="1M", irqchip="none") as vm:
    ...     vm.memory.write(0x1000, b"\\xf4")  # hlt
    ...     vm.vcpus[0].load_state(real_mode(0x100, 0))
    ...     vm.run(timeout=1)
    <Outcome HALTED>

    Takes a MachineConfig, or its options as keywords; `image` is memory that a snapshot has, `spare` what another fork
    of the same snapshot has left.
    Raises KvmUnavailable, KvmError, ConfigError.
    """

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        kvm: Kvm | None = None,
        image: Sequence[SlotImage] = (),
        spare: Spare | None = None,
        **options: object,
    ) -> None:
        self.config = config or MachineConfig(**options)  # type: ignore[arg-type]
        self.bus = Bus()
        self.hooks = Hooks()
        self.console = Console()
        self.console.open_talk = self._open_talk
        self.actions = ActionTable()
        self.irqs = IrqController(self.config.irqchip)
        self.coalesced_lock = threading.Lock()
        self.io = IoThread("pykvm-io", self._failed)
        config = self.config
        self.memory = GuestMemory(memfd=config.memfd, hugepages=config.hugepages, shared=config.shared)
        self.wires: dict[int, Wires] = {}  # by the address of the transport that they are a virtio device's
        self.vcpus = [Vcpu(index, self) for index in range(self.config.cpus)]
        self.on_connect: list[Callable[[VmFd], object]] = []  # for each new KVM VM: at once, and after each reset
        self.on_reset: list[Callable[[], object]] = []
        self.on_close: list[Callable[[], object]] = []
        self.on_end: list[Callable[[], object]] = []  # called under `_changed` when a run ends or is paused: only wake
        self.heir: Callable[[Machine], bool] | None = None  # True: it took memory, VM and vCPUs of the closing machine
        self.keep_crash: Callable[[Vcpu, Outcome], bool] | None = None  # True: a debugger keeps the crashed guest
        self._control = threading.RLock()
        self._changed = threading.Condition()
        self._active = False  # started and not ended or paused since, though vCPUs may be frozen for a moment
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._pid = os.getpid()
        self._vm: VmFd | None = None
        self._owns_kvm = kvm is None
        self.kvm = kvm or (Kvm() if spare is None else spare.kvm)
        self._halt_watch = HaltWatch(self)
        self._guards: list[FileGuard] = []
        self._runners: Sequence[Vcpu] | None = None  # None: all; else a debugger lets only these run
        try:
            if spare is not None:
                self.memory.adopt(spare.slots)
                self.wires, spare.wires = spare.wires, {}
            elif image:
                for each in image:
                    self.memory.add_image(each)
            else:
                self._add_ram()
            self.watch_files()
            self._connect(spare)
        except BaseException:
            self.close()
            raise

    # -- parts --------------------------------------------------------------------------------------------------

    def _add_ram(self) -> None:
        low = min(self.config.memory, layout.PCI_HOLE)
        if low:
            self.memory.add(0, low)
        if self.config.memory > low:
            self.memory.add(layout.HIGH_RAM, self.config.memory - low, name="ram-high")

    def _connect(self, spare: Spare | None = None) -> None:
        """Make the KVM side of the machine: VM, slots, vCPUs."""
        if spare is not None:
            self._vm = spare.connect(self)
        else:
            self._vm = create_vm(self.kvm, self.config, self.memory.slots)
            create_vcpus(self._vm, self.kvm, self.config, self.vcpus)
        for handle in (self._vm, *(vcpu.fd for vcpu in self.vcpus)):
            handle.issued.clear()  # from here on it is of interest, see core.spare
        self.irqs.connect(self._vm)
        for hook in self.on_connect:
            hook(self._vm)

    def similar(self, image: Sequence[SlotImage], spare: Spare | None = None) -> Machine:
        """A new machine of the same description over this memory, its vCPUs in no certain state (see `fork`)."""
        return Machine(self.config, image=image, spare=spare)

    def give_vm(self) -> int:
        """The VM's file descriptor, which is the caller's to close, with /dev/kvm's."""
        vm, self._vm, self._owns_kvm = self.vm, None, False
        number, vm.fd = vm.fd, -1
        return number

    def _disconnect(self) -> None:
        fds = [fd for vcpu in self.vcpus for fd in vcpu.disconnect()]
        vm, self._vm = self._vm, None
        if vm is not None and vm.fd >= 0:
            fds.append(vm.fd)
            vm.fd = -1
        if self.config.irqchip == "kernel" and fds:
            reaper.close_later(fds)
        else:
            for fd in fds:
                os.close(fd)

    @property
    def vm(self) -> VmFd:
        """The KVM VM, for ioctls that have no name here."""
        if self._vm is None:
            raise MachineStateError("the machine is closed")
        return self._vm

    def add_memory(self, gpa: int, size: int, *, name: str = "ram", readonly: bool = False) -> Slot:
        """Map `size` bytes of new memory at `gpa`; a read-only slot sends the guest's writes to the bus."""
        slot = self.memory.add(gpa, size, name=name, readonly=readonly)
        map_slot(self.vm, slot)
        return slot

    def watch_files(self) -> None:
        """End the run with a CRASH when a page of a file that is mapped as memory is gone (core.filememory)."""
        for slot in self.memory.slots:
            guard = slot.guard
            if guard is not None and guard not in self._guards:
                self._guards.append(guard)
                self.io.add_reader(guard.event, self._on_guard)
                self.bus.mmio.on_unmapped = self._on_unmapped

    def _on_guard(self) -> None:
        hits = [guard.hit() for guard in self._guards]  # each has to be read
        if any(hits):
            self._memory_gone()

    def _memory_gone(self) -> None:
        self.finish(Outcome("CRASH", detail=self.memory.damage()))

    def _on_unmapped(self, address: int, write: bool) -> None:
        """KVM emulates an instruction that found no memory. A write to a ROM comes here as well."""
        slot = self.memory.slot_at(address)
        if slot is not None and slot.guard is not None and not (write and slot.readonly):
            self._memory_gone()

    def map_new_slots(self, known: int) -> None:
        """Give KVM the slots from index `known` on, which a loader added to `memory`."""
        for slot in self.memory.slots:
            if slot.index >= known:
                map_slot(self.vm, slot)

    def attach(
        self,
        device: Device,
        *,
        ports: range | None = None,
        mmio: range | None = None,
        name: str | None = None,
    ) -> None:
        """Let `device` answer these ports and/or guest physical addresses."""
        self.bus.attach(device, ports, mmio, name or str(getattr(device, "name", type(device).__name__)))

    def detach(self, device: Device) -> None:
        """Take a device off the bus."""
        self.bus.detach(device)

    def coalesce(self, *, ports: range | None = None, mmio: range | None = None) -> None:
        """Let KVM batch guest writes to these addresses; their device sees them before the next other exit."""
        if ports is not None:
            self.vm.register_coalesced(ports.start, len(ports), port=True)
        if mmio is not None:
            self.vm.register_coalesced(mmio.start, len(mmio))

    def irq_line(self, gsi: int) -> IrqLine:
        """An interrupt line for a device."""
        return self.irqs.line(gsi)

    def on_msr(
        self,
        *,
        read: Callable[[Vcpu, int], int | None] | None = None,
        write: Callable[[Vcpu, int, int], bool] | None = None,
    ) -> None:
        """Handle MSRs that KVM does not know or refuses (see Hooks); needs KVM_CAP_X86_USER_SPACE_MSR."""
        reasons = lib.KVM_MSR_EXIT_REASON_UNKNOWN | lib.KVM_MSR_EXIT_REASON_INVAL | lib.KVM_MSR_EXIT_REASON_FILTER
        self.hooks.rdmsr, self.hooks.wrmsr = read, write
        self.vm.enable_cap(lib.KVM_CAP_X86_USER_SPACE_MSR, reasons)

    def on_hypercall(self, hook: Callable[[Vcpu, int, tuple[int, ...]], int]) -> None:
        """Handle every VMCALL/VMMCALL of the guest: hook(vcpu, rax, args) gives the new RAX.

        Uses KVM's Xen hypercall interception (KVM_XEN_HVM_CONFIG, 4.91 ff.), because KVM itself answers the others;
        KVM's own paravirtual calls (kick, send IPI) are then the hook's business too. `args` are rdi, rsi, rdx, r10,
        r8, r9 in 64-bit mode and ebx, ecx, edx, esi, edi, ebp in 32-bit mode. Must come before the first run.
        Raises MissingCapability on a kernel without CONFIG_KVM_XEN.
        """
        if not self.vm.check_extension(lib.KVM_CAP_XEN_HVM) & lib.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL:
            raise MissingCapability(["KVM_CAP_XEN_HVM"])
        config = ffi.new("struct kvm_xen_hvm_config *")
        config.flags = lib.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL
        self.vm.ioctl("KVM_XEN_HVM_CONFIG", config)
        self.hooks.hypercall = hook

    def publish_actions(self) -> None:
        """Make vCPUs use the action table as it is now."""
        for vcpu in self.vcpus:
            vcpu.state.table = ffi.NULL if self.actions.suspended else self.actions.table

    # -- running ------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the guest runs: started, and neither ended nor paused since."""
        with self._changed:
            return self._active

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def outcome(self) -> Outcome | None:
        """How the last run ended; None while running and after a pause."""
        with self._changed:
            return self._outcome

    @property
    def ended(self) -> bool:
        """Whether the last run ended by itself: `wait` then tells how, at once."""
        with self._changed:
            return self._outcome is not None or self._error is not None

    def start(self) -> None:
        """Run the guest on the vCPUs' threads; returns at once. A machine that runs already goes on."""
        with self._control:
            self.vm.check_owner()
            self.io.start()
            with self._changed:
                self._active = True
                self._outcome = self._error = None
            self.publish_actions()
            self.thaw()
            if self.config.halt_detection and self.config.irqchip != "none":
                self._halt_watch.start()

    resume = start

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait for the guest's end: its Outcome, with every vCPU paused; None if `timeout` seconds pass first.

        Raises DeviceError when a user's device raised, KvmError when the host failed.
        """
        deadline = None if timeout is None else monotonic() + timeout
        with self._changed:
            if not self._active and self._outcome is None and self._error is None:
                raise MachineStateError("the machine is not running: start() it before wait()")
            while self._outcome is None and self._error is None:
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
            self._wait_paused()
            error, outcome = self._error, self._outcome
        self.console.flush()
        if error is not None:
            raise error
        return outcome

    def run(self, timeout: float | None = None) -> Outcome:
        """Run the guest to its end, or for `timeout` seconds: then the Outcome is TIMEOUT and the machine is paused.

        Time in which the host kept the vCPUs waiting for a CPU does not count (see core.guestclock).
        """
        self.start()
        outcome = self.wait(None) if timeout is None else self._wait_guest_time(timeout)
        if outcome is None:
            self.pause()
            with self._changed:
                # the end may have come between the two calls
                outcome = self._outcome = self._outcome or Outcome("TIMEOUT", detail=f"after {timeout} s")
            self.console.flush()
        return outcome

    def _wait_guest_time(self, timeout: float) -> Outcome | None:
        from pykvm.core.guestclock import GuestClock

        clock, left = GuestClock(self), timeout
        while (outcome := self.wait(left)) is None and self.running:
            left = timeout - clock.elapsed()
            if left <= 0:
                break
        return outcome

    def pause(self) -> None:
        """Stop every vCPU between two instructions; `start` goes on. From a device: asks, and returns at once."""
        with self._changed:
            self._active = False
            self._tell_of_the_end()
        if any(vcpu.on_own_thread() for vcpu in self.vcpus):
            self._ask_to_pause()
        else:
            self.freeze()

    def stop(self) -> None:
        """End the run with Outcome STOPPED (unless it has ended); callable from any thread, devices included."""
        self.finish(Outcome("STOPPED"))
        if not any(vcpu.on_own_thread() for vcpu in self.vcpus):
            self.pause()

    def stop_soon(self) -> None:
        """End the run with Outcome STOPPED without waiting for it; callable from any thread."""
        self.finish(Outcome("STOPPED"))

    def finish(self, outcome: Outcome) -> None:
        """End the run with `outcome` (the first one counts); returns at once."""
        with self._changed:
            if self._active:
                self._end(outcome)
        self._ask_to_pause()

    def reset(self) -> None:
        """Back to power-on: a fresh KVM VM over the same memory, devices reset, then the boot image loaded again.

        The machine is left paused. RAM keeps what the loader does not overwrite, as on a real reset.
        """
        with self._control:
            self.pause()
            self._disconnect()
            self._connect()
            for device in self.bus.devices:
                device.reset()
            for hook in self.on_reset:
                hook()
            with self._changed:
                self._outcome = self._error = None

    def close(self) -> None:
        """Stop, and release every thread, mapping and file descriptor. Idempotent; from any state."""
        if self._closed:
            return
        self._closed = True
        ours = os.getpid() == self._pid
        if ours:
            self._end_threads()
        for hook in self.on_close:
            hook()
        for device in self.bus.devices:
            close = getattr(device, "close", None)
            if close is not None:
                close()
        if self.heir is None or self._vm is None or not ours or not self.heir(self):
            for wires in self.wires.values():
                wires.close()
            self._disconnect()
        self.actions.close()
        self.memory.close()
        if self._owns_kvm:
            self.kvm.close()

    def _end_threads(self) -> None:
        self.finish(Outcome("STOPPED"))
        self._halt_watch.stop()
        self.io.close()
        stuck = [vcpu.index for vcpu in self.vcpus if not vcpu.end_thread(STOP_TIMEOUT_S)]
        if stuck:
            raise MachineStateError(f"vCPU {stuck} hangs in a device's code: its machine cannot be closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside -------------------------------------------------------------------------------------------------

    def frozen(self, function: Callable[[], T]) -> T:
        """function() while every vCPU stands between two instructions; then the run goes on as before."""
        if any(vcpu.on_own_thread() for vcpu in self.vcpus):
            raise MachineStateError("a device or hook runs inside of an instruction: do this from another thread")
        with self._control:
            self.freeze()
            try:
                return function()
            finally:
                self.thaw()

    def paused_for(self, function: Callable[[], T]) -> T:
        """pause(), then function() before anybody can start the machine again."""
        if any(vcpu.on_own_thread() for vcpu in self.vcpus):
            raise MachineStateError("a device or hook runs inside of an instruction: do this from another thread")
        with self._control:
            self.pause()
            return function()

    def forget_end(self) -> None:
        """The machine is not where its last run ended any more."""
        with self._changed:
            self._outcome = self._error = None

    def try_control(self) -> bool:
        """Take `_control` if it is free (the halt check, which must not wait for a close() that waits for it)."""
        return self._control.acquire(blocking=False)

    def release_control(self) -> None:
        """Give `_control` back."""
        self._control.release()

    def freeze(self) -> None:
        """Stop every vCPU between two instructions and wait until all have."""
        with self._control:
            self._ask_to_pause()
            with self._changed:
                self._wait_paused()

    def thaw(self) -> None:
        """Undo `freeze`, unless the run was ended or paused meanwhile, or a debugger holds it."""
        with self._control, self._changed:
            self._resume(self.vcpus if self._runners is None else self._runners)

    def _resume(self, vcpus: Sequence[Vcpu]) -> None:
        """Under `_changed`."""
        for vcpu in [each for each in vcpus if self._active and not each.running]:
            if vcpu.stopped_at is not None and monotonic() - vcpu.stopped_at > FORGIVEN_S:
                vcpu.forgive_pause()
            vcpu.running = True
            vcpu.resume()  # under the lock: another vCPU's end must not post its pause before this

    @property
    def held(self) -> bool:
        """Whether a debugger has stopped vCPUs; the run goes on nevertheless, and `wait` waits."""
        return self._runners is not None

    def hold(self, runners: Sequence[Vcpu] = ()) -> None:
        """Stop every vCPU but `runners` and keep it so, whoever starts the machine, until `release`.

        Not from a vCPU's thread.
        """
        with self._control:
            self.freeze()
            self._runners = runners
            self.thaw()

    def release(self) -> None:
        """Let a machine that was held go on, if it is started."""
        with self._control:
            self._runners = None
            self.thaw()

    def _end(self, outcome: Outcome | None, error: BaseException | None = None) -> None:
        """Record the run's end, under `_changed`: the first one counts."""
        self._active = False
        if error is not None:
            self._error = self._error or error
        else:
            self._outcome = self._outcome or outcome
        self._changed.notify_all()
        self._tell_of_the_end()

    def _tell_of_the_end(self) -> None:
        for listener in self.on_end:
            listener()

    def _open_talk(self) -> Talk:
        from pykvm.testing.talk import Talk

        return Talk(self)

    def _ask_to_pause(self) -> None:
        with self._changed:
            running = [vcpu for vcpu in self.vcpus if vcpu.running]
        for vcpu in running:
            vcpu.pause()

    def _wait_paused(self) -> None:
        """Wait under `_changed` until no vCPU runs."""
        if not self._changed.wait_for(lambda: not any(vcpu.running for vcpu in self.vcpus), STOP_TIMEOUT_S):
            stuck = [vcpu.index for vcpu in self.vcpus if vcpu.running]
            raise MachineStateError(f"vCPU {stuck} does not stop: a device's code hangs")

    def vcpu_stopped(self, vcpu: Vcpu, outcome: Outcome | None, error: BaseException | None) -> None:
        """Called by a vCPU's thread when it leaves the guest for good or for a pause."""
        if outcome is not None and outcome.kind in ("CRASH", "TRIPLE_FAULT") and outcome.report is None:
            if cut := self.memory.damage(seen=True):  # its page tables or its code, perhaps
                outcome = Outcome("CRASH", vcpu=vcpu.index, detail=cut)
            error = error or self._add_report(vcpu, outcome)
            if self.keep_crash is not None and error is None and self.keep_crash(vcpu, outcome):
                outcome = None
        with self._changed:
            vcpu.running = False
            vcpu.stopped_at = monotonic()
            if error is not None or outcome is not None:
                self._end(outcome, error)
            self._changed.notify_all()
            ended = not self._active
        if ended:
            self._ask_to_pause()

    def _add_report(self, vcpu: Vcpu, outcome: Outcome) -> BaseException | None:
        from pykvm.debug.collect import collect_report

        try:
            outcome.report = collect_report(self, vcpu, outcome)
        except Exception as problem:  # a report must never hide the crash itself
            return problem
        return None

    def _failed(self, error: BaseException) -> None:
        """A callback of the I/O thread raised."""
        with self._changed:
            self._end(None, error)
        self._ask_to_pause()
