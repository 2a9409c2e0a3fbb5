"""The machine's methods for tests: run until something happens, call a guest function. Layer: core.

All of it is in `pykvm.testing`, loaded when used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.machine import Machine
    from pykvm.core.registers import Registers
    from pykvm.core.vcpu import Vcpu
    from pykvm.debug.linear import LinearMemory
    from pykvm.testing.callframe import Argument
    from pykvm.testing.talk import Pattern
    from pykvm.testing.until import Reached


class Driving:
    """Mixed into Machine."""

    vcpus: list[Vcpu]

    @property
    def regs(self) -> Registers:
        """General registers, rip and rflags of vCPU 0: readable and writable while paused."""
        return self.vcpus[0].regs

    @property
    def linear(self) -> LinearMemory:
        """Memory by linear address or symbol, through the page tables that vCPU 0 uses now; while paused."""
        from pykvm.debug.linear import LinearMemory

        machine: Machine = self  # type: ignore[assignment]
        return LinearMemory(
            machine.memory,
            self.vcpus[0].capture_state,
            lambda where: where if isinstance(where, int) else machine.symbols.resolve(where),
        )

    def run_until(
        self,
        *,
        console: Pattern | None = None,
        rip: int | str | None = None,
        port_write: int | tuple[int, int] | None = None,
        timeout: float | None = 10.0,
    ) -> Reached:
        """Run the guest until the first of these, and leave it paused there.

        console     it has printed what matches this regular expression (as Console.expect; it may run a little past it)
        rip         a vCPU is about to execute this address or symbol
        port_write  it has written to this port, or (port, value) this value to it; the device had it

        Raises ExpectError when the guest ends first or `timeout` seconds of guest-run time pass, SymbolError,
        DebugUnsupported (rip, on hosts that cannot), DeviceError.
        """
        from pykvm.testing.until import run_until

        return run_until(self, console, rip, port_write, timeout)  # type: ignore[arg-type]

    def call(
        self,
        function: int | str,
        *arguments: Argument,
        returns: str | None = None,
        stack: int | None = None,
        timeout: float | None = 10.0,
    ) -> int:
        """Call a function of the guest on vCPU 0, in its current mode, and return its result.

        function   linear address or symbol; System V convention (64-bit: AMD64 psABI, 32-bit: i386 psABI)
        arguments  ints; bytes and str (UTF-8 and a NUL) are copied to the stack and passed by pointer, and so are
                   bytearrays, which get back what the function left there
        returns    u8 to u64, i8 to i64, bool, void: what the C function returns; otherwise an unsigned machine word
        stack      linear address to push down from; otherwise below what the guest's own stack uses

        The machine has to be paused in ring 0 with a usable stack. All vCPUs run meanwhile, interrupts as they are;
        afterwards vCPU 0 has its registers back. Raises CallError when the guest ends (crashes) inside of the
        function, or when it has not returned after `timeout` seconds of guest-run time.
        """
        from pykvm.testing.call import call

        return call(self, function, arguments, returns, stack, timeout)  # type: ignore[arg-type]
