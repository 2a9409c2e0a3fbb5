"""`pykvm trace attach PID` and `pykvm trace -- COMMAND`: follow any process that uses KVM. Layer: cli."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pykvm.cli.options import Option, Parser
from pykvm.config import parse_float
from pykvm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pykvm.debug.kvmtrace.follower import Follower
    from pykvm.debug.kvmtrace.tracer import Tracer


def _seconds(text: str) -> float:
    value = parse_float(text)
    if not 0 < value < 1e9:
        raise ConfigError("timeout", f"{text!r} is no number of seconds")
    return value


PARSER = Parser(
    "pykvm trace [OPTION...] attach PID | pykvm trace [OPTION...] -- COMMAND [ARGUMENT...]",
    "Follow a process that uses KVM, with its threads and children: each ioctl decoded, each exit of its vCPUs.",
    (
        Option("--summary", "", "the sums at the end alone, not a line for each ioctl"),
        Option("--no-run", "", "no lines for KVM_RUN; it is counted all the same"),
        Option("--output", "FILE", "write lines and sums there instead of to stderr"),
        Option("--json", "", "the sums as JSON"),
        Option("--timeout", "S", "after S seconds let go of PID, or end COMMAND", convert=_seconds),
    ),
    positionals=2,
    epilog=(
        "Ctrl-C lets go of PID, which runs on unharmed. COMMAND's exit status is the command's own.\n"
        "Following costs two stops of the thread for every system call: a VMM gets much slower."
    ),
)


def run(argv: list[str]) -> int:
    """Follow; the exit status."""
    before, command = argv, []
    if "--" in argv:
        at = argv.index("--")
        before, command = argv[:at], argv[at + 1 :]
    values, rest = PARSER.parse(before)
    pid = _target(rest, command, separated="--" in argv)
    from pykvm.debug.kvmtrace.follower import Follower
    from pykvm.debug.kvmtrace.tracer import Tracer

    with _output(values["output"]) as out:
        say = None if values["summary"] or values["json"] else lambda line: print(line, file=out)
        follower = Follower(say, runs=not values["no_run"])
        try:
            tracer = Tracer(follower.on_syscall, follower.on_exec)
            status = _follow(tracer, pid, command, values["timeout"])
        finally:
            follower.close()
        _tell(follower, out, values)
    return status


def _target(rest: list[str], command: list[str], *, separated: bool) -> int:
    if separated:
        if rest or not command:
            raise UsageError(f"usage: {PARSER.usage}")
        return 0
    if len(rest) != 2 or rest[0] != "attach":
        raise UsageError(
            f"trace: {' '.join(rest) or 'nothing'!r} is none of show, stats, export, attach PID, -- COMMAND"
        )
    if not rest[1].isascii() or not rest[1].isdigit() or not 0 < int(rest[1]) < 1 << 31:
        raise UsageError(f"attach: {rest[1]!r} is no process id")
    return int(rest[1])


@contextmanager
def _output(path: str | None) -> Iterator[Any]:
    if path is None:
        yield sys.stderr
        return
    try:
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UsageError(f"--output: {path}: {error.strerror}") from None
    with file:
        yield file


def _follow(tracer: Tracer, pid: int, command: list[str], timeout: float | None) -> int:
    def stop(number: int, frame: object) -> None:
        if number != signal.SIGINT or not command:  # a terminal sends Ctrl-C to the command as well
            tracer.stop()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, stop)
    if command:
        tracer.launch(command)
    else:
        tracer.attach(pid)
    if timeout is not None:
        signal.setitimer(signal.ITIMER_REAL, timeout, 5)  # again, for a command that does not heed SIGTERM
    try:
        return tracer.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _tell(follower: Follower, out: Any, values: dict[str, Any]) -> None:
    from pykvm.debug.kvmtrace.follower import summary_dict, summary_text

    if values["json"]:
        import json

        print(json.dumps(summary_dict(follower), indent=2), file=sys.stdout if values["output"] is None else out)
    else:
        print(summary_text(follower), end="", file=out)
