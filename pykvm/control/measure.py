"""Tiny guests that measure a host: ring-0 speed, the cost of an exit, the life of a machine. Layer: control.

Each measurement runs finite guest code on the caller's thread or with a timeout, and takes the best of a few rounds,
because other work on the host only ever makes it slower. They need a usable /dev/kvm and raise what Machine raises;
MeasurementError says that the guest did not do what its code says.
"""

from __future__ import annotations

from time import perf_counter

from pykvm.core.device import Device
from pykvm.core.machine import Machine
from pykvm.errors import HostError
from pykvm.x86.states import long_mode, real_mode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.kvm.system import Kvm
    from pykvm.x86.segments import CpuState

CODE = 0x20000  # behind the boot-time page tables
MEMORY = "1M"
ROUNDS = 3
# KVM's emulator manages 3 million instructions a second, the slowest CPU (QEMU's TCG) hundreds of millions
NATIVE_THRESHOLD = 30e6  # instructions per second
TIMEOUT_S = 10.0

_LOOPS = 20_000
_EXITS = 4_000
_LIVES = 20
_PORT_C, _PORT_PYTHON = 0x80, 0x81

# Instructions that every current kernel uses in ring 0 and an interpreter may lack. Memory operands are at [rsp].
RING_0_INSTRUCTIONS = {
    "popcnt": "f30fb8c0", "int3": "cc", "fwait": "9b", "ud2": "0f0b", "stac": "0f01cb", "xgetbv": "0f01d0",
    "cmpxchg16b": "480fc70c24", "movbe": "0f38f00424", "invpcid": "660f38820424", "xsave": "0fae2424",
}  # fmt: skip


class MeasurementError(HostError):
    """The measuring guest ended otherwise than its code says."""


class _Sink(Device):
    """Takes writes and does nothing: what is measured is the way to it."""

    name = "sink"


def ring0_speed(kvm: Kvm) -> float:
    """Instructions per second of a ring-0 loop in 64-bit mode."""
    # mov ecx, n; 1: dec ecx; jnz 1b; hlt
    code = b"\xb9" + _LOOPS.to_bytes(4, "little") + b"\xff\xc9\x75\xfc\xf4"
    return _loop_speed(kvm, code, real=False)


def real_mode_speed(kvm: Kvm) -> float:
    """Instructions per second of a loop in real mode, which VT-x without unrestricted guest interprets."""
    code = b"\x66\xb9" + _LOOPS.to_bytes(4, "little") + b"\x66\x49\x75\xfc\xf4"
    return _loop_speed(kvm, code, real=True)


def _loop_speed(kvm: Kvm, code: bytes, *, real: bool) -> float:
    with Machine(kvm=kvm, memory=MEMORY, irqchip="none") as machine:
        machine.memory.write(CODE, code)
        state = real_mode(CODE >> 4, 0) if real else long_mode(machine.memory, CODE)
        return 2 * _LOOPS / _best_time(machine, state)


def _best_time(machine: Machine, state: CpuState) -> float:
    machine.publish_actions()
    return min(_time_to_halt(machine, state) for _ in range(ROUNDS))


def _time_to_halt(machine: Machine, state: CpuState) -> float:
    """Seconds of one run, on this thread, of a guest of which only the HLT needs Python."""
    machine.vcpus[0].load_state(state)
    start = perf_counter()
    end = machine.vcpus[0].run_once()
    duration = perf_counter() - start
    if end.reason != "HLT":
        raise MeasurementError(f"a guest that only computes and halts ended with {end.reason}")
    return duration


def exit_costs_us(kvm: Kvm) -> tuple[float, float]:
    """Microseconds from one port write to the next: answered by C (the action table), and by a Python device."""
    with Machine(kvm=kvm, memory=MEMORY, irqchip="none") as machine:
        machine.actions.count(range(_PORT_C, _PORT_C + 1))
        machine.attach(_Sink(), ports=range(_PORT_PYTHON, _PORT_PYTHON + 1))
        machine.publish_actions()
        state = long_mode(machine.memory, CODE)
        in_c, in_python = [], []
        for _ in range(ROUNDS):  # alternating: what else runs on the host meets both alike
            machine.memory.write(CODE, _port_loop(_PORT_C))
            in_c.append(_time_to_halt(machine, state))
            machine.memory.write(CODE, _port_loop(_PORT_PYTHON))
            in_python.append(_time_on_thread(machine, state))
    return min(in_c) / _EXITS * 1e6, min(in_python) / _EXITS * 1e6


def _time_on_thread(machine: Machine, state: CpuState) -> float:
    """Seconds of one run by the machine's own loop, which is what serves devices in Python."""
    machine.vcpus[0].load_state(state)
    start = perf_counter()
    outcome = machine.run(timeout=TIMEOUT_S)
    duration = perf_counter() - start
    if outcome.kind != "HALTED":
        raise MeasurementError(f"a guest that writes to a port and halts ended with {outcome.kind}")
    return duration


def _port_loop(port: int) -> bytes:
    # mov ecx, n; mov dx, port; 1: out dx, al; dec ecx; jnz 1b; hlt
    head = b"\xb9" + _EXITS.to_bytes(4, "little") + b"\x66\xba" + port.to_bytes(2, "little")
    return head + b"\xee\xff\xc9\x75\xfb\xf4"


def lifecycle_ms(kvm: Kvm) -> float:
    """Milliseconds to create a machine, run it to its HLT and close it: the median."""
    times = []
    for _ in range(_LIVES):
        start = perf_counter()
        with Machine(kvm=kvm, memory=MEMORY, irqchip="none") as machine:
            machine.memory.write(CODE, b"\xf4")
            machine.vcpus[0].load_state(real_mode(CODE >> 4, 0))
            machine.publish_actions()
            machine.vcpus[0].run_once()
        times.append(perf_counter() - start)
    return sorted(times)[_LIVES // 2] * 1e3


def missing_instructions(kvm: Kvm) -> list[str]:
    """Which of RING_0_INSTRUCTIONS KVM gives up on (internal error) in 64-bit ring 0; a fault is an answer too."""
    return [name for name, code in RING_0_INSTRUCTIONS.items() if _gives_up(kvm, bytes.fromhex(code))]


def _gives_up(kvm: Kvm, code: bytes) -> bool:
    with Machine(kvm=kvm, memory=MEMORY, irqchip="none") as machine:
        machine.memory.write(CODE, code + b"\xf4")
        machine.vcpus[0].load_state(long_mode(machine.memory, CODE))
        machine.publish_actions()
        return machine.vcpus[0].run_once().reason == "INTERNAL_ERROR"
