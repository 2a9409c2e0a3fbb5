"""Runs commands in alternation and keeps what they took. Knows nothing of pykvm."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import time
from dataclasses import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import FrameType

OUTPUT_LIMIT = 65536  # what a pipe holds: the commands measured here print less


class BenchError(Exception):
    """A candidate did not do what it should: the message names it and its output."""


class Series:
    """Measured values in the order of the rounds; the unit is the owner's."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = list(values)

    @property
    def median(self) -> float:
        """Half the values are below it."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The interquartile range."""
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    @property
    def extremes(self) -> tuple[float, float]:
        """Least and greatest value."""
        return min(self.values), max(self.values)

    def over(self, other: Series) -> Series:
        """The ratio to another series, round by round."""
        return Series([a / b for a, b in zip(self.values, other.values, strict=True)])

    def minus(self, other: Series) -> Series:
        """The difference to another series, round by round."""
        return Series([a - b for a, b in zip(self.values, other.values, strict=True)])

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return {
            "median": self.median,
            "q1": self.quartiles[0],
            "q3": self.quartiles[1],
            "min": self.extremes[0],
            "max": self.extremes[1],
            "values": self.values,
        }


@dataclass
class Candidate:
    """One of the compared things: its name, its exact command, what it must exit with and print."""

    name: str
    command: list[str]
    status: int = 0
    prints: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """One process, from posix_spawn to the end of wait4."""

    wall_s: float
    cpu_s: float  # user and system time of the process and of the children it waited for, the guest's included
    status: int
    output: str
    errors: str


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The same small environment for every candidate: no PYTHONDONTWRITEBYTECODE and the like."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ} | dict(extra)


def _too_late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError


def spawn(candidate: Candidate, timeout_s: float = 60) -> Run:
    """Run the command to its end, with /dev/null as stdin; BenchError unless it does what it should."""
    environment = clean_environment(candidate.environment)
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, out_end, 1),
        (os.POSIX_SPAWN_DUP2, err_end, 2),
    ]
    previous = signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    started = time.perf_counter()
    pid = os.posix_spawnp(candidate.command[0], candidate.command, environment, file_actions=actions)
    try:
        _, wait_status, usage = os.wait4(pid, 0)
        wall = time.perf_counter() - started
    except BaseException as error:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if isinstance(error, TimeoutError):
            raise BenchError(f"{candidate.name}: not done after {timeout_s:g} s") from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        os.close(out_end)
        os.close(err_end)
        output, errors = _take(out), _take(err)
    run = Run(wall, usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(wait_status), output, errors)
    if run.status != candidate.status or candidate.prints not in output:
        said = f"{output[-300:]!r}, {errors[-600:]!r}"
        raise BenchError(f"{candidate.name}: exit status {run.status}, expected {candidate.status}; it said {said}")
    return run


def _take(fd: int) -> str:
    with open(fd, "rb") as stream:
        return stream.read(OUTPUT_LIMIT).decode(errors="replace")


def alternate(
    candidates: Sequence[Candidate],
    rounds: int,
    once: Callable[[Candidate], Mapping[str, float]],
    say: Callable[[str], object],
) -> dict[str, dict[str, Series]]:
    """A B C A B C ...: for each candidate the series of each quantity that `once` gives."""
    taken: dict[str, dict[str, list[float]]] = {candidate.name: {} for candidate in candidates}
    for number in range(1, rounds + 1):
        for candidate in candidates:
            found = once(candidate)
            for quantity, value in found.items():
                taken[candidate.name].setdefault(quantity, []).append(value)
            say(f"round {number} of {rounds}: {candidate.name} {next(iter(found.values())):.2f}")
    return {name: {key: Series(values) for key, values in kinds.items()} for name, kinds in taken.items()}


def able(
    candidates: Sequence[Candidate], once: Callable[[Candidate], object]
) -> tuple[list[Candidate], dict[str, str]]:
    """Try each candidate once, unmeasured, which also warms the page cache: those that work, and why others do not."""
    good, skipped = [], {}
    for candidate in candidates:
        try:
            if not shutil.which(candidate.command[0]):
                raise BenchError(f"{candidate.command[0]} is not installed")
            once(candidate)
        except BenchError as error:
            skipped[candidate.name] = str(error).removeprefix(f"{candidate.name}: ")
        else:
            good.append(candidate)
    return good, skipped
