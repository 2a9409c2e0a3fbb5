"""Writes a machine's exits to a file while it runs: `pykvm start --trace`. Layer: debug.

Each vCPU has a ring of its own that C fills (native/trace.c); the I/O thread drains the rings to the file, woken when
one is half full and else by a timer. A vCPU never waits for the file: what does not fit is counted as lost.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from pykvm import log
from pykvm._native import ffi, lib
from pykvm.debug.trace.tracefile import pack_end, pack_header
from pykvm.errors import UsageError

if TYPE_CHECKING:
    from pykvm._native import CData
    from pykvm.core.machine import Machine
    from pykvm.kvm.vm import VmFd

RING_RECORDS = 1 << 15  # 2 MiB for each vCPU: a third of a second of 100,000 exits a second
DRAIN_S = 0.1


class ExitTrace:
    """A trace being written. `written` and `lost` count records; `close`, or the machine's, completes the file.

    Raises UsageError when the file cannot be made.
    """

    def __init__(self, machine: Machine, path: str, *, ring_records: int = RING_RECORDS) -> None:
        self.path = path
        self.failure: OSError | None = None  # why the file ends early
        self._machine = machine
        self._lock = threading.Lock()  # one drainer at a time
        self._closed = False
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(f"--trace: {path}: {error.strerror}") from None
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._rings: list[CData] = []
        try:
            for vcpu in machine.vcpus:
                ring = lib.pk_trace_new(ring_records, vcpu.index, self._eventfd)
                if ring == ffi.NULL:
                    raise MemoryError("trace ring")
                self._rings.append(ffi.gc(ring, lib.pk_trace_free))
            self._write(pack_header(len(self._rings), time.monotonic_ns(), time.time_ns(), _meta(machine)))
        except BaseException as error:
            os.close(self._fd)
            os.close(self._eventfd)
            if isinstance(error, OSError):
                raise UsageError(f"--trace: {path}: {error.strerror}") from None
            raise
        machine.on_connect.append(self._use)
        machine.on_close.append(self.close)
        self._use(machine.vm)
        machine.io.add_reader(self._eventfd, self._on_half_full)
        self._timer = machine.io.call_later(DRAIN_S, self._on_timer)

    def _use(self, vm: VmFd) -> None:
        """Trace the vCPUs of a new KVM VM."""
        if self._closed:
            return
        rip = vm.check_extension(lib.KVM_CAP_SYNC_REGS) & lib.KVM_SYNC_X86_REGS
        for vcpu, ring in zip(self._machine.vcpus, self._rings, strict=True):
            lib.pk_trace_use(vcpu.state, ring, rip)

    @property
    def written(self) -> int:
        """Exits in the file so far."""
        return sum(ring.written for ring in self._rings)

    @property
    def lost(self) -> int:
        """Exits that did not fit into their ring."""
        return sum(ring.lost for ring in self._rings)

    # -- draining -----------------------------------------------------------------------------------------------

    def _on_half_full(self) -> None:
        try:
            os.eventfd_read(self._eventfd)
        except BlockingIOError:
            pass
        self.drain()

    def _on_timer(self) -> None:
        self.drain()
        with self._lock:
            if not self._closed:
                self._timer = self._machine.io.call_later(DRAIN_S, self._on_timer)

    def drain(self) -> None:
        """Write what is in the rings. From any thread."""
        with self._lock:
            if not self._closed:
                self._drain()

    def _drain(self) -> None:
        for ring in self._rings:
            result = 0 if self.failure is not None else lib.pk_trace_drain(ring, self._fd)
            if result < 0:
                self._fail(OSError(-result, os.strerror(-result)))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def _fail(self, error: OSError) -> None:
        """A full disk ends the trace, not the guest."""
        self.failure = error
        log.warning("the exit trace ends here", path=self.path, reason=error.strerror)

    def close(self) -> None:
        """Complete the file; the machine has to be paused. Idempotent."""
        if self._closed:
            return
        self._timer.cancel()
        self._machine.io.remove_reader(self._eventfd)
        with self._lock:
            self._closed = True
            for vcpu, ring in zip(self._machine.vcpus, self._rings, strict=True):
                if vcpu.state.run != ffi.NULL:
                    lib.pk_trace_use(vcpu.state, ffi.NULL, 0)
                lib.pk_trace_finish(ring)
            self._drain()
            if self.failure is None:
                try:
                    self._write(pack_end(self.written, self.lost, time.monotonic_ns()))
                except OSError as error:
                    self._fail(error)
            os.close(self._fd)
            os.close(self._eventfd)

    def text(self) -> str:
        """What came of it, for people."""
        told = f"{self.written} exits in {self.path}"
        if self.lost:
            told += f", {self.lost} lost: they came faster than the file takes them"
        return f"{told}; cut short: {self.failure.strerror}" if self.failure is not None else told


def _meta(machine: Machine) -> dict[str, object]:
    boot = getattr(machine, "boot_config", None)
    regions = [
        [space.name, region.base, region.end - region.base, region.name]
        for space in (machine.bus.ports, machine.bus.mmio)
        for region in space.regions
    ]
    return {
        "pid": os.getpid(),
        "kernel": boot.kernel if boot is not None else None,
        "cmdline": boot.cmdline if boot is not None else None,
        "memory": machine.config.memory,
        "regions": regions,
    }
