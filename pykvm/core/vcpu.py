"""One virtual CPU: its thread, its mailbox, its way through an exit. Layer: core.

A vCPU is paused or running. Other threads only post messages and kick; the vCPU's own thread looks into its mailbox
whenever KVM_RUN returns EINTR, so no message waits for the guest to do something. `run_once` drives a paused vCPU from
the caller's thread instead.
"""

from __future__ import annotations

import errno
import threading
from _queue import SimpleQueue  # what `queue` re-exports, without heapq and the rest of it

from pykvm._native import ffi, lib
from pykvm.core.exits import (
    KEY_COALESCED,
    KEY_STRING,
    KEY_WRITE,
    PORT_SHIFT,
    SIZE_SHIFT,
    TABLE,
    drain_coalesced,
    on_fatal,
)
from pykvm.core.outcome import Outcome
from pykvm.core.registers import Registers, state_from_kvm, state_to_kvm
from pykvm.errors import DeviceError, KvmError, MachineStateError, PykvmError
from pykvm.kvm.handle import ADVICE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pykvm._native import CData
    from pykvm.core.bus import Bus
    from pykvm.core.console import Console
    from pykvm.core.exits import Hooks
    from pykvm.core.iothread import IoThread
    from pykvm.core.memory import GuestMemory
    from pykvm.kvm.vcpu import VcpuFd
    from pykvm.x86.segments import CpuState

    class Owner(Protocol):
        """What a vCPU needs of its machine."""

        bus: Bus
        console: Console
        hooks: Hooks
        io: IoThread
        coalesced_lock: threading.Lock
        memory: GuestMemory

        def step_vcpu(self, vcpu: Vcpu) -> Outcome | None: ...
        def vcpu_stopped(self, vcpu: Vcpu, outcome: Outcome | None, error: BaseException | None) -> None: ...


KICK_SIGNAL_OFFSET = 3  # SIGRTMIN + 3: the first ones belong to the C library and to debuggers by habit
LOST_PAGE = (errno.EFAULT, lib.EHWPOISON)  # of KVM_RUN: memory that is not there
MASKS = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF, 8: 0xFFFFFFFFFFFFFFFF}

_RUN, _PAUSE, _EXIT = "run", "pause", "exit"


class Exit:
    """What `run_once` saw. `reason` is the KVM_EXIT_ name; the other fields are None where they mean nothing."""

    __slots__ = ("address", "outcome", "port", "reason", "size", "value", "write")

    def __init__(self, reason: str, outcome: Outcome | None) -> None:
        self.reason = reason
        self.outcome = outcome
        self.port: int | None = None
        self.address: int | None = None
        self.size: int | None = None
        self.write: bool | None = None
        self.value: int | None = None

    def __repr__(self) -> str:
        at = f" port {self.port:#x}" if self.port is not None else ""
        at += f" address {self.address:#x}" if self.address is not None else ""
        return f"<Exit {self.reason}{at}{f' {self.outcome}' if self.outcome else ''}>"


