"""Tiny guests that measure a host: ring-0 speed, the cost of an exit, the life of a machine. Layer: control.

Each measurement runs finite guest code on the caller's thread or with a timeout. It takes the best of a few rounds,
because other work on the host only ever makes one slower, and repeats longer ones until fixed costs do not count: so
a host of any speed is measured in a fraction of a second. They need a usable /dev/kvm and raise what Machine raises;
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
    from collections.abc import Callable

    from pykvm.kvm.system import Kvm
    from pykvm.x86.segments import CpuState

CODE = 0x20000  # behind the boot-time page tables
MEMORY = "1M"
ROUNDS = 3
# KVM's emulator manages 3 million instructions a second, the slowest CPU (QEMU's TCG) hundreds of millions
NATIVE_THRESHOLD = 30e6  # instructions per second
TIMEOUT_S = 10.0

_LOOPS = (2_000, 4_000_000)  # repetitions: the first try, the most
_EXITS = (100, 6_400)
_LIVES = 20
_ROUND_S = 0.01  # a round that takes this long is long enough
_LIVES_S = 0.5
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
    return _loop_speed(kvm, b"\xb9", b"\xff\xc9\x75\xfc\xf4", real=False)


def real_mode_speed(kvm: Kvm) -> float:
    """Instructions per second of a loop in real mode, which VT-x without unrestricted guest interprets."""
    return _loop_speed(kvm, b"\x66\xb9", b"\x66\x49\x75\xfc\xf4", real=True)


def _loop_speed(kvm: Kvm, head: bytes, tail: bytes, *, real: bool) -> float:
    """Speed of `head` (which takes a 32-bit count), then two instructions `count` times, then HLT, in `tail`."""
    with Machine(kvm=kvm, memory=MEMORY, irqchip="none") as machine:
        machine.publish_actions()
        state = real_mode(CODE >> 4, 0) if real else long_mode(machine.memory, CODE)

        def time_of(count: int) -> float:
            machine.memory.write(CODE, head + count.to_bytes(4, "little") + tail)
            return _time_to_halt(machine, state)

        count, duration = _best_round(time_of, *_LOOPS)
        return 2 * count / duration


def _best_round(time_of: Callable[[int], float], count: int, most: int) -> tuple[int, float]:
    """(repetitions, seconds) of the best round, with as many repetitions as _ROUND_S wants."""
    while True:
        best = min(time_of(count) for _ in range(ROUNDS))
        if best >= _ROUND_S or count >= most:
            return count, best
        count = min(count * 8, most)


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

        def time_in_c(count: int) -> float:
            machine.memory.write(CODE, _port_loop(_PORT_C, count))
            return _time_to_halt(machine, state)

        def time_in_python(count: int) -> float:
            machine.memory.write(CODE, _port_loop(_PORT_PYTHON, count))
            return _time_on_thread(machine, state)

        count, in_c = _best_round(time_in_c, *_EXITS)
        # alternating: what else runs on the host meets both alike
        times = [(time_in_c(count), time_in_python(count)) for _ in range(ROUNDS)]
    in_c = min(in_c, *(each for each, _ in times))
    in_python = min(each for _, each in times)
    return in_c / count * 1e6, in_python / count * 1e6


def _time_on_thread(machine: Machine, state: CpuState) -> float:
    """Seconds of one run by the machine's own loop, which is what serves devices in Python."""
    machine.vcpus[0].load_state(state)
    start = perf_counter()
    outcome = machine.run(timeout=TIMEOUT_S)
    duration = perf_counter() - start
    if outcome.kind != "HALTED":
        raise MeasurementError(f"a guest that writes to a port and halts ended with {outcome.kind}")
    return duration


def _port_loop(port: int, count: int) -> bytes:
    # mov ecx, n; mov dx, port; 1: out dx, al; dec ecx; jnz 1b; hlt
    head = b"\xb9" + count.to_bytes(4, "little") + b"\x66\xba" + port.to_bytes(2, "little")
    return head + b"\xee\xff\xc9\x75\xfb\xf4"


def lifecycle_ms(kvm: Kvm) -> float:
    """Milliseconds to create a machine, run it to its HLT and close it: the median of what half a second allows."""
    times: list[float] = []
    while len(times) < _LIVES and sum(times) < _LIVES_S:
        start = perf_counter()
        _gives_up(kvm, b"")
        times.append(perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e3


def missing_instructions(kvm: Kvm) -> list[str]:
    """Which of RING_0_INSTRUCTIONS KVM gives up on (internal error) in 64-bit ring 0; a fault is an answer too."""
    return [name for name, code in RING_0_INSTRUCTIONS.items() if _gives_up(kvm, bytes.fromhex(code))]


def _gives_up(kvm: Kvm, code: bytes) -> bool:
    with Machine(kvm=kvm, memory=MEMORY, irqchip="none") as machine:
        machine.memory.write(CODE, code + b"\xf4")
        machine.vcpus[0].load_state(long_mode(machine.memory, CODE))
        machine.publish_actions()
        return machine.vcpus[0].run_once().reason == "INTERNAL_ERROR"
