"""No kick is ever lost, however it races with the guest's exits."""

from __future__ import annotations

import os
import random
import threading

from realmode import SPIN, machine, out_al

from pykvm import Device
from pykvm._native import lib

KICKS = 100_000 if os.environ.get("PYKVM_LAB") != "1" else 4_000  # an emulated CPU is twenty times slower
STALL_S = 20.0  # far beyond any scheduling delay: a kick that takes this long was lost


class Counter(Device):
    """Counts writes: the guest makes exits all the time, so that kicks meet every point of the loop."""

    name = "counter"

    def __init__(self) -> None:
        self.writes = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes += 1


def _race(code: bytes, rounds: int, *, seed: int) -> None:
    """Post a message and kick, `rounds` times, at random moments; each must be obeyed before the next is sent."""
    chance = random.Random(seed)
    obeyed = threading.Semaphore(0)
    with machine(code) as vm:
        vm.attach(Counter(), ports=range(0x40, 0x41))
        vm.actions.count(range(0x41, 0x42))
        vm.start()
        for number in range(rounds):
            for _ in range(chance.randrange(200)):
                pass  # a delay of a few hundred nanoseconds to microseconds
            vm.vcpus[0].post(obeyed.release)
            assert obeyed.acquire(timeout=STALL_S), f"kick {number} was lost"
        assert vm.vcpus[0].state.kicks >= rounds


def test_kicks_race_with_a_spinning_guest() -> None:
    """A guest that never exits is interrupted by each of many kicks."""
    _race(SPIN, KICKS // 4, seed=1)


def test_kicks_race_with_exits_to_python() -> None:
    """A guest that exits to Python all the time sees each kick, inside and outside KVM_RUN."""
    _race(out_al(0x40) + b"\xeb\xfc", KICKS // 4, seed=2)


def test_kicks_race_with_exits_that_c_answers() -> None:
    """A guest whose exits never leave the C loop sees each kick."""
    _race(out_al(0x41) + b"\xeb\xfc", KICKS // 4, seed=3)


def test_kicks_from_many_threads_and_pauses() -> None:
    """Four threads kick while another pauses and resumes: nothing is lost and nothing hangs."""
    obeyed = threading.Semaphore(0)
    per_thread = KICKS // 16
    with machine(out_al(0x40) + b"\xeb\xfc") as vm:
        vm.attach(Counter(), ports=range(0x40, 0x41))
        vm.start()

        def kicker() -> None:
            for _ in range(per_thread):
                vm.vcpus[0].post(obeyed.release)

        threads = [threading.Thread(target=kicker) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(200):
            vm.pause()
            vm.start()
        for thread in threads:
            thread.join(60)
        for number in range(4 * per_thread):
            assert obeyed.acquire(timeout=STALL_S), f"message {number} was lost"


def test_a_kick_before_the_first_run_is_kept() -> None:
    """immediate_exit set while the vCPU is outside makes the next KVM_RUN return at once."""
    with machine(SPIN) as vm:
        vcpu = vm.vcpus[0]
        assert lib.pk_kick(vcpu.state) == 0
        assert vcpu.run_once().reason == "INTR"


def test_a_kick_from_before_a_settling_is_kept() -> None:
    """Completing an access does not eat the kick that came just before: the next run ends at once because of it."""
    with machine(out_al(0x40) + SPIN) as vm:
        vm.attach(Counter(), ports=range(0x40, 0x41))
        vcpu = vm.vcpus[0]
        assert vcpu.run_once().port == 0x40
        assert lib.pk_kick(vcpu.state) == 0
        vcpu.settle()
        assert vcpu.run_once().reason == "INTR"
