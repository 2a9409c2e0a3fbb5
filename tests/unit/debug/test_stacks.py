"""What is made of samples: names, tables, collapsed stacks, speedscope, flame graphs."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from pykvm.debug.profile.flamegraph import WIDTH, render
from pykvm.debug.profile.stacks import HALTED, MAX_STACKS, Profile
from pykvm.debug.symbols import Symbol, Symbols

SYMBOLS = Symbols([Symbol("main", 0x1000, 0x100), Symbol("work", 0x2000, 0x100), Symbol("start", 0x500, 0x20)])
SVG = "{http://www.w3.org/2000/svg}"


def sample() -> Profile:
    """Ten samples of two vCPUs."""
    profile = Profile(100)
    for _ in range(6):
        profile.add(0, (0x2010, 0x1020, 0x510))
    profile.add(0, (0x1050, 0x510))
    for _ in range(3):
        profile.add(1, HALTED)
    return profile


def test_names_outermost_first() -> None:
    """Stacks by names, the vCPU before them, markers in words."""
    assert sample().named(SYMBOLS) == {
        ("vCPU 0", "start", "main", "work"): 6,
        ("vCPU 0", "start", "main"): 1,
        ("vCPU 1", "(halted)"): 3,
    }


def test_a_caller_is_where_it_called() -> None:
    """A call as the last instruction of a function returns to the next one's first: the caller is the former."""
    profile = Profile(100)
    profile.add(0, (0x2000, 0x1100))
    assert list(profile.named(SYMBOLS)) == [("vCPU 0", "main", "work")]


def test_garbage_ends_a_stack() -> None:
    """With symbols, a return address that is in none of them ends the stack; without any, numbers are all there is."""
    profile = Profile(100)
    profile.add(0, (0x2010, 0xDEAD0000, 0x1020))
    assert list(profile.named(SYMBOLS)) == [("vCPU 0", "work")]
    assert list(profile.named(Symbols())) == [("vCPU 0", "0x101f", "0xdeacffff", "0x2010")]


def test_the_table() -> None:
    """Own share and share with callees, the hottest first; recursion counts once."""
    lines = [line.split() for line in sample().text(SYMBOLS).splitlines()]
    assert lines[2:] == [
        ["60.0%", "60.0%", "work"],
        ["30.0%", "30.0%", "(halted)"],
        ["10.0%", "70.0%", "main"],
        ["0.0%", "70.0%", "start"],
    ]
    recursive = Profile(1)
    recursive.add(0, (0x1010, 0x1020, 0x1030))
    assert recursive.text(SYMBOLS).splitlines()[2].split()[:2] == ["100.0%", "100.0%"]
    assert "no samples" in Profile(1).text(SYMBOLS)


def test_collapsed() -> None:
    """One line a stack, its count last."""
    lines = sample().collapsed(SYMBOLS).splitlines()
    assert lines == ["vCPU 0;start;main 1", "vCPU 0;start;main;work 6", "vCPU 1;(halted) 3"]
    assert Profile(1).collapsed(SYMBOLS) == ""


def test_speedscope() -> None:
    """As its schema wants it: frames are shared, every index exists, weights add up to the end value."""
    document = json.loads(sample().speedscope(SYMBOLS))
    assert document["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    frames = document["shared"]["frames"]
    assert [profile["name"] for profile in document["profiles"]] == ["vCPU 0", "vCPU 1"]
    for profile in document["profiles"]:
        assert (profile["type"], profile["unit"], profile["startValue"]) == ("sampled", "none", 0)
        assert len(profile["samples"]) == len(profile["weights"])
        assert sum(profile["weights"]) == profile["endValue"]
        assert all(0 <= index < len(frames) for stack in profile["samples"] for index in stack)
    assert frames[document["profiles"][0]["samples"][1][-1]]["name"] == "work"


def test_the_flame_graph_nests() -> None:
    """Well-formed XML; every box stands on one that is at least as wide; shares are those of the samples."""
    root = ET.fromstring(render(sample().named(SYMBOLS), "title"))
    boxes = [group.attrib for group in root.iter(f"{SVG}g")]
    by_name = {box["data-n"]: box for box in boxes}
    assert float(by_name["work"]["data-w"]) == 0.6
    assert float(by_name["all"]["data-w"]) == 1.0
    for box in boxes:
        level, left, width = int(box["data-d"]), float(box["data-x"]), float(box["data-w"])
        below = [each for each in boxes if int(each["data-d"]) == level - 1]
        assert level == 0 or any(
            float(each["data-x"]) - 1e-6 <= left
            and left + width <= float(each["data-x"]) + float(each["data-w"]) + 1e-6
            for each in below
        )
    assert all(
        float(rect.attrib["width"]) <= WIDTH for rect in root.iter(f"{SVG}rect") if rect.attrib["width"] != "100%"
    )


def test_an_empty_flame_graph() -> None:
    """No samples: a document with its title."""
    assert "nothing" in "".join(ET.fromstring(render({}, "nothing")).itertext())


@given(st.dictionaries(st.lists(st.text(), min_size=1, max_size=4).map(tuple), st.integers(1, 9), max_size=5))
def test_any_name_fits_into_the_svg(stacks: dict[tuple[str, ...], int]) -> None:
    """A symbol's name may hold anything: quotes, tags, control characters."""
    root = ET.fromstring(render(stacks, "<&>"))
    assert len(list(root.iter(f"{SVG}script"))) == 1


def test_the_number_of_stacks_is_bounded() -> None:
    """A guest that is never twice at the same place does not fill the host's memory."""
    profile = Profile(1)
    profile.samples.update({(0, (address,)): 1 for address in range(1, MAX_STACKS + 1)})
    profile.add(0, (1 << 40, 5))
    profile.add(0, (3, 9))
    assert len(profile.samples) == MAX_STACKS + 1
    assert profile.samples[0, (0,)] == 1 and profile.samples[0, (3,)] == 2
    assert re.match(r"2 samples", profile.text(Symbols()))
