"""`pykvm run`: a command in a virtual machine that has this host's own root, read-only, under an overlay. Layer: cli.

The command's streams and its exit status go over ports of a virtio console, byte for byte; the kernel's messages stay
on the serial console and are shown when the machine ends before the command does.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep

from pykvm import log
from pykvm.board import Pc
from pykvm.cli.consoleport import Outlet, open_output
from pykvm.cli.options import HelpWanted, Option, Parser
from pykvm.cli.start import SIGNAL_LAG_S, Signals
from pykvm.cli.terminal import Input, say
from pykvm.config import BootConfig, MachineConfig, parse_int, parse_seconds
from pykvm.core.device import ClosedOnFailure
from pykvm.errors import UsageError
from pykvm.kernels.find import Kernel, find_kernel, named_kernel
from pykvm.kernels.initramfs import MODULES, build_initramfs, command_script, shares_script
from pykvm.virtio.console import Console, ConsolePort
from pykvm.virtio.share import Share

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pykvm.core.outcome import Outcome
    from pykvm.virtio.device import VirtioDevice

EXIT_CRASHED, EXIT_TIMEOUT = 6, 124
MAX_CPUS = 4  # by default
DRAIN_S = 0.01
TAIL_LINES = 25
PASSED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TERM", "PYTHONPATH", "VIRTUAL_ENV")
CMDLINE = "console=ttyS0 panic=-1 random.trust_cpu=on"


OPTIONS = (
    Option("--kernel", "FILE", "bzImage or vmlinux (default: the newest of this host, else Debian's, downloaded)"),
    Option("--modules", "DIR", "its modules: lib/modules/VERSION (default: found by the kernel's version)"),
    Option("--mem", "SIZE", "RAM, also for what the command writes (default 1G)", default="1G"),
    Option("--cpus", "N", f"vCPUs (default: this host's, at most {MAX_CPUS})", convert=lambda t: parse_int(t, "cpus")),
    Option("--share", "DIR[,ro]", "a folder that the command may change, at the same path; repeatable", many=True),
    Option("--env", "NAME[=VALUE]", "pass an environment variable; repeatable", many=True),
    Option("--append", "STR", "more for the kernel's command line", default=""),
    Option("--disk", "FILE[,...]", "a disk, as for pykvm start; repeatable", many=True),
    Option("--net", "KIND[,...]", "a network, as for pykvm start; repeatable", many=True),
    Option("--timeout", "S", "end after S seconds with status 124", convert=parse_seconds),
    Option("--verbose", "", "show the kernel's messages on stderr"),
)

PARSER = Parser(
    "pykvm run [OPTION...] -- COMMAND [ARGUMENT...]",
    "Run COMMAND as root of a virtual machine that has this host's files: it sees the current folder as it is here;\n"
    "what it writes outside of shared folders is lost with the machine. stdin is passed unless it is a terminal.",
    OPTIONS,
    positionals=0,
    epilog=(
        "Exit status: COMMAND's; 2 wrong usage; 4 this host cannot run it; 6 the machine ended before COMMAND did;\n"
        "124 timeout; 128 + N ended by signal N."
    ),
)


def run(argv: list[str]) -> int:
    """Boot, run, stream; the command's exit status."""
    options, command = argv, []
    if "--" in argv:
        options, command = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    try:
        values, _ = PARSER.parse(options)
    except HelpWanted as wanted:
        print(wanted)
        return 0
    if not command:
        raise UsageError(f"no command given; usage: {PARSER.usage}")
    signals = Signals()
    kernel = _kernel(values)
    streams = Streams()
    with tempfile.TemporaryDirectory(prefix="pykvm-run-") as folder:
        initrd = os.path.join(folder, "initrd")
        devices = _devices(values, streams)
        with ClosedOnFailure(devices):
            _write_initrd(Path(initrd), kernel, command, values, devices, streams)
            boot = BootConfig(str(kernel.image), initrd=initrd, cmdline=_cmdline(values))
            config = MachineConfig(memory=values["mem"], cpus=values["cpus"] or _cpus())
        with Pc(boot, config, devices=devices) as pc:
            return _session(pc, streams, values, signals)


def _kernel(values: dict[str, Any]) -> Kernel:
    if values["kernel"] is None:
        if values["modules"] is not None:
            raise UsageError("--modules belongs to a kernel: give it with --kernel FILE")
        return find_kernel(MODULES)
    return named_kernel(Path(values["kernel"]), Path(values["modules"]) if values["modules"] else None)


def _cpus() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_CPUS)


def _cmdline(values: dict[str, Any]) -> str:
    return " ".join(filter(None, (CMDLINE, "" if values["verbose"] else "quiet", values["append"])))


def _devices(values: dict[str, Any], streams: Streams) -> list[VirtioDevice]:
    from pykvm.cli.devices import make_devices

    shares: list[VirtioDevice] = []
    with ClosedOnFailure(shares):
        shares.append(Share("/", tag="root", readonly=True))
        for index, text in enumerate(values["share"]):
            path, comma, word = text.rpartition(",")
            if word != "ro" or not comma:
                path, word = text, ""
            shares.append(Share(path, tag=f"share{index}", readonly=word == "ro"))
        others = make_devices({"disk": values["disk"], "net": values["net"]})
    return [Console(streams.ports), *shares, *others]


