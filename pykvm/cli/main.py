"""The `pykvm` command: a table of commands, and the one place that turns exceptions into exit statuses. Layer: cli.

Exit status: the command's own; 2 wrong usage, 4 this host cannot do it, 6 the guest crashed, 124 timeout.
"""

from __future__ import annotations

import os
import sys
from errno import EMFILE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# name -> (module with run(argv) -> int, what it does)
COMMANDS = {
    "start": ("pykvm.cli.start", "boot a kernel or firmware, its console on this terminal"),
    "run": ("pykvm.cli.run", "run a command in a virtual machine with this host's files"),
    "trace": ("pykvm.cli.trace", "show a trace of exits, or follow any process that uses KVM"),
    "profile": ("pykvm.cli.profile", "boot a kernel and sample where it spends its time"),
    "top": ("pykvm.cli.top", "show the machines of this host at work"),
    "restore": ("pykvm.cli.restore", "go on with a machine that was saved"),
    "doctor": ("pykvm.cli.doctor", "say what this host can do, and what to do about what is missing"),
    "version": ("pykvm.cli.version", "print the versions of pykvm, of its KVM header and of this host's KVM"),
}

EXIT_USAGE, EXIT_HOST, EXIT_BROKEN_PIPE = 2, 4, 141


def usage() -> str:
    """The overview that `pykvm --help` prints."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: pykvm COMMAND [OPTION...]\n\ncommands:\n{rows}\n\n`pykvm COMMAND --help` says more."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else EXIT_USAGE
    name = "version" if arguments[0] == "--version" else arguments[0]
    if name not in COMMANDS:
        complain(f"unknown command {name!r}; the commands are {', '.join(COMMANDS)}")
        return EXIT_USAGE
    return _run(COMMANDS[name][0], arguments[1:])


def _run(module: str, arguments: list[str]) -> int:
    from importlib import import_module

    from pykvm.errors import PykvmError, UsageError

    try:
        status: int = import_module(module).run(arguments)
        sys.stdout.flush()
        return status
    except UsageError as error:
        complain(str(error))
        return EXIT_USAGE
    except PykvmError as error:
        complain(str(error))
        return EXIT_HOST
    except BrokenPipeError:
        # the reader of our output has gone: as any filter, end quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        # out of file descriptors or threads, a full disk under our output
        if error.errno == EMFILE:  # whose file it was says nothing: it may be a module of ours
            complain("too many open files: ulimit -n shows how many may be, ulimit -n 1024 raises that")
        else:
            complain(f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror}")
        return EXIT_HOST


def complain(text: str) -> None:
    """One line on stderr, whatever is in the file names that it quotes: no line breaks, no escape sequences."""
    safe = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    print(f"pykvm: {safe}", file=sys.stderr)


def entry() -> None:
    """The console script: exits without the interpreter's finalisation, which would cost milliseconds for nothing."""
    open_standard_streams()
    try:
        status = main()
    except SystemExit as leave:  # argparse of a lesser command
        status = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except KeyboardInterrupt:
        status = 130
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            status = EXIT_BROKEN_PIPE
        except OSError:
            status = status or EXIT_HOST
    os._exit(status)


def open_standard_streams() -> None:
    """Open descriptors 0 to 2 where the caller closed them: else the next file gets the number, and the console."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for the process's life
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    entry()
