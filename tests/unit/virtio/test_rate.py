"""Token buckets with a clock of the test's, and a device that they slow down."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.errors import ConfigError
from pykvm.virtio.device import VirtioDevice
from pykvm.virtio.rate import RateLimit, Throttle, TokenBucket, limit_of, numbers_of, parse_rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.iothread import Timer
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.queue import Virtqueue

Drive = "Callable[[VirtioDevice], Driver]"


class Clock:
    """Time that passes when told, and the timers that run in it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Remember the call."""
        from pykvm.core.iothread import Timer

        timer = Timer(self.now + delay_s, callback)
        self.timers.append((timer.due, lambda: None if timer.cancelled else callback()))
        return timer

    def advance(self) -> None:
        """Let time pass to the next timer, and run it."""
        self.timers.sort(key=lambda each: each[0])
        self.now, callback = self.timers.pop(0)
        callback()


def test_burst_then_rate() -> None:
    """What was saved up goes at once; after that tokens come at the rate."""
    clock = Clock()
    bucket = TokenBucket(100, 50, clock)
    for _ in range(5):
        assert bucket.delay() == 0
        bucket.charge(10)
    assert bucket.delay() == pytest.approx(0.01)
    clock.now += 0.2
    assert bucket.delay() == 0
    bucket.charge(21)
    assert bucket.delay() > 0


def test_no_more_is_saved_than_the_burst() -> None:
    """A long rest does not earn more than the burst."""
    clock = Clock()
    bucket = TokenBucket(100, 50, clock)
    clock.now += 3600
    assert bucket.delay() == 0
    bucket.charge(51)
    assert bucket.delay() > 0


def test_request_larger_than_the_burst() -> None:
    """It is served, and the next one waits until it is paid."""
    clock = Clock()
    bucket = TokenBucket(100, 10, clock)
    assert bucket.delay() == 0
    bucket.charge(1010)
    assert bucket.delay() == pytest.approx(10.01)
    clock.now += 10.01
    assert bucket.delay() == 0


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200), st.integers(1, 2000), st.integers(1, 4000))
def test_the_rate_holds_in_the_long_run(sizes: list[int], rate: int, burst: int) -> None:
    """Whatever the requests, what went before the last one fits burst and rate."""
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    start = clock.now
    served = 0
    for size in sizes:
        while delay := bucket.delay():
            clock.now += delay
        assert served <= burst + rate * (clock.now - start) + 1e-3
        bucket.charge(size)
        served += size


def test_both_limits_hold() -> None:
    """The scarcer of bytes and operations decides."""
    clock = Clock()
    limit = RateLimit(bytes_per_s=1000, ops_per_s=2, clock=clock)
    assert limit.delay() == 0
    limit.charge(1)
    limit.charge(1)
    assert limit.delay() == pytest.approx(0.5)
    clock.now += 1
    assert limit.delay() == 0
    limit.charge(2000)
    assert limit.delay() == pytest.approx(1.001)


class Sink(VirtioDevice):
    """Swallows requests under a limit of one operation a second."""

    device_id = 0x30
    queue_sizes = (64, 64)

    def __init__(self, clock: Clock) -> None:
        self.served: list[int] = []
        self.limit = RateLimit(ops_per_s=1, clock=clock)

    def bind(self, transport: object) -> None:
        """Use the test's timers."""
        super().bind(transport)  # type: ignore[arg-type]
        clock = self.limit._ops._clock  # type: ignore[union-attr]
        self.throttle = Throttle(self.limit, clock.call_later, self.transport.notify)  # type: ignore[attr-defined]

    def on_request(self, queue: Virtqueue, chain: Chain) -> int | None:
        """Count it."""
        self.served.append(queue.index)
        return 0


def test_a_throttled_device_waits_on_a_timer(drive: Drive) -> None:
    """Requests over the limit stay in the ring, the thread is free, and a timer serves every queue that waits."""
    clock = Clock()
    device = Sink(clock)
    driver = drive(device)
    first, second = driver.start()
    for queue in (first, first, second):
        queue.add([b"x"])
    first.kick()
    second.kick()
    assert device.served == [0]
    for _ in range(4):
        if clock.timers:
            clock.advance()
            driver.io.run()
    assert device.served == [0, 0, 1]
    assert len(first.used()) == 2 and len(second.used()) == 1


def test_reset_forgets_who_waits(drive: Drive) -> None:
    """After a reset the timer serves nothing, and the debt is still to be paid."""
    clock = Clock()
    device = Sink(clock)
    driver = drive(device)
    (queue, _) = driver.start()
    for _ in range(2):
        queue.add([b"x"])
    queue.kick()
    driver.write(0x70, 0)
    while clock.timers:
        clock.advance()
        driver.io.run()
    assert device.served == [0]


@pytest.mark.parametrize(
    "words", [{"rate": "0"}, {"iops": "-1"}, {"burst": "1M"}, {"rate": "quick"}, {"rate": "1M", "burst": "0"}]
)
def test_impossible_limits_are_refused(words: dict[str, str]) -> None:
    """Nonsense is a ConfigError, not no limit."""
    with pytest.raises(ConfigError):
        parse_rate(words)


def test_words_of_a_spec() -> None:
    """rate, iops and burst make a limit; none of them none."""
    assert parse_rate({"ro": ""}) is None
    limit = parse_rate({"rate": "10M", "iops": "100", "burst": "1M"})
    assert limit is not None and limit._bytes is not None and limit._ops is not None
    assert (limit._bytes.rate, limit._bytes.burst, limit._ops.rate) == (10 << 20, 1 << 20, 100)


@pytest.mark.parametrize("options", [{}, {"bytes_per_s": 1000}, {"ops_per_s": 5, "bytes_per_s": 9, "burst_bytes": 100}])
def test_a_limit_in_a_file(options: dict[str, int]) -> None:
    """What a snapshot file says of a limit makes the same one again, which owes nothing."""
    limit = RateLimit(**options)  # type: ignore[arg-type]
    limit.charge(1 << 20)
    for other in (limit_of(numbers_of(limit)), limit.again()):
        assert other is not None
        assert other.options == {"bytes_per_s": 0, "ops_per_s": 0, "burst_bytes": None} | options
        assert other.delay() == 0
    assert numbers_of(None) == [] and limit_of([]) is None
