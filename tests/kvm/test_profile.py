"""Profiles of real guests: where they are is where the samples are."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from time import monotonic, sleep

import cguest
import command
import guests
import pytest

from pykvm import ConfigError, Pc
from pykvm.debug.profile.sampler import Profiler

# burn() calls something, and so has a frame: a leaf has none, and hides its caller
BUSY = """
static volatile u64 sink;
__attribute__((noinline)) void touch(void) { sink++; }
__attribute__((noinline)) void burn(void) { touch(); for (u64 i = 0; i < 4000; i++) sink += i; touch(); }
__attribute__((noinline)) void twice(void) { burn(); burn(); sink++; }
void kmain(void) { print("go\\n"); for (;;) twice(); }
"""
FRAMES = ("-fno-omit-frame-pointer", "-fno-optimize-sibling-calls")
ENOUGH = 40


def sample(machine: Pc, enough: int = ENOUGH) -> Profiler:
    """Profile a machine until there are that many samples."""
    machine.start()
    profiler = machine.profile(2000)
    end = monotonic() + guests.RUN_S
    while profiler.profile.total < enough:
        assert monotonic() < end and machine.running
        sleep(0.01)
    profiler.close()
    return profiler


def test_the_hot_function_and_its_callers(tmp_path: Path) -> None:
    """A guest that is nearly always in burn() is sampled there, with the callers that its frame pointers tell."""
    with Pc(cguest.build(tmp_path, BUSY, 64, "busy", *FRAMES), memory="16M") as machine:
        profiler = sample(machine)
        stacks = profiler.profile.named(machine.symbols)
        assert machine.running  # profiling ends, the guest runs on
        machine.stop()
    inner: Counter[str] = Counter()
    for stack, count in stacks.items():
        inner[stack[-1]] += count
    assert inner.most_common(1)[0][0] == "burn"
    deep = sum(count for stack, count in stacks.items() if stack[-4:] == ("_start", "kmain", "twice", "burn"))
    assert deep > inner["burn"] / 2


def test_ring_3_is_sampled() -> None:
    """A loop without any exit in ring 3, where nothing but a kick ends KVM_RUN."""
    with guests.pc("endings.elf", "ending=spin-user") as machine:
        profiler = sample(machine)
        places = {stack[-1] for stack in profiler.profile.named(machine.symbols)}
        machine.stop()
    assert "do_spin" in places


def test_halted_and_waiting_vcpus() -> None:
    """A vCPU that halts is counted as such, one that nobody started as waiting: neither has a place in the code."""
    with guests.pc("endings.elf", "ending=halt-serial", cpus=2) as machine:
        profiler = sample(machine, 200)
        stacks = profiler.profile.named(machine.symbols)
        machine.stop()
    assert stacks["vCPU 0", "(halted)"] > 0
    assert stacks["vCPU 1", "(waits for SIPI)"] > 0
    assert {stack for stack in stacks if stack[0] == "vCPU 1"} == {("vCPU 1", "(waits for SIPI)")}


def test_the_guest_does_not_notice() -> None:
    """All output is the same, and the run ends as it would."""
    plain = guests.run("multiboot.elf")
    with guests.pc("multiboot.elf") as machine, machine.profile(5000):
        outcome = machine.run(guests.RUN_S)
        assert (outcome, guests.text(machine)) == plain


def test_closing_the_machine_ends_the_profiler() -> None:
    """No thread is left, whether the guest runs or never ran."""
    with guests.pc("endings.elf", "ending=spin") as machine:
        profiler = sample(machine, 1)
        still = machine.profile()
    with guests.pc("endings.elf") as machine:
        never = machine.profile()
    assert not any(each._thread.is_alive() for each in (profiler, still, never))


@pytest.mark.parametrize("rate", [0, -1, 1e9])
def test_impossible_rates(rate: float) -> None:
    """They are refused."""
    with guests.pc("endings.elf") as machine, pytest.raises(ConfigError):
        machine.profile(rate)


@pytest.mark.host
def test_the_command(tmp_path: Path) -> None:
    """The table on stderr, the three files, and the guest's own status."""
    files = [tmp_path / f"p{suffix}" for suffix in (".svg", ".json", ".txt")]
    outputs = [word for file in files for word in ("--output", str(file))]
    done = command.run("profile", *outputs, "--debug-exit", "--cpus", "2", "--rate", "2000", guests.IMAGES / "smp.elf")
    assert done.returncode == 1, done.stderr
    assert "2 of 2 cpus" in done.stdout
    assert "samples at 2000 Hz" in done.stderr and "start64" in done.stderr
    root = ET.fromstring(files[0].read_text())
    assert any(group.attrib["data-n"] == "vCPU 0" for group in root.iter("{http://www.w3.org/2000/svg}g"))
    assert json.loads(files[1].read_text())["profiles"][0]["name"] == "vCPU 0"
    assert ";start64" in files[2].read_text()


@pytest.mark.host
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", "x.png"], "speedscope"),
        (["--rate", "0"], "samples a second"),
        (["--symbols", "/none"], "No such file"),
        (["--rows", "0"], "not positive"),
    ],
)
def test_wrong_usage(words: list[str], said: str) -> None:
    """One line and status 2, before anything runs."""
    done = command.run("profile", *words, guests.IMAGES / "hello.bin")
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert said in done.stderr
