"""gdb's `monitor` commands. Layer: debug."""

from __future__ import annotations

from pykvm.debug.decode import ExitFacts
from pykvm.debug.report import build_report
from pykvm.debug.stats import collect_stats
from pykvm.errors import PykvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.debug.gdbstub.session import Session

    Command = Callable[[Session, list[str]], str]

DEFAULT_NAME = "1"
MAX_SNAPSHOTS = 16  # each may hold all of the guest's memory


def run_command(session: Session, line: str) -> str:
    """What `monitor LINE` prints; errors are text as well."""
    words = line.split()
    name = words[0] if words else "help"
    command = COMMANDS.get(name)
    if command is None:
        return f"pykvm has no monitor command {name!r}: monitor help\n"
    try:
        return command(session, words[1:]).rstrip("\n") + "\n"
    except (PykvmError, ValueError, IndexError) as problem:
        return f"{name}: {problem}\n"


def show_help(session: Session, words: list[str]) -> str:
    """what there is"""
    width = max(map(len, USAGE.values()))
    return "\n".join(f"{USAGE[name]:{width}}  {command.__doc__}" for name, command in COMMANDS.items())


def show_exits(session: Session, words: list[str]) -> str:
    """exits by reason, and with --stats by address"""
    return collect_stats(session.machine).text()


def show_registers(session: Session, words: list[str]) -> str:
    """registers, segments, code and stack of the current thread's vCPU"""
    vcpu = session.current
    report = build_report("STOPPED", ExitFacts("DEBUG"), vcpu.capture_state(), session.machine.memory, vcpu=vcpu.index)
    report.advice = []
    _, _, rest = report.text().partition("\n")  # without the headline, which is a crash's
    return f"vCPU {vcpu.index}\n{rest.partition(chr(10))[2]}"


def show_backtrace(session: Session, words: list[str]) -> str:
    """the current thread's stack by frame pointers, with the symbols of the kernel that was booted"""
    return "\n".join(map(repr, session.machine.backtrace(session.current.index)))


def show_walk(session: Session, words: list[str]) -> str:
    """the page walk of a linear address, as the current thread's vCPU would do it"""
    if len(words) != 1:
        return "monitor walk ADDRESS"
    return "\n".join(session.control.debugger.translate(session.current, int(words[0], 0)).lines())


def show_support(session: Session, words: list[str]) -> str:
    """what this host's KVM can do for a debugger"""
    return "\n".join(session.control.debugger.support.lines())


def set_arch(session: Session, words: list[str]) -> str:
    """16, 32 or 64: what gdb is told when it connects the next time"""
    if not words:
        return f"gdb was told {session.layout.bits} bits"
    if words[0] not in ("16", "32", "64", "auto"):
        return "monitor arch 16|32|64|auto"
    session.arch = words[0]
    return "now: disconnect, then connect again"


def save(session: Session, words: list[str]) -> str:
    """keep the machine's state under a name, in memory"""
    kept = session.control.snapshots
    name = words[0] if words else DEFAULT_NAME
    if len(kept) >= MAX_SNAPSHOTS and name not in kept:
        return f"there are {MAX_SNAPSHOTS} already: take one of their names ({', '.join(kept)})"
    kept[name] = session.machine.snapshot()
    return f"snapshot {name}: done"


def restore(session: Session, words: list[str]) -> str:
    """put the machine back into a kept state"""
    kept = session.control.snapshots
    name = words[0] if words else DEFAULT_NAME
    if name not in kept:
        return f"no snapshot {name!r}; there are: {', '.join(kept) or 'none'}"
    session.machine.restore(kept[name])
    session.machine.start()  # it is held: nothing runs before gdb says so
    return f"restore {name}: done; now: maintenance flush register-cache"


COMMANDS: dict[str, Command] = {
    "help": show_help,
    "exits": show_exits,
    "regs": show_registers,
    "backtrace": show_backtrace,
    "walk": show_walk,
    "support": show_support,
    "arch": set_arch,
    "snapshot": save,
    "restore": restore,
}
USAGE = {
    **{name: name for name in COMMANDS},
    "walk": "walk ADDRESS",
    "arch": "arch BITS",
    "snapshot": "snapshot [NAME]",
    "restore": "restore [NAME]",
}
