"""The machine's methods that look inside the guest. Layer: core; all of it is in `pykvm.debug`, loaded when used."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from pykvm.core.outcome import Outcome
    from pykvm.core.vcpu import Vcpu
    from pykvm.debug.backtrace import Frame
    from pykvm.debug.breakpoints import Breakpoint, Debugger, OnHit
    from pykvm.debug.coverage import Coverage
    from pykvm.debug.gdbstub.server import GdbServer
    from pykvm.debug.profile.sampler import Profiler
    from pykvm.debug.pytrace import OnEvent, Trace
    from pykvm.debug.symbols import Symbols
    from pykvm.debug.trace.exittrace import ExitTrace
    from pykvm.debug.traps import Traps


class Debugging:
    """Mixed into Machine."""

    _debugger: Debugger | None = None
    _symbols: Symbols | None = None
    _gdb: GdbServer | None = None

    def planted_traps(self) -> Traps | None:
        """The software breakpoints in guest memory, if there are any."""
        return self._debugger.traps if self._debugger is not None else None

    @property
    def symbols(self) -> Symbols:
        """Names of the guest's addresses: those of the kernel's ELF file, or what was assigned."""
        if self._symbols is None:
            from pykvm.debug.bootsymbols import boot_symbols

            self._symbols = boot_symbols(getattr(self, "boot_config", None))
        return self._symbols

    @symbols.setter
    def symbols(self, symbols: Symbols) -> None:
        self._symbols = symbols

    def share_symbols(self, other: Debugging) -> None:
        """Use the symbols that `other`, which boots the same, has read already, if it has."""
        self._symbols = other._symbols or self._symbols

    @property
    def debugger(self) -> Debugger:
        """What breakpoints, watchpoints and single steps share; made when first used."""
        if self._debugger is None:
            from pykvm.debug.breakpoints import Debugger

            self._debugger = Debugger(self)  # type: ignore[arg-type]
        return self._debugger

    def breakpoint(
        self,
        where: int | str,
        on_hit: OnHit | None = None,
        *,
        hardware: bool | None = None,
        once: bool = False,
    ) -> Breakpoint:
        """Call `on_hit(vcpu, breakpoint)` on the vCPU's thread whenever a vCPU is about to execute `where`.

        `where` is a linear address or the name of a symbol. The guest goes on after the call unless it returns an
        Outcome, which ends the run; without `on_hit` a hit ends it with STOPPED. `start` then goes on after it.

        Software breakpoints (any number) replace the instruction in guest memory: `where` has to be mapped by vCPU
        0's page tables now, and nothing may overwrite it. Hardware ones (four) are free of both. `hardware` None takes
        a software one where the address is mapped, else a hardware one. `once` removes it at the first hit.

        Raises SymbolError, ConfigError, and DebugUnsupported where this host's KVM lacks the kind.
        """
        return self.debugger.add_breakpoint(where, on_hit, hardware=hardware, once=once)

    def watchpoint(
        self,
        where: int | str,
        on_hit: OnHit | None = None,
        *,
        length: int = 1,
        write_only: bool = True,
    ) -> Breakpoint:
        """Call `on_hit(vcpu, breakpoint)` after an instruction that wrote to (or, not `write_only`, accessed) memory.

        `where` is a linear address or a symbol's name, aligned to `length`: 1, 2, 4 or 8 bytes. It takes one of the
        four hardware slots. Otherwise as `breakpoint`.
        """
        return self.debugger.add_watchpoint(where, on_hit, length=length, write_only=write_only)

    def trace(
        self,
        on_event: OnEvent | None = None,
        *,
        exits: bool | Iterable[str] = True,
        memory: range | Iterable[range] = (),
    ) -> Trace:
        """Call `on_event(vcpu, exit)` for every exit, once it was handled, and for every access to some memory.

        `exits` may name the reasons of interest ("IO", "MMIO", "HLT", ...), or be False. `memory` are ranges of guest
        physical addresses in RAM; an access there is an Exit with reason MEMORY. It must not be code or page tables.
        Without a callback the result's `events` collects. Use it in a `with` statement, or `stop()` it.
        """
        from pykvm.debug.pytrace import Trace

        ranges = [memory] if isinstance(memory, range) else list(memory)
        return Trace(self, on_event, exits, ranges)  # type: ignore[arg-type]

    def coverage(
        self,
        elf: str | os.PathLike[str] | None = None,
        *,
        functions: Iterable[str] | None = None,
        bits: int | None = None,
    ) -> Coverage:
        """Note from now on which basic blocks of the kernel's functions are executed, each at its first time.

        `elf` has the functions, with types and sizes, and was loaded where it says (None: the kernel that is booted);
        `functions` names some (None: all of them). `bits` is the width of the code (None: what the file is for).
        Raises ImageError, SymbolError, ConfigError.
        """
        from pykvm.debug.coverage import Coverage
        from pykvm.errors import ConfigError

        if elf is None:
            elf = getattr(getattr(self, "boot_config", None), "kernel", None)
        if elf is None:
            raise ConfigError("coverage", "name the ELF file that has the guest's functions")
        return Coverage(self.debugger, elf, functions, bits)

    def backtrace(self, vcpu: int = 0) -> list[Frame]:
        """The stack of a paused vCPU by its frame pointers, innermost frame first, with symbols and source lines."""
        from pykvm.debug.backtrace import backtrace

        return backtrace(self, self.vcpus[vcpu])  # type: ignore[arg-type,attr-defined]

    def gdb_server(self, where: str = "127.0.0.1:0", *, wait: bool = False, arch: str = "auto") -> GdbServer:
        """Serve gdb at `where`: [HOST:]PORT (0: a free one) or unix:PATH. `address` of the result is for gdb.

        The guest stops when a gdb connects; with `wait` it runs no instruction before one has come and gone on.
        `arch` 16, 32 or 64 is the kind of CPU that gdb is told of; auto goes by the guest's mode at that moment.
        Raises ConfigError.
        """
        from pykvm.debug.gdbstub.server import GdbServer
        from pykvm.errors import ConfigError

        if self._gdb is not None and not self._gdb.closed:
            raise ConfigError("gdb", f"this machine has a gdb server already, at {self._gdb.address}")
        self._gdb = GdbServer(self, where, arch=arch)  # type: ignore[arg-type]
        if wait:
            self.hold()  # type: ignore[attr-defined]
        return self._gdb

    def trace_exits(self, path: str) -> ExitTrace:
        """Write every exit to the file `path` from now on, until its `close` or the machine's; while paused.

        `pykvm.debug.trace.tracefile` documents the file and reads it. Raises UsageError where it cannot be made.
        """
        from pykvm.debug.trace.exittrace import ExitTrace

        return ExitTrace(self, path)  # type: ignore[arg-type]

    def profile(self, rate_hz: float = 999.0) -> Profiler:
        """Sample where the vCPUs are, `rate_hz` times a second, until the profiler's `close` or the machine's."""
        from pykvm.debug.profile.sampler import Profiler

        return Profiler(self, rate_hz)  # type: ignore[arg-type]

    def step_vcpu(self, vcpu: Vcpu) -> Outcome | None:
        """`Vcpu.step`."""
        return self.debugger.step(vcpu)