def _write_initrd(
    path: Path,
    kernel: Kernel,
    command: Sequence[str],
    values: dict[str, Any],
    devices: Sequence[VirtioDevice],
    streams: Streams,
) -> None:
    environment = {name: os.environ[name] for name in PASSED if name in os.environ}
    for item in values["env"]:
        name, equals, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"--env: {name!r} is no name of a variable")
        environment[name] = value if equals else os.environ.get(name, "")
    shares = [each for each in devices if isinstance(each, Share) and each.tag != "root"]
    script = command_script(command, os.getcwd(), environment, stdin=streams.stdin)
    mounts = shares_script([(share.tag, share.path, share.readonly) for share in shares])
    path.write_bytes(build_initramfs(kernel, script, mounts))


class Streams:
    """The ports of the console, and where they end here."""

    def __init__(self) -> None:
        self.stdin = not os.isatty(0)
        self.status: int | None = None
        self._said = b""
        self._stop_soon: Callable[[], object] = lambda: None
        self.ports = [ConsolePort(f"pykvm.{name}") for name in ("out", "err", "in", "status")]
        self._outlets: list[Outlet] = []
        self._fds: list[int] = []
        self._input: Input | None = None

    def connect(self, pc: Pc) -> None:
        """Before the machine starts."""
        out, err, source, status = self.ports
        self._stop_soon = lambda: pc.io.call_soon(pc.stop_soon)  # not from inside a sink, under the device's lock
        status.sink = self._on_status
        for port, fd in ((out, 1), (err, 2)):
            self._fds.append(open_output(fd))
            outlet = Outlet(pc.io, self._fds[-1], port)
            outlet.on_broken = self._stop_soon
            port.sink = outlet.write
            self._outlets.append(outlet)
        if self.stdin:
            self._input = Input(pc.io, 0, source.receive)
            source.on_rx_space = self._input.more
            self._input.on_end = lambda: source.connect(False)

    def _on_status(self, data: bytes) -> None:
        """ "exit N" of the guest's init, on the I/O thread."""
        self._said = (self._said + data)[-64:]
        found = re.match(rb"exit (\d{1,3})\n", self._said)
        if found and self.status is None:
            self.status = int(found.group(1))
            self._stop_soon()

    def drained(self) -> bool:
        """Whether all that the guest wrote is out."""
        return all(port.drained for port in self.ports[:2]) or any(outlet.error for outlet in self._outlets)

    def hurry(self) -> None:
        """Do not wait for a reader that stalls."""
        for outlet in self._outlets:
            outlet.closing = True

    def close(self) -> None:
        """Undo `connect`."""
        if self._input is not None:
            self._input.stop()
        for outlet in self._outlets:
            outlet.close()
        for fd in self._fds:
            os.close(fd)

    def check(self) -> None:
        """Raise the OSError that kept output from being written, if one did."""
        for outlet in self._outlets:
            if outlet.error is not None:
                raise outlet.error


def _session(pc: Pc, streams: Streams, values: dict[str, Any], signals: Signals) -> int:
    if values["verbose"]:
        pc.console.sink = lambda data: os.write(2, data)

    def stop() -> None:
        streams.hurry()
        pc.stop_soon()

    signals.watch(stop)
    streams.connect(pc)
    try:
        pc.start()
        if signals.number:
            stop()
        outcome = _wait(pc, streams, values["timeout"], signals)
    finally:
        pc.stop()
        streams.close()
    if signals.number:
        return 128 + signals.number
    streams.check()
    if streams.status is not None:
        return streams.status
    return _explain(pc, outcome, values)


def _wait(pc: Pc, streams: Streams, timeout: float | None, signals: Signals) -> Outcome | None:
    """Until the machine has ended (as it does when the command has) and its output is out; None at the timeout."""
    end = float("inf") if timeout is None else monotonic() + timeout
    outcome = None
    while outcome is None and (left := end - monotonic()) > 0:
        outcome = pc.wait(min(left, SIGNAL_LAG_S))
    while outcome is not None and not streams.drained() and monotonic() < end and not signals.number:
        sleep(DRAIN_S)  # our reader is slow
    return outcome


def _explain(pc: Pc, outcome: Outcome | None, values: dict[str, Any]) -> int:
    """Why there is no exit status: the machine's end and the kernel's last words."""
    if outcome is None:
        say(f"the command was still running after {values['timeout']:g} s")
        return EXIT_TIMEOUT
    if outcome.report is not None:
        print(outcome.report.text(), file=sys.stderr)
    text = pc.console.text
    panic = re.search(r"Kernel panic - not syncing: [^\r\n]*", text)
    if not values["verbose"]:
        tail = "\n".join(text.replace("\r", "").splitlines()[-TAIL_LINES:])
        print(tail, file=sys.stderr)
    say(f"the machine ended before the command did: {panic.group(0) if panic else outcome.kind}")
    log.debug("pykvm run ended without a status", outcome=outcome.kind)
    return EXIT_CRASHED
