"""A differential test: native/net.c against its reference, net.py and netrx.py."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from driver import EVENT_IDX, INDIRECT_DESC, NEXT, WRITE, Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from netpeer import HEADER, FakeTap, frame

from pykvm._native import lib
from pykvm.virtio.net import Net
from pykvm.virtio.netbackend import net_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

FEATURES = [
    sum(bits) | INDIRECT_DESC
    for bits in (
        (net_bits("MRG_RXBUF", "CSUM", "GUEST_CSUM", "HOST_TSO4", "GUEST_TSO4"), EVENT_IDX),
        (net_bits("MRG_RXBUF", "HOST_TSO4", "CSUM"),),
        (net_bits("GUEST_CSUM"), EVENT_IDX),
        (),
    )
]
PLACES = 0x80000
PLACE_SIZE = 0x1000
RING = 16

sizes = st.one_of(st.sampled_from([1, 2, 11, 12, 13, 26, 27, 64, 1500, 2048, 0xFFF]), st.integers(1, 0xFFF))
chains = st.lists(sizes, min_size=1, max_size=5)
headers = st.builds(
    HEADER.pack,
    st.sampled_from([0, 1, 2, 3, 0xFF]),
    st.sampled_from([0, 1, 3, 4, 5, 0x80, 0x81, 0x84]),
    st.sampled_from([0, 54, 0xFFFF]),
    st.sampled_from([0, 1, 1448]),
    st.sampled_from([0, 14, 34, 0xFFFF]),
    st.sampled_from([0, 6, 16, 0xFFFF]),
    st.just(0),
)


class Receive(NamedTuple):
    """The guest offers a chain of buffers."""

    sizes: Sequence[int]
    kind: int = WRITE


class Send(NamedTuple):
    """The guest sends a frame, cut into buffers at these sizes."""

    header: bytes
    size: int
    cuts: Sequence[int]


class Arrive(NamedTuple):
    """A frame comes from the host."""

    header: bytes
    size: int


class Link(NamedTuple):
    """The cable."""

    up: bool


class Kick(NamedTuple):
    """A notification."""

    queue: int


frame_sizes = st.one_of(st.sampled_from([13, 14, 60, 1514, 9000, 65554, 65555, 70_000]), st.integers(14, 5000))
steps = st.lists(
    st.one_of(
        st.builds(Receive, chains),
        st.builds(Receive, chains),
        st.builds(Arrive, headers, frame_sizes),
        st.builds(Arrive, headers, frame_sizes),
        st.builds(Send, headers, st.one_of(st.just(0), st.integers(1, 4000)), chains),
        st.builds(Kick, st.sampled_from([0, 1])),
        st.builds(Link, st.booleans()),
        st.builds(Receive, chains, st.just(0)),
    ),
    max_size=30,
)


class World:
    """A device and its driver; what the driver does is told by steps."""

    def __init__(self, native: bool, features: int) -> None:
        self.tap = FakeTap()
        self.tap.is_plain = native
        self.net = Net(self.tap, mac="52:54:00:12:34:56")
        self.driver = Driver(self.net)
        self.queues = self.driver.start(features, size=RING)
        self.count = [0, 0]
        self.heads: dict[int, list[tuple[int, int]]] = {}
        self.seen: list[object] = []

    def chain(self, queue: int, parts: Sequence[tuple[int, int, bytes]]) -> None:
        """Offer one indirect descriptor for a chain of (size, kind, contents)."""
        ring, memory = self.queues[queue], self.driver.memory
        slot = self.count[queue] % RING
        if self.count[queue] - ring.seen >= RING:
            return  # full
        base = PLACES + (queue * RING + slot) * 5 * PLACE_SIZE // 2
        places, entries = [], []
        for size, kind, data in parts:
            memory.write(base, data or bytes(size))
            entries.append((base, size, kind))
            places.append((base, size))
            base += size
        table = 0x40000 + (queue * RING + slot) * 0x100
        for i, (gpa, size, kind) in enumerate(entries):
            more = NEXT if i < len(entries) - 1 else 0
            memory.write(table + 16 * i, gpa.to_bytes(8, "little") + size.to_bytes(4, "little")
                         + (kind | more).to_bytes(2, "little") + (i + 1).to_bytes(2, "little"))  # fmt: skip
        ring.descriptor(slot, table, 16 * len(entries), lib.VRING_DESC_F_INDIRECT)
        ring.offer(slot)
        self.heads[queue * RING + slot] = places
        self.count[queue] += 1

    def step(self, step: object) -> None:
        """Do one."""
        if isinstance(step, Receive):
            self.chain(0, [(size, step.kind, b"") for size in clipped(step.sizes)])
        elif isinstance(step, Send):
            data = step.header[: 12 if step.size else 7] + frame(step.size)
            pieces = []
            for cut in clipped(step.cuts):
                pieces.append(data[:cut])
                data = data[cut:]
            self.chain(1, [(len(piece), 0, piece) for piece in (*pieces, data[:4000]) if piece])
        elif isinstance(step, Arrive):
            with suppress(BlockingIOError):  # as full for the one as for the other
                self.tap.peer.send(step.header + frame(step.size))
        elif isinstance(step, Link):
            self.net.set_link(step.up)
        elif isinstance(step, Kick):
            self.queues[step.queue].kick()
        self.driver.io.run()
        self.look()

    def look(self) -> None:
        """Remember all that driver and host can see."""
        for queue in (0, 1):
            for head, written in self.queues[queue].used():
                self.seen.append((queue, head, written))
                left = written
                for gpa, size in self.heads[queue * RING + head] if queue == 0 else []:
                    self.seen.append(self.driver.memory.read(gpa, min(size, left)))
                    left -= min(size, left)
        self.seen.append((self.tap.sent(), self.driver.needs_reset))
        self.seen.append((self.net.frames, self.net.bytes, self.net.dropped))


def clipped(sizes: Sequence[int]) -> list[int]:
    """As many of them as fit a chain's place."""
    found: list[int] = []
    for size in sizes:
        if sum(found) + size < 5 * PLACE_SIZE // 2 - 4200:
            found.append(size)
    return found or [64]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FEATURES), steps)
def test_c_does_what_python_does(features: int, steps: Sequence[object]) -> None:
    """Whatever driver and host do, both end with the same frames, rings, counters, and the same verdict."""
    worlds = [World(native, features) for native in (True, False)]
    try:
        for step in steps:
            for world in worlds:
                world.step(step)
            assert worlds[0].seen == worlds[1].seen
    finally:
        for world in worlds:
            world.driver.close()
    assert not worlds[0].driver.errors + worlds[1].driver.errors
