"""How a run of the guest ended: data, never an exception. Layer: core, imports nothing of pykvm but errors."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from pykvm.debug.report import CrashReport

    OutcomeKind = Literal["HALTED", "POWER_OFF", "RESET", "DEBUG_EXIT", "TRIPLE_FAULT", "CRASH", "TIMEOUT", "STOPPED"]

KINDS = ("HALTED", "POWER_OFF", "RESET", "DEBUG_EXIT", "TRIPLE_FAULT", "CRASH", "TIMEOUT", "STOPPED")


class Outcome:
    """One ending. `kind` is one of KINDS; two outcomes are equal when kind and code are.

    kind          code            meaning
    HALTED        0               every vCPU halted and none can ever wake
    POWER_OFF     0               ACPI S5, or a system event of that type
    RESET         0               i8042, port 0xcf9, the ACPI reset register, port 0x92
    DEBUG_EXIT    byte or more    the guest wrote `code` to isa-debug-exit
    TRIPLE_FAULT  0               KVM_EXIT_SHUTDOWN; `report` says where
    CRASH         0               KVM gave up (`detail`), or pvpanic; `report` says where
    TIMEOUT       0               run(timeout) expired; the machine is paused and may run on
    STOPPED       0               stop() or a user's request
    """

    __slots__ = ("code", "detail", "kind", "report", "vcpu")

    HALTED: Outcome
    POWER_OFF: Outcome
    RESET: Outcome
    TIMEOUT: Outcome
    STOPPED: Outcome

    def __init__(
        self,
        kind: OutcomeKind,
        code: int = 0,
        *,
        vcpu: int | None = None,
        detail: str = "",
        report: CrashReport | None = None,
    ) -> None:
        self.kind: OutcomeKind = kind
        self.code = code
        self.vcpu = vcpu
        self.detail = detail
        self.report = report

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Outcome):
            return NotImplemented
        return self.kind == other.kind and self.code == other.code

    def __hash__(self) -> int:
        return hash((self.kind, self.code))

    def __repr__(self) -> str:
        code = f"({self.code:#x})" if self.kind == "DEBUG_EXIT" else ""
        return f"<Outcome {self.kind}{code}{': ' + self.detail if self.detail else ''}>"

    @property
    def exit_status(self) -> int:
        """The CLI's exit status: 0 for an orderly end, (code << 1) | 1 for debug-exit as QEMU, 6 crash, 124 timeout."""
        if self.kind == "DEBUG_EXIT":
            return ((self.code << 1) | 1) & 0xFF
        return {"TRIPLE_FAULT": 6, "CRASH": 6, "TIMEOUT": 124}.get(self.kind, 0)


Outcome.HALTED = Outcome("HALTED")
Outcome.POWER_OFF = Outcome("POWER_OFF")
Outcome.RESET = Outcome("RESET")
Outcome.TIMEOUT = Outcome("TIMEOUT")
Outcome.STOPPED = Outcome("STOPPED")
