"""Samples where a machine's vCPUs are, by kicking them out of the guest; the guest does nothing for it. Layer: debug.

A thread of its own posts a message to each running vCPU, at the rate asked for. The vCPU leaves the guest between two
instructions, reads its registers on its own thread, walks the stack by frame pointers and goes on. One sample a vCPU is
under way at a time, so that a slow host gets fewer samples instead of a queue of them.
"""

from __future__ import annotations

import threading
from time import monotonic
from typing import TYPE_CHECKING

from pykvm._native import lib
from pykvm.debug.profile.stacks import HALTED, WAITING, Profile
from pykvm.errors import ConfigError, GuestAddressError, PykvmError

if TYPE_CHECKING:
    from typing import Self

    from pykvm._native import CData
    from pykvm.core.machine import Machine
    from pykvm.core.vcpu import Vcpu
    from pykvm.debug.profile.stacks import Stack

MAX_RATE_HZ = 10_000
MAX_FRAMES = 64
PAGE_SIZE = 4096


class Profiler:
    """Samples from its making until `close` (or the machine's); usable as a context manager. `profile` has the result.

    Raises ConfigError.
    """

    def __init__(self, machine: Machine, rate_hz: float = 999.0) -> None:
        if not 0 < rate_hz <= MAX_RATE_HZ:
            raise ConfigError("rate", f"{rate_hz:g} samples a second are not between 0 and {MAX_RATE_HZ}")
        self.profile = Profile(rate_hz)
        self._machine = machine
        self._busy = [False] * len(machine.vcpus)
        self._lock = threading.Lock()  # guards the profile and _busy
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._main, name="pykvm-profile", daemon=True)
        machine.on_close.insert(0, self.close)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling. Idempotent."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _main(self) -> None:
        period = 1 / self.profile.rate_hz
        due = monotonic()
        while not self._ended.wait(max(0.0, due - monotonic())):
            due = max(due + period, monotonic())
            for vcpu in self._machine.vcpus:
                self._ask(vcpu)

    def _ask(self, vcpu: Vcpu) -> None:
        with self._lock:
            if self._busy[vcpu.index] or not vcpu.running:
                return
            self._busy[vcpu.index] = True
        vcpu.post(lambda: self._sample(vcpu))

    def _sample(self, vcpu: Vcpu) -> None:
        """On the vCPU's thread."""
        stack: Stack | None = None
        try:
            if vcpu.running:  # else it comes late: the vCPU had stopped before it looked into its mailbox
                stack = read_stack(self._machine, vcpu)
        except PykvmError:
            pass
        with self._lock:
            self._busy[vcpu.index] = False
            if stack is not None and not self._ended.is_set():
                self.profile.add(vcpu.index, stack)


def read_stack(machine: Machine, vcpu: Vcpu) -> Stack:
    """Linear addresses from the innermost frame outward; HALTED or WAITING for a vCPU that executes nothing."""
    if machine.config.irqchip != "none":
        state = vcpu.fd.get_mp_state()
        if state == lib.KVM_MP_STATE_HALTED:
            return HALTED
        if state != lib.KVM_MP_STATE_RUNNABLE:
            return WAITING
    regs, sregs = vcpu.fd.get_regs(), vcpu.fd.get_sregs()
    long_mode = bool(sregs.cs.l)
    base = 0 if long_mode else sregs.cs.base
    frames = [regs.rip + base]
    word = 8 if long_mode else 4 if sregs.cs.db else 0
    if word:
        frames += _callers(machine, vcpu, regs, word, 0 if long_mode else sregs.ss.base)
    return tuple(frames)


def _callers(machine: Machine, vcpu: Vcpu, regs: CData, word: int, base: int) -> list[int]:
    """Return addresses along the chain of frame pointers, which has to go upward."""
    found: list[int] = []
    pages: dict[int, int | None] = {}
    frame, below = regs.rbp & (1 << 8 * word) - 1, regs.rsp & (1 << 8 * word) - 1
    while len(found) < MAX_FRAMES and frame >= below and frame % word == 0:
        data = b"".join(_read_word(machine, vcpu, base + frame + at, word, pages) for at in (0, word))
        if len(data) != 2 * word:
            break
        above, back = int.from_bytes(data[:word], "little"), int.from_bytes(data[word:], "little")
        if not back:
            break
        found.append(back)
        if above <= frame:
            break
        below, frame = frame, above
    return found


def _read_word(machine: Machine, vcpu: Vcpu, linear: int, word: int, pages: dict[int, int | None]) -> bytes:
    page = linear & -PAGE_SIZE & (1 << 64) - 1
    if page not in pages:
        pages[page] = vcpu.fd.translate(page)
    gpa = pages[page]
    try:
        return b"" if gpa is None else bytes(machine.memory.read((gpa & -PAGE_SIZE) + linear % PAGE_SIZE, word))
    except GuestAddressError:
        return b""
