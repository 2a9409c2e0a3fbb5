"""The kernel from outside: what is typed and what it answers."""

from __future__ import annotations

import pytest

from pykvm import ExpectError, Outcome, Pc


def test_boot(vm: Pc) -> None:
    """From the first instruction to the prompt."""
    vm.console.expect("example: ready\n> ")


@pytest.mark.parametrize(("a", "b"), [(2, 3), (0, 0), (4294967295, 1)])
def test_add(booted_vm: Pc, a: int, b: int) -> None:
    """Sums are modulo 2^32."""
    booted_vm.console.sendline(f"add {a} {b}")
    assert booted_vm.console.expect(r"(\d+)\n> ")[1] == str((a + b) % 2**32)


def test_several_commands(booted_vm: Pc) -> None:
    """A conversation; what is sent ahead waits for the guest."""
    booted_vm.console.send("alloc\nalloc\nnonsense\n")
    booted_vm.console.expect("ok, 63 left")
    booted_vm.console.expect("ok, 62 left")
    booted_vm.console.expect(r"what\?")


def test_memory_is_at_hand(booted_vm: Pc) -> None:
    """Variables of the guest are read and written by their names."""
    assert booted_vm.linear.read_cstring("greeting") == b"example"
    booted_vm.linear.write("greeting", b"pytest\0")
    booted_vm.console.sendline("hello")
    booted_vm.console.expect("hello from pytest")


def test_exit_code(booted_vm: Pc) -> None:
    """The guest's end is an Outcome."""
    booted_vm.console.sendline("exit 7")
    assert booted_vm.run() == Outcome("DEBUG_EXIT", 7)


def test_up_to_a_function(booted_vm: Pc) -> None:
    """run_until stops before the first instruction of a function; its arguments are in the registers."""
    booted_vm.console.sendline("add 20 22")
    booted_vm.run_until(rip="format_number")
    assert booted_vm.regs.rdi == 42


def test_a_hang_is_noticed(booted_vm: Pc) -> None:
    """Waiting ends after its time, and the error has the guest's last words."""
    booted_vm.console.sendline("hang")
    with pytest.raises(ExpectError, match="did not print"):
        booted_vm.console.expect("> ", timeout=0.2)
