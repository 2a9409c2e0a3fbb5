"""Driving a guest: Console.expect and send, Machine.run_until, and what they say when it does not come."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import cguest
import pexpect
import pytest

from pykvm import ConfigError, Device, DeviceError, ExpectError, Machine, MachineStateError, Outcome, Pc
from pykvm.core.guestclock import MAX_STRETCH, GuestClock

SOURCE = """
volatile int passes;
__attribute__((noinline)) void step(void) { passes++; }
void kmain(void) {
    print("boot 1\\r\\nboot 2\\r\\nready\\r\\n");
    for (;;) {
        char c = get();
        if (c == 'q') outb(0xf4, 3);
        if (c == 's') step();
        if (c == 'p') { outb(0x80, 7); outb(0x80, 8); }
        if (c == 'h') for (;;) __asm__ volatile("cli\\nhlt");
        put(c); print(" ok\\r\\n");
    }
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SOURCE as an ELF file."""
    return cguest.build(tmp_path_factory.mktemp("expect"), SOURCE)


@pytest.fixture(params=[True, False], ids=["C", "Python"])
def vm(kernel: str, request: pytest.FixtureRequest) -> Iterator[Pc]:
    """The guest before its first instruction, with and without the console's short cut in C."""
    with Pc(kernel, memory="16M", c_actions=request.param) as vm:
        yield vm


def test_expect_runs_and_pauses(vm: Pc) -> None:
    """A paused machine runs until the text has come and is paused again; groups and what came before are there."""
    match = vm.console.expect(r"^boot (\d)$")
    assert match[1] == "1"
    assert vm.console.before == ""
    assert not vm.running
    assert vm.console.expect("ready\n")[0] == "ready\n"
    assert vm.console.before == "\nboot 2\n"


def test_expect_leaves_a_running_machine_running(vm: Pc) -> None:
    """A machine that was started runs on after the text."""
    vm.start()
    vm.console.expect("ready")
    assert vm.running
    vm.console.send("x")
    vm.console.expect("x ok")
    assert vm.running


def test_what_was_said_before_counts_once(vm: Pc) -> None:
    """Text that has come already is found without running the guest, and is not found again."""
    vm.console.expect("ready\n")
    with pytest.raises(ExpectError, match=r"ran for 0\.1 s and did not print 'ready'"):
        vm.console.expect("ready", timeout=0.1)
    vm.console.send("x")
    vm.console.expect("ok")
    assert vm.console.expect("\n")[0] == "\n"


def test_several_patterns(vm: Pc) -> None:
    """Of several texts the one that comes first is told by its match."""
    patterns = ["panic", re.compile("READY", re.IGNORECASE), "ready later"]
    assert vm.console.expect(patterns).re.pattern == "READY"


def test_a_conversation(vm: Pc) -> None:
    """What is sent to a paused guest arrives when it runs; nothing is lost of more than its FIFO holds."""
    vm.console.expect("ready")
    for letter in "abc":
        vm.console.sendline(letter, end="")
        vm.console.expect(f"{letter} ok")
    vm.console.send(b"0123456789" * 5)
    for digit in "0123456789" * 5:
        vm.console.expect(f"^{digit} ok")


def test_the_guests_end_is_said(vm: Pc) -> None:
    """A guest that ends instead is an ExpectError with the outcome and its last words; asking again says the same."""
    vm.console.expect("ready")
    vm.console.send("xq")
    for _ in range(2):
        with pytest.raises(ExpectError, match=r"ended with <Outcome DEBUG_EXIT\(0x3\)> and did not print 'never'") as e:
            vm.console.expect("never")
        assert e.value.outcome == Outcome("DEBUG_EXIT", 3)
        assert e.value.console[-1] == "x ok"
    assert vm.console.expect("x ok")  # what it said is still there


def test_the_last_words_count(vm: Pc) -> None:
    """Text that comes together with the guest's end is found."""
    vm.console.expect("ready")
    vm.console.send("xq")
    vm.run(timeout=10)
    assert vm.console.expect("x ok")


def test_a_device_that_raises_is_heard(vm: Pc) -> None:
    """An exception of a user's device comes out of expect."""

    class Broken(Device):
        name = "broken"

        def write(self, offset: int, size: int, value: int) -> None:
            raise ZeroDivisionError

    vm.console.expect("ready")
    vm.detach(vm.post_codes)
    vm.attach(Broken(), ports=range(0x80, 0x81))
    vm.console.send("p")
    with pytest.raises(DeviceError, match="broken"):
        vm.console.expect("p ok")


def test_it_is_pexpect(vm: Pc) -> None:
    """console.talk is a pexpect spawn: index, exact texts, lines, log, EOF and TIMEOUT as patterns and exceptions."""
    talk, log = vm.console.talk, io.StringIO()
    talk.logfile_read = log
    assert talk.expect(["never", re.compile("BOOT (1)", re.IGNORECASE)]) == 1
    assert (talk.match[1], talk.after, talk.match_index) == ("1", "boot 1", 1)
    assert talk.readline() == "\n"
    assert talk.readline() == "boot 2\n"
    assert talk.expect_exact(["rea.y", "ready"]) == 1
    assert talk.expect(["never", pexpect.TIMEOUT], timeout=0.1) == 1
    with pytest.raises(pexpect.TIMEOUT, match=r"ran for 0\.1 s and did not print 'rea.y'.*\nits last words:") as caught:
        talk.expect_exact("rea.y", timeout=0.1)
    assert isinstance(caught.value, ExpectError)
    vm.console.send("xq")
    with pytest.raises(pexpect.EOF, match="ended with <Outcome DEBUG_EXIT"):
        vm.console.expect("never")
    assert talk.expect([pexpect.EOF, "never"]) == 0
    assert talk.before.endswith("x ok\n")
    assert log.getvalue() == vm.console.text


def test_run_until_console(vm: Pc) -> None:
    """run_until takes what expect takes, and leaves the machine paused."""
    vm.start()
    reached = vm.run_until(console="boot (.)")
    assert reached.match is not None and reached.match[1] == "1"
    assert not vm.running
    vm.console.expect("ready")


def test_run_until_port_write(vm: Pc) -> None:
    """The guest stops after the write, which the device has had; a value may be asked for."""
    vm.console.expect("ready")
    vm.console.send("pp")
    reached = vm.run_until(port_write=0x80)
    assert (reached.condition, reached.value, reached.size) == ("port_write", 7, 1)
    assert vm.post_codes.codes == [7]
    assert vm.run_until(port_write=(0x80, 8)).value == 8
    assert vm.run_until(port_write=(0x80, 8)).value == 8
    vm.console.expect("p ok\np ok")  # nothing of it is left behind


def test_run_until_sees_what_c_would_answer(vm: Pc) -> None:
    """Writes to the serial port, which C takes in normally, are seen too, and the console has them."""
    assert vm.run_until(port_write=(0x3F8, ord("2"))).value == ord("2")
    assert vm.console.text == "boot 1\r\nboot 2"
    vm.console.expect("ready")


def test_run_until_a_port_without_a_device(vm: Pc) -> None:
    """A port that nothing answers can be waited for, and the time limit is kept."""
    with pytest.raises(ExpectError, match=r"ran for 0.1 s and did not come to a write to port 0x5000 of 0x1"):
        vm.run_until(port_write=(0x5000, 1), timeout=0.1)
    assert vm.bus.ports.find(0x5000, 1) is None


def test_run_until_rip(vm: Pc) -> None:
    """The guest stops before the first instruction of a function, and goes on from there."""
    vm.console.expect("ready")
    vm.console.send("sss")
    for passes in range(3):
        reached = vm.run_until(rip="step")
        assert (reached.condition, reached.vcpu) == ("rip", 0)
        assert vm.regs.rip == vm.symbols["step"]
        assert vm.memory.read_u32(vm.symbols["passes"]) == passes
    vm.console.expect("s ok\ns ok\ns ok")


def test_the_first_condition_counts(vm: Pc) -> None:
    """Of several conditions the one that is met first ends it, and the others are forgotten."""
    vm.console.expect("ready")
    vm.console.send("px")
    assert vm.run_until(console="x ok", rip="step", port_write=0x80).condition == "port_write"
    assert vm.run_until(console="x ok", rip="step").condition == "console"
    vm.console.send("s")
    vm.console.expect("s ok")


def test_run_until_says_what_did_not_come(vm: Pc) -> None:
    """All that was waited for is named, with how the guest ended."""
    vm.console.send("h")
    with pytest.raises(ExpectError) as caught:
        vm.run_until(console="never", rip="step", port_write=0x81)
    message = str(caught.value)
    for part in ("HALTED", "the text 'never'", "a write to port 0x81", "the instruction at step", "  | ready"):
        assert part in message


def test_wrong_conditions_are_refused(vm: Pc) -> None:
    """No condition at all, a port that is none."""
    with pytest.raises(ConfigError, match="say what to wait for"):
        vm.run_until()
    with pytest.raises(ConfigError, match="no port"):
        vm.run_until(port_write=0x10000)


def test_regs_and_symbols_are_the_first_vcpus(vm: Pc) -> None:
    """vm.regs writes vCPU 0's registers; vm.symbols knows the kernel's ELF file."""
    assert vm.symbols.describe(vm.regs.rip) == "_start"
    vm.regs.rbx = 0x55
    assert vm.vcpus[0].regs.rbx == 0x55


def test_a_machine_without_a_serial_port() -> None:
    """Nothing can be sent where there is no port."""
    with Machine(memory="64K", irqchip="none") as vm, pytest.raises(MachineStateError, match="no serial port"):
        vm.console.send("x")


def test_the_guest_clock_stands_while_the_host_is_elsewhere(vm: Pc, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that the vCPU's thread spends ready without a CPU does not count, down to a twentieth of wall time."""
    waits = iter([0.0, 1e9])
    vm.console.expect("ready")
    monkeypatch.setattr("pykvm.core.guestclock._queue_wait", lambda thread: next(waits))
    monkeypatch.setattr("pykvm.core.guestclock.monotonic", iter([100.0, 110.0]).__next__)
    clock = GuestClock(vm)
    assert clock.elapsed() == 10.0 / MAX_STRETCH
