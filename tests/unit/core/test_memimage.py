"""Frozen images: what is read from them, and where two of them may differ."""

from __future__ import annotations

import os
import random
from itertools import pairwise

import pytest

from pykvm.core import memimage
from pykvm.core.memimage import MERGE, Backing, Extent, SlotImage, apart

SIZE = 16 * MERGE + 4096


def backing(byte: int, size: int = SIZE) -> Backing:
    """A memfd full of that byte."""
    found = Backing(os.memfd_create("test", os.MFD_CLOEXEC))
    os.pwrite(found.fd, bytes([byte]) * size, 0)
    return found


def image(extents: list[Extent], base: Backing | None = None) -> SlotImage:
    """An image of SIZE bytes."""
    return SlotImage(0, 0, SIZE, "test", False, extents, base)


def random_extents(chance: random.Random, files: list[Backing]) -> list[Extent]:
    """Extents that do not overlap, with holes; each from its own place of the file or from another."""
    found, at = [], 0
    while (start := at + 4096 * chance.randrange(20)) < SIZE:
        at = min(SIZE, start + 4096 * chance.randrange(1, 40))
        shift = chance.choice((0, 0, 4096))
        found.append(Extent(start, at, chance.choice(files), start + shift))
    return found


def test_what_may_differ() -> None:
    """`apart` names every page that two images have from different places, in order, and nothing twice."""
    chance, files = random.Random(4), [backing(1), backing(2)]
    for _ in range(100):
        one, other = image(random_extents(chance, files)), image(random_extents(chance, files))
        ranges = apart(one, other)
        assert all(low < high for low, high in ranges)
        assert all(first[1] < second[0] for first, second in pairwise(ranges))
        covered = {page for low, high in ranges for page in range(low, high, 4096)}
        for page in range(0, SIZE, 4096):
            assert page in covered or one.read(page, 4096) == other.read(page, 4096)
    assert apart(one, one) == []


@pytest.mark.parametrize("most", [8192, 3])
def test_over_a_file(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Over its base an image has the base's content where it has none, also when it is made flat."""
    monkeypatch.setattr(memimage, "MAX_ON_BASE", most)
    base = backing(7, SIZE - 100)  # the rest of the last page is zero
    own = [Extent(at, at + 4096, file, at) for at, file in ((0, backing(1)), (3 * MERGE, backing(0)))]
    whole = image(own).upon(base)
    expected = b"\1" * 4096 + b"\7" * (3 * MERGE - 4096) + bytes(4096)
    expected += b"\7" * (SIZE - 100 - len(expected)) + bytes(100)
    assert whole.read(0, SIZE) == expected
    assert whole.base is base
    assert (len(whole.extents) == 1) is (most == 3)
    under = whole.under()
    assert under is not None and under.read(4096, 10) == b"\7" * 10
