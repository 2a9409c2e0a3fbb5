"""A snapshot file that somebody cuts short while machines have it as their memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import guests
import pytest

from pykvm import Outcome, Pc, restore_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE = 4096
TOUCHED = 16 << 20  # what touch.elf writes is from here on


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A snapshot of a guest that writes 4 MiB in ring 3, again and again."""
    file = tmp_path / "vm.snap"
    with guests.pc("touch.elf", "mib=4 passes=1000000000", memory="32M") as pc:
        pc.start()
        while pc.memory.read_u64(TOUCHED + (4 << 20) - PAGE) == 0:
            pass
        pc.pause()
        pc.save(str(file))
    return file


@pytest.fixture(params=["restored", "forked"])
def vm(path: Path, request: pytest.FixtureRequest) -> Iterator[Pc]:
    """The machine of that file, or one that shares its memory with it; the file is cut then."""
    with restore_file(path) as machine:
        assert isinstance(machine, Pc)
        twin = machine.fork() if request.param == "forked" else machine
        os.truncate(path, PAGE)
        yield twin
        twin.close()


def is_over(outcome: Outcome | None) -> bool:
    """It ended for that reason."""
    return outcome is not None and outcome.kind == "CRASH" and "vm.snap was cut to 4096 bytes while" in outcome.detail


def test_the_guest_ends(vm: Pc) -> None:
    """Its next access to what is gone is a CRASH with the reason, not an error of KVM_RUN."""
    outcome = vm.run(guests.RUN_S)
    assert is_over(outcome), outcome


ON_THREADS: dict[str, Callable[[Pc, Callable[[], object]], object]] = {
    "the caller's": lambda vm, look: look(),
    "a vCPU's": lambda vm, look: vm.vcpus[0].call(look, guests.RUN_S),
    "the I/O": lambda vm, look: vm.io.call_soon(look),
}


@pytest.mark.parametrize("thread", ON_THREADS)
def test_pykvm_lives(vm: Pc, thread: str) -> None:
    """An access of its own, on any of its threads, is no SIGBUS, and the run ends soon."""
    vm.start()
    ON_THREADS[thread](vm, lambda: vm.memory.read(TOUCHED, 4))
    assert is_over(vm.wait(guests.RUN_S))