class Vcpu:
    """A vCPU of a machine. `running` is guarded by the owner's condition."""

    def __init__(self, index: int, owner: Owner) -> None:
        self.index = index
        self.owner = owner
        self.bus = owner.bus
        self.hooks = owner.hooks
        self.coalesced_lock = owner.coalesced_lock
        self.running = False
        self.stopped_at: float | None = None  # monotonic time at which it last left the guest; guarded likewise
        self.before_run: Callable[[Vcpu], Outcome | None] | None = None  # called once, on the way into the guest
        self.traced: Callable[[Vcpu], Outcome | None] | None = None  # runs the guest instead of `_run_guest`
        self.state: CData = ffi.new("struct pk_vcpu *")
        self._fd: VcpuFd | None = None
        self.cpuid: CData = ffi.NULL  # the struct kvm_cpuid2 that it was given
        self._mailbox: SimpleQueue[str | Callable[[], object]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._leave = False

    def connect(self, fd: VcpuFd, run_size: int, coalesced_offset: int) -> None:
        """Use this KVM vCPU from now on (another one after a reset)."""
        if lib.pk_kick_init(KICK_SIGNAL_OFFSET) < 0:
            raise MachineStateError(f"signal SIGRTMIN+{KICK_SIGNAL_OFFSET} cannot be used for kicks")
        result = lib.pk_vcpu_init(self.state, fd.fd, run_size, coalesced_offset)
        if result < 0:
            raise KvmError("mmap of kvm_run", -result)
        self._fd = fd

    def disconnect(self) -> list[int]:
        """Forget the KVM vCPU; its file descriptor is the caller's to close."""
        fd, self._fd = self._fd, None
        lib.pk_vcpu_deinit(self.state)
        if fd is None or fd.fd < 0:
            return []
        number, fd.fd = fd.fd, -1
        return [number]

    # -- state --------------------------------------------------------------------------------------------------

    @property
    def fd(self) -> VcpuFd:
        """The KVM file descriptor, for ioctls that have no name here."""
        if self._fd is None:
            raise MachineStateError(f"vCPU {self.index}: the machine is closed")
        return self._fd

    def _paused_fd(self) -> VcpuFd:
        if self.running and threading.current_thread() is not self._thread:
            raise MachineStateError(f"vCPU {self.index} is running: pause() the machine first")
        return self.fd

    @property
    def regs(self) -> Registers:
        """General registers, rip and rflags: readable and writable while paused."""
        fd = self._paused_fd()
        return Registers(fd.get_regs(), fd.set_regs)

    @property
    def sregs(self) -> CData:
        """A copy of struct kvm_sregs (segments, control registers); store changes with `set_sregs`."""
        return self._paused_fd().get_sregs()

    def set_sregs(self, sregs: CData) -> None:
        """Store what `sregs` gave, changed."""
        self._paused_fd().set_sregs(sregs)

    def load_state(self, state: CpuState) -> None:
        """Set general, segment and control registers as a boot protocol wants them."""
        fd = self._paused_fd()
        regs, sregs = ffi.new("struct kvm_regs *"), fd.get_sregs()
        state_to_kvm(state, regs, sregs)
        fd.set_sregs(sregs)
        fd.set_regs(regs)

    def capture_state(self) -> CpuState:
        """General, segment and control registers as plain data."""
        fd = self._paused_fd()
        return state_from_kvm(fd.get_regs(), fd.get_sregs())

    def forgive_pause(self) -> None:
        """Tell a guest with kvmclock that it was stopped, so that its watchdogs forgive (KVM_KVMCLOCK_CTRL, 4.69)."""
        try:
            self.fd.kvmclock_ctrl()
        except KvmError:
            pass  # EINVAL: the guest has no kvmclock

    def exit_counts(self) -> dict[int, int]:
        """Exits by reason (number), those that C answered included."""
        counts = self.state.exits
        return {reason: counts[reason] for reason in range(lib.PK_EXIT_REASONS) if counts[reason]}

    # -- from other threads -------------------------------------------------------------------------------------

    def post(self, message: str | Callable[[], object]) -> None:
        """Put a message into the mailbox and make the vCPU look."""
        self._mailbox.put(message)
        if self._fd is not None:
            lib.pk_kick(self.state)

    def call(self, function: Callable[[], object], timeout_s: float) -> None:
        """Run `function` on the vCPU's thread, where its ioctls belong, and wait for that; at once if it has none.

        Raises what `function` raises, MachineStateError when the thread does not come to it in time.
        """
        if self._thread is None or self.on_own_thread():
            function()
            return
        errors: list[BaseException] = []
        done = threading.Event()

        def run() -> None:
            try:
                function()
            except BaseException as error:
                errors.append(error)
            done.set()

        self.post(run)
        if not done.wait(timeout_s):
            raise MachineStateError(f"vCPU {self.index} does not answer: a device's code hangs")
        if errors:
            raise errors[0]

    def resume(self) -> None:
        """Let the vCPU's thread run the guest. The caller has set `running`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name=f"pykvm-vcpu{self.index}", daemon=True)
            self._thread.start()
        self._mailbox.put(_RUN)

    def pause(self) -> None:
        """Ask for a pause; the owner hears of it by vcpu_stopped."""
        self.post(_PAUSE)

    def end_thread(self, timeout_s: float) -> bool:
        """Ask the thread to end, and wait for it; whether it did."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            self._mailbox.put(_EXIT)
            return True
        self.post(_EXIT)
        thread.join(timeout_s)
        if thread.is_alive():
            return False
        self._thread = None
        return True

    @property
    def thread_id(self) -> int | None:
        """The kernel's id of its thread, None before the first run."""
        return self._thread.native_id if self._thread is not None else None

    def on_own_thread(self) -> bool:
        """Whether the caller is this vCPU's thread (a device or hook)."""
        return threading.current_thread() is self._thread

    # -- the vCPU's thread --------------------------------------------------------------------------------------

    def _main(self) -> None:
        lib.pk_thread_init()
        while not self._leave:
            message = self._mailbox.get()
            if message is _RUN:
                self._run_until_told()
            else:
                try:
                    self._obey(message)
                except MachineStateError:
                    pass  # it was about a KVM vCPU that a reset or close has taken away meanwhile

    def _obey(self, message: str | Callable[[], object]) -> bool:
        """Act on a message; whether it asks to stop running."""
        if message is _EXIT:
            self._leave = True
        elif callable(message):
            message()
            return False
        return message is not _RUN

    def _run_until_told(self) -> None:
        outcome: Outcome | None = None
        error: BaseException | None = None
        try:
            outcome = self._prepare()
            while outcome is None:
                outcome = self._run_guest() if self.traced is None else self.traced(self)
                if outcome is None and self._told_to_stop():
                    break
            outcome = self._settled(outcome)
        except PykvmError as problem:
            error = problem
        except BaseException as problem:
            error = DeviceError(self._last_target(), "an access by the guest")
            error.__cause__ = problem
        self.owner.vcpu_stopped(self, outcome, error)

    def _prepare(self) -> Outcome | None:
        before, self.before_run = self.before_run, None
        return None if before is None else before(self)

    def called_away(self) -> bool:
        """On the vCPU's thread, after EINTR: obey the mailbox; whether it asks to leave the guest.

        That message is put back: whoever has called this returns None to the run loop, which obeys it.
        """
        if not self._told_to_stop():
            return False
        self.post(_PAUSE)
        return True

    def _told_to_stop(self) -> bool:
        stop = False
        while not stop and not self._mailbox.empty():
            stop = self._obey(self._mailbox.get())
        return stop

    def _run_guest(self) -> Outcome | None:
        """Run until the guest ends (its Outcome) or somebody kicks (None). The hot path of every exit."""
        state, run, routes = self.state, lib.pk_run, self.bus.routes
        while True:
            key = run(state)
            route = routes.get(key)
            if route is None:
                if key == -errno.EINTR:
                    return None
                outcome = self.dispatch(key)
            else:
                function, offset, size, write = route
                if write:
                    outcome = function(offset, size, state.value)  # type: ignore[operator]
                else:
                    state.value = function(offset, size) & MASKS[size]  # type: ignore[operator]
                    continue
            if outcome is not None:
                return outcome

    def dispatch(self, key: int) -> Outcome | None:
        """Handle the exit that pk_run has just returned as `key`."""
        if key < 0:
            self.fd.check_owner()  # in a forked child KVM_RUN fails with EIO
            damage = self.owner.memory.damage() if -key in LOST_PAGE else ""
            if damage:
                return Outcome("CRASH", vcpu=self.index, detail=damage)
            raise KvmError("KVM_RUN", -key, ADVICE.get(("KVM_RUN", -key), ""))
        if key == KEY_COALESCED:
            return drain_coalesced(self)
        return TABLE.get(key & 0xFF, on_fatal)(self, key)

    def _last_target(self) -> str:
        run = self.state.run
        if run.exit_reason == lib.KVM_EXIT_IO:
            return self.bus.ports.describe(run.io.port)
        if run.exit_reason == lib.KVM_EXIT_MMIO:
            return self.bus.mmio.describe(run.mmio.phys_addr)
        return "hook"

    # -- without threads ----------------------------------------------------------------------------------------

    def run_once(self) -> Exit:
        """Run the guest on the caller's thread up to the next exit that C does not answer, and handle it.

        The exit's access is completed, so the registers are those after the instruction. Signals and kicks end it
        with reason INTR. Raises MachineStateError while the vCPU's thread runs it.
        """
        self._paused_fd()
        if self.before_run is not None and (outcome := self._prepare()) is not None:
            return Exit("DEBUG", self._settled(outcome))
        key = lib.pk_run(self.state)
        if not self.owner.io.started:
            self.owner.console.flush()
        if key == -errno.EINTR:
            return Exit("INTR", None)
        if key == KEY_COALESCED:
            return Exit("COALESCED", drain_coalesced(self))
        result = self.describe(key)
        result.outcome = self.dispatch(key)
        if result.write is False:
            result.value = None if key & KEY_STRING else self.state.value
        result.outcome = self._settled(result.outcome)
        return result

    def describe(self, key: int) -> Exit:
        """The exit that pk_run has just returned as `key`, before it is handled: what a read gives is not known yet."""
        from pykvm.kvm.exits import reason_name

        if key == KEY_COALESCED:
            return Exit("COALESCED", None)
        result = Exit(reason_name(key & 0xFF) if key >= 0 else "ERROR", None)
        if key & 0xFF in (lib.KVM_EXIT_IO, lib.KVM_EXIT_MMIO):
            result.size, result.write = key >> SIZE_SHIFT & 0x7F, bool(key & KEY_WRITE)
            result.value = None if key & KEY_STRING else self.state.value
            if key & 0xFF == lib.KVM_EXIT_IO:
                result.port = key >> PORT_SHIFT & 0xFFFF
            else:
                result.address = self.state.address
        return result

    def step(self) -> Outcome | None:
        """Execute one instruction of a paused vCPU, its exits handled; what an Outcome ended, or None.

        No interrupt is delivered meanwhile where KVM can hold them back. Raises DebugUnsupported where this host's
        KVM cannot step (kvm_pvm in ring 3), MachineStateError while the vCPU runs.
        """
        self._paused_fd()
        return self.owner.step_vcpu(self)

    def _settled(self, outcome: Outcome | None) -> Outcome | None:
        """`outcome`, after completing the access that gave it. After a crash kvm_run still has to say why: leave it."""
        if outcome is not None and outcome.kind in ("CRASH", "TRIPLE_FAULT"):
            return outcome
        following = self.settle()
        return outcome or following

    def settle(self) -> Outcome | None:
        """Complete a pending access without running the guest, so that the registers are those after the instruction.

        An access that KVM hands over in parts (MMIO wider than 8 bytes or across a page) is handled to its end.
        """
        while (key := lib.pk_settle(self.state)) != -errno.EINTR:
            outcome = self.dispatch(key)
            if outcome is not None:
                return outcome
        return None
