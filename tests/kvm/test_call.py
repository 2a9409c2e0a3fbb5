"""Machine.call: functions of the guest run from the host, in long and in protected mode."""

from __future__ import annotations

from collections.abc import Iterator

import cguest
import pytest

from pykvm import CallError, ConfigError, MachineStateError, Pc, SymbolError
from pykvm.debug.hostdebug import OUT, debug_support

SOURCE = """
volatile int calls;
int add(int a, int b) { calls++; return a + b; }
u64 sum8(long a, long b, long c, long d, long e, long f, long g, long h)
{ return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h; }
u64 wide(void) { return 0x1122334455667788ull; }
u8 low_byte(u32 x) { return x; }
unsigned long length(const char *s) { unsigned long n = 0; while (s[n]) n++; return n; }
void upper(char *s) { for (; *s; s++) if (*s >= 'a' && *s <= 'z') *s -= 32; }
unsigned long alignment(void) { return (unsigned long)__builtin_frame_address(0) & 15; }
unsigned fib(unsigned n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
void say(const char *s) { print(s); }
void spin(void) { for (;;) __asm__ volatile("pause"); }
void stop(void) { outb(0xf4, 9); }
void wild(void) { print("wild\\n"); ((void (*)(void))0xfd000000)(); }
void kmain(void) { print("ready\\n"); for (;;) outb(0x80, 1); }
"""


@pytest.fixture(scope="module", params=[64, 32])
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SOURCE as an ELF file of 64 or 32 bits."""
    return cguest.build(tmp_path_factory.mktemp("call"), SOURCE, request.param)


@pytest.fixture(params=["the host's", "out"])
def trap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breakpoints as this host has them, and as hosts have them that do not intercept INT3."""
    if request.param == "out":
        monkeypatch.setattr(debug_support(), "trap", OUT)
        monkeypatch.setattr(debug_support(), "real_trap", OUT)


@pytest.fixture
def vm(kernel: str, trap: None) -> Iterator[Pc]:
    """The guest, stopped in its endless loop."""
    with Pc(kernel, memory="16M") as vm:
        vm.run_until(port_write=0x80)
        yield vm


def test_functions_return_their_result(vm: Pc) -> None:
    """Arguments by register and by stack arrive, results of each width come back with their sign."""
    assert vm.call("add", 2, 3, returns="i32") == 5
    assert vm.call("add", 2, -5, returns="i32") == -3
    assert vm.call("sum8", 1, 2, 3, 4, 5, 6, 7, 8, returns="u32") == 204
    assert vm.call("wide", returns="u64") == 0x1122334455667788
    assert vm.call("low_byte", 0x1234, returns="u8") == 0x34
    assert vm.call("fib", 12) == 144


def test_the_machine_word_is_what_is_returned_otherwise(vm: Pc) -> None:
    """Without returns= the result is RAX in 64-bit and EAX in 32-bit mode."""
    bits = vm.symbols["kmain"] and (64 if vm.vcpus[0].sregs.cs.l else 32)
    assert vm.call("wide") == 0x1122334455667788 & ((1 << bits) - 1)


def test_buffers_go_by_pointer_and_come_back(vm: Pc) -> None:
    """Text and bytes are copied to the guest's stack; a bytearray gets what the function left there."""
    assert vm.call("length", "hello") == 5
    assert vm.call("length", b"hi\0there\0") == 2
    buffer = bytearray(b"mixed Case\0 rest")
    vm.call("upper", buffer, returns="void")
    assert buffer == b"MIXED CASE\0 rest"


def test_the_stack_is_aligned_as_the_abi_wants(vm: Pc) -> None:
    """Whatever the guest's own stack pointer and the arguments are, a frame begins where the compiler expects it."""
    rsp = vm.regs.rsp
    expected = 0 if vm.vcpus[0].sregs.cs.l else 8
    for shift in range(0, 16, 4):
        vm.regs.rsp = rsp - shift
        assert vm.call("alignment") == expected
    vm.regs.rsp = rsp


