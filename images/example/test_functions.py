"""Unit tests of the kernel's C functions: called one by one in a booted guest."""

from __future__ import annotations

import pytest

from pykvm import CallError, Pc

PAGE, PAGES = 4096, 64


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("42", 42), ("4294967295", 2**32 - 1), ("4294967296", -1), ("", -1), ("12x", -1), ("-1", -1)],
)
def test_to_number(booted_vm: Pc, text: str, value: int) -> None:
    """Decimal text becomes a number, anything else -1."""
    assert booted_vm.call("to_number", text, returns="i64") == value


@pytest.mark.parametrize("value", [0, 9, 10, 12345, 2**32 - 1])
def test_format_number(booted_vm: Pc, value: int) -> None:
    """A number becomes decimal text: a bytearray goes to the guest and comes back changed."""
    buffer = bytearray(b"#" * 12)
    length = booted_vm.call("format_number", value, buffer)
    assert buffer[:length].decode() == str(value)
    assert buffer[length] == 0


def test_pages_are_aligned_and_different(booted_vm: Pc) -> None:
    """Every page is handed out once, then there are none."""
    pages = [booted_vm.call("page_alloc") for _ in range(PAGES)]
    assert len(set(pages)) == PAGES
    assert all(page % PAGE == 0 for page in pages)
    assert booted_vm.call("page_alloc") == 0


def test_each_test_has_all_pages(booted_vm: Pc) -> None:
    """The test above used them all up, but in its own fork of the booted machine."""
    assert booted_vm.call("pages_left", returns="i32") == PAGES


def test_pages_are_freed_once(booted_vm: Pc) -> None:
    """A page can be given back once; what is no page is refused."""
    page = booted_vm.call("page_alloc")
    assert booted_vm.call("page_free", page, returns="bool")
    assert not booted_vm.call("page_free", page, returns="bool")
    assert not booted_vm.call("page_free", page + 1, returns="bool")
    assert not booted_vm.call("page_free", 0, returns="bool")


def test_a_crash_is_an_error(booted_vm: Pc) -> None:
    """A function that crashes the kernel fails the test with the place and a report, not the test run."""
    with pytest.raises(CallError, match=r"crash\(\): ended the guest with <Outcome .* at crash") as caught:
        booted_vm.call("crash")
    assert caught.value.outcome is not None and caught.value.outcome.kind in ("CRASH", "TRIPLE_FAULT")


def test_an_endless_loop_is_an_error(booted_vm: Pc) -> None:
    """A function that does not return is stopped after its time."""
    with pytest.raises(CallError, match="has not returned"):
        booted_vm.call("hang", timeout=0.2)
