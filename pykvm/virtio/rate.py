"""Rate limits: token buckets for bytes and for operations, and the wait of a device that ran dry. Layer: virtio.

    limit = RateLimit(bytes_per_s=10 << 20, ops_per_s=1000)
    delay = limit.delay()         # seconds until the next request may start; 0.0: now
    limit.charge(size)            # after it was started

A request may start as soon as no bucket is in debt, and is then paid for in full, in debt if need be: a request larger
than the burst is served, and the next one waits for it. In the long run the rates hold exactly.
"""

from __future__ import annotations

from time import monotonic

from pykvm.config import parse_int, parse_size
from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pykvm.core.iothread import Timer

RATE_KEYS = ("rate", "iops", "burst")  # the words of a device's SPEC: bytes/s, operations/s, bytes saved up at most


class TokenBucket:
    """`rate` tokens a second flow in, `burst` of them at most are saved up (default: a second's worth)."""

    __slots__ = ("_clock", "_then", "_tokens", "burst", "rate")

    def __init__(self, rate: int, burst: int | None = None, clock: Callable[[], float] = monotonic) -> None:
        if rate <= 0 or (burst is not None and burst <= 0):
            raise ValueError("a token bucket needs a positive rate and burst")
        self.rate = rate
        self.burst = float(rate if burst is None else burst)
        self._clock = clock
        self._tokens = self.burst
        self._then = clock()

    def delay(self) -> float:
        """Seconds until the bucket is out of debt; 0.0 now."""
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + (now - self._then) * self.rate)
        self._then = now
        return 0.0 if self._tokens > 0 else (1 - self._tokens) / self.rate

    def charge(self, tokens: int) -> None:
        """Take `tokens` out, into debt if there are fewer."""
        self._tokens -= tokens


class RateLimit:
    """Bytes a second and operations a second; 0 is no limit. A limit may be shared by several queues of a device."""

    def __init__(
        self,
        *,
        bytes_per_s: int = 0,
        ops_per_s: int = 0,
        burst_bytes: int | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.options: dict[str, int | None] = {
            "bytes_per_s": bytes_per_s,
            "ops_per_s": ops_per_s,
            "burst_bytes": burst_bytes,
        }
        self._bytes = TokenBucket(bytes_per_s, burst_bytes, clock) if bytes_per_s else None
        self._ops = TokenBucket(ops_per_s, None, clock) if ops_per_s else None

    def again(self) -> RateLimit:
        """The same limit for another device, which pays for itself."""
        return RateLimit(**self.options)  # type: ignore[arg-type]

    def delay(self) -> float:
        """Seconds until the next request may start; 0.0 now."""
        waits = [bucket.delay() for bucket in (self._bytes, self._ops) if bucket is not None]
        return max(waits, default=0.0)

    def charge(self, size: int, operations: int = 1) -> None:
        """Pay for requests of `size` bytes together."""
        if self._bytes is not None:
            self._bytes.charge(size)
        if self._ops is not None:
            self._ops.charge(operations)


def numbers_of(limit: RateLimit | None) -> list[int]:
    """[bytes a second, operations a second, burst in bytes] for a snapshot file, 0 for none; [] without a limit."""
    return [] if limit is None else [number or 0 for number in limit.options.values()]


def limit_of(numbers: list[int]) -> RateLimit | None:
    """What `numbers_of` described."""
    if not numbers:
        return None
    rate, operations, burst = numbers
    return RateLimit(bytes_per_s=rate, ops_per_s=operations, burst_bytes=burst or None)


class Throttle:
    """A device's rate limit on the I/O thread: queues that have to wait are named to `resume` when it is time.

    if not throttle.ready(queue.index):
        return                      # `resume(queue.index)` is called by a timer
    ...
    throttle.charge(size)
    """

    def __init__(
        self,
        limit: RateLimit,
        call_later: Callable[[float, Callable[[], None]], Timer],
        resume: Callable[[int], object],
    ) -> None:
        self.limit = limit
        self.charge = limit.charge
        self._call_later = call_later
        self._resume = resume
        self._waiting: set[int] = set()
        self._timer: Timer | None = None

    def ready(self, queue: int) -> bool:
        """Whether a request of this queue may start now; if not, `resume` is called with it later."""
        delay = self.limit.delay()
        if not delay:
            return True
        self._waiting.add(queue)
        if self._timer is None:
            self._timer = self._call_later(delay, self._expired)
        return False

    def reset(self) -> None:
        """Forget who waits; debts stay, or resetting the device would be a way around them."""
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        self._timer = None
        waiting, self._waiting = self._waiting, set()
        for queue in sorted(waiting):
            self._resume(queue)


def parse_rate(words: Mapping[str, str]) -> RateLimit | None:
    """The limit that `rate=10M,iops=1000,burst=1M` ask for, None without any. Raises ConfigError."""
    if "burst" in words and "rate" not in words:
        raise ConfigError("burst", "is the burst of rate=, which is not given")
    values = {}
    for key in RATE_KEYS:
        if key in words:
            values[key] = parse_int(words[key], key) if key == "iops" else parse_size(words[key], key)
            if values[key] <= 0:
                raise ConfigError(key, f"{words[key]} is not positive")
    if not values:
        return None
    return RateLimit(
        bytes_per_s=values.get("rate", 0), ops_per_s=values.get("iops", 0), burst_bytes=values.get("burst")
    )
