"""What a conversation makes of the bytes that a guest prints; no guest needed."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import pexpect
import pytest

from pykvm import MachineStateError
from pykvm.core.console import KEEP, Console
from pykvm.testing.talk import Talk


def talk() -> tuple[Console, Talk]:
    """A console and who listens to it."""
    console = Console()
    return console, Talk(cast(Any, SimpleNamespace(console=console, running=False, outcome=None)))


def found(listener: Talk, *patterns: str) -> str | None:
    """What `seek` finds of the patterns."""
    match = listener.seek(listener.compile_pattern_list(patterns))
    return match[0] if match else None


def test_line_ends_are_plain_however_they_come() -> None:
    """CR LF is one line end, also when its halves come apart; a lone CR stays."""
    console, listener = talk()
    console.write(b"one\r")
    assert found(listener, "never") is None
    console.write(b"\ntwo\rthree\r\n")
    assert found(listener, r"\A[\s\S]*\Z") == "one\ntwo\rthree\n"


def test_characters_come_in_pieces_and_broken() -> None:
    """UTF-8 is decoded across writes; what is none becomes U+FFFD."""
    console, listener = talk()
    for byte in "grün".encode() + b"\xff!":
        console.write(bytes([byte]))
        assert found(listener, "never") is None
    assert found(listener, "grün.!") == "grün\ufffd!"


def test_the_earliest_match_is_taken_with_all_before_it() -> None:
    """Of several patterns the one that matches first in the text counts, not the first in the list."""
    console, listener = talk()
    console.write(b"zero one two three")
    assert found(listener, "two", "one") == "one"
    assert listener.before == "zero "
    assert found(listener, "one") is None
    assert found(listener, "three", "two") == "two"
    assert listener.unread == " three"


def test_a_chatty_guest_is_forgotten_in_time() -> None:
    """What nobody expects is kept up to a limit, and the newest part of it."""
    console, listener = talk()
    for piece in range(5):
        console.write(b"%d" % piece * KEEP)
        assert found(listener, "never") is None
    assert len(listener.unread) == KEEP
    assert found(listener, "4{10}") == "4" * 10


def test_what_was_lost_between_two_looks_does_no_harm() -> None:
    """More output than the console keeps, at once: the end of it is there."""
    console, listener = talk()
    console.write(b"x" * (3 * KEEP) + b"end")
    assert found(listener, "end$") == "end"


def test_only_patterns_are_patterns() -> None:
    """Text, regular expressions, EOF and TIMEOUT, one or several; anything else is a TypeError."""
    _, listener = talk()
    assert [each.pattern for each in listener.compile_pattern_list(("a", re.compile("b")))] == ["a", "b"]
    assert listener.compile_pattern_list(pexpect.EOF) == [pexpect.EOF]
    for wrong in ([3], [b"bytes"], [None]):
        with pytest.raises(TypeError):
            listener.compile_pattern_list(wrong)


def test_a_console_without_a_machine_has_no_conversation() -> None:
    """Nobody can be expected to answer there."""
    with pytest.raises(MachineStateError, match="nobody"):
        Console().expect("x")
