"""`pykvm restore`: go on with a machine that was saved. Layer: cli."""

from __future__ import annotations

from pykvm import log
from pykvm.cli.options import HelpWanted, Option, Parser
from pykvm.cli.start import OPTIONS as START_OPTIONS
from pykvm.cli.start import Signals, run_session, serial_plan
from pykvm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.virtio.netbackend import NetBackend

_SHARED = (
    "--serial",
    "--save",
    "--gdb",
    "--gdb-wait",
    "--gdb-arch",
    "--timeout",
    "--json",
    "--log-level",
    "--log-json",
)


def _place(text: str) -> str:
    return "" if text == "none" else text


OPTIONS = (
    Option("--lazy", "", "do not read memory to check it: starts at once, and damage goes unnoticed"),
    Option("--parent", "FILE", "what a differential snapshot is relative to, if not beside it under its old name"),
    Option(
        "--console",
        "WHERE[,port=NAME]",
        "where the next virtio console or a named port ends, instead of where it did (any of them: the rest nowhere)",
        many=True,
    ),
    Option(
        "--net",
        "KIND[,...]",
        "what the next network is plugged into instead of what it was: user[,hostfwd=..], tap[,ifname=..] or none",
        many=True,
    ),
    Option("--vsock", "PATH", "where the vsock listens instead of at its old path; none for nowhere", convert=_place),
    *(option for option in START_OPTIONS if option.name in _SHARED),
)

PARSER = Parser(
    "pykvm restore [OPTION...] FILE",
    "Go on with the machine that `pykvm start --save` or Machine.save() wrote to FILE. FILE is only read.\n"
    "What its devices were connected to on this host is opened again: sockets, consoles, networks, disks.",
    OPTIONS,
    positionals=1,
    epilog="Keys and exit status are those of `pykvm start`.",
)


def _backends(texts: list[str]) -> list[NetBackend | None]:
    if not texts:
        return []
    from pykvm.cli.devices import parse_net_backend

    backends: list[NetBackend | None] = []
    try:
        for text in texts:
            backends.append(parse_net_backend(text))
    except BaseException:
        for backend in backends:
            if backend is not None:
                backend.close()
        raise
    return backends


def run(argv: list[str]) -> int:
    """Restore, wait, report; the exit status."""
    try:
        values, rest = PARSER.parse(argv)
    except HelpWanted as wanted:
        print(wanted)
        return 0
    if not rest:
        raise UsageError(f"name a snapshot file; usage: {PARSER.usage}")
    log.configure(values["log_level"], json=values["log_json"])
    if values["gdb"] is None and (values["gdb_wait"] or values["gdb_arch"]):
        raise UsageError("--gdb-wait and --gdb-arch need --gdb WHERE")
    everything = {option.key: [] if option.many else option.default for option in START_OPTIONS} | values
    from pykvm.board import Pc
    from pykvm.cli.consoleport import hold_output, replace_ends
    from pykvm.control.restore import restore_file

    signals = Signals()
    with restore_file(
        rest[0],
        lazy=bool(values["lazy"]),
        parent=values["parent"],
        attach=hold_output,
        net=_backends(values["net"]),
        vsock=values["vsock"],
    ) as machine:
        if not isinstance(machine, Pc):
            raise UsageError(f"{rest[0]}: is a bare Machine; restore it from Python, by pykvm.restore_file")
        if machine.virtio:
            everything["console"] = replace_ends(machine, values["console"])
        elif values["console"]:
            raise UsageError("--console: the machine was saved without a virtio console")
        plan = serial_plan(values["serial"], capture=values["json"], taken="stdio" in everything["console"])
        if len(plan) > len(machine.serial):
            raise UsageError(f"--serial: the machine was saved with {len(machine.serial)} serial ports")
        return run_session(machine, plan, everything, signals)