def test_registers_are_put_back(vm: Pc) -> None:
    """After a call the guest goes on as if nothing had been; what the function changed in memory stays."""
    before = vm.regs.as_dict()
    sregs = bytes(vm.vcpus[0].fd.get_xsave())
    vm.call("add", 1, 1)
    assert vm.regs.as_dict() == before
    assert bytes(vm.vcpus[0].fd.get_xsave()) == sregs
    assert vm.memory.read_u32(vm.symbols["calls"]) == 1
    vm.run_until(port_write=0x80)
    assert vm.regs.rip == before["rip"]


@pytest.mark.usefixtures("trap")
def test_a_function_may_run_through_where_the_guest_stands(kernel: str) -> None:
    """The guest is stopped inside put(), which the called function calls too: the return is still told apart."""
    with Pc(kernel, memory="16M") as vm:
        vm.run_until(port_write=(0x3F8, ord("r")))
        assert vm.symbols.describe(vm.regs.rip).startswith("put")
        vm.call("say", "one two", returns="void")
        vm.console.expect("one two")
        vm.run_until(port_write=0x80)
        assert vm.console.text == "rone twoeady\n"


def test_a_stack_of_the_callers_choice(vm: Pc) -> None:
    """stack= says where to push; a place without memory is refused before anything runs."""
    assert vm.call("add", 1, 2, stack=0x800000) == 3
    with pytest.raises(MachineStateError, match="no stack to call on"):
        vm.call("add", 1, 2, stack=0xE0000000)


def test_a_function_that_crashes_is_reported(vm: Pc) -> None:
    """A crash inside is a CallError with the outcome, its report and the guest's last words."""
    with pytest.raises(CallError, match=r"wild\(\): ended the guest with <Outcome CRASH") as caught:
        vm.call("wild")
    assert caught.value.outcome is not None and caught.value.outcome.report is not None
    assert caught.value.console[-1] == "wild"


def test_a_function_that_ends_the_guest_is_reported(vm: Pc) -> None:
    """A debug-exit inside is a CallError with its code."""
    with pytest.raises(CallError, match=r"stop\(\): ended the guest with <Outcome DEBUG_EXIT\(0x9\)> at stop"):
        vm.call("stop")


def test_a_function_that_hangs_is_stopped(vm: Pc) -> None:
    """After its time the function is given up, with the place where it is; the guest can go on."""
    before = vm.regs.as_dict()
    with pytest.raises(CallError, match=r"spin\(\): has not returned after 0.2 s; vCPU 0 is at spin.*c:\d+\)"):
        vm.call("spin", timeout=0.2)
    assert vm.regs.as_dict() == before
    assert vm.call("add", 4, 5) == 9


def test_wrong_calls_are_refused(vm: Pc) -> None:
    """Unknown names, results and arguments are refused in one line, and the guest is as it was."""
    before = vm.regs.as_dict()
    for arguments, error, message in (
        (("addd", 1), SymbolError, "did you mean add"),
        (("add", 1 << 70), ConfigError, "does not fit"),
        (("add", 1.5), ConfigError, "a guest function takes"),
        (("length", bytes(1 << 20)), ConfigError, "too much"),
    ):
        with pytest.raises(error, match=message):
            vm.call(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="none of u8"):
        vm.call("add", 1, 2, returns="int")
    assert vm.regs.as_dict() == before


def test_call_wants_a_guest_that_has_come_somewhere(kernel: str) -> None:
    """A running machine, and one in real mode, cannot be called into."""
    with Pc(None, memory="1M") as bare, pytest.raises(MachineStateError, match="16-bit"):
        bare.call(0x1000)
    with Pc(kernel, memory="16M") as vm:
        vm.start()
        with pytest.raises(MachineStateError, match="is running"):
            vm.call("add", 1, 2)
