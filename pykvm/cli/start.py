"""`pykvm start`: boot a kernel or firmware with its console on this terminal. Layer: cli."""

from __future__ import annotations

import sys

# `signal` itself would import enum
from _signal import (  # type: ignore[import-not-found]
    SIG_DFL,
    SIG_IGN,
    SIGHUP,
    SIGINT,
    SIGTERM,
    default_int_handler,
    getsignal,
    signal,
)
from time import monotonic

from pykvm import log
from pykvm.cli.options import HelpWanted, Option, Parser
from pykvm.cli.serialport import open_serial
from pykvm.cli.terminal import RawMode, say
from pykvm.config import BootConfig, MachineConfig, parse_int, parse_seconds
from pykvm.errors import ConfigError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType
    from typing import Any, Protocol

    from pykvm.board import Pc
    from pykvm.cli.saving import Saver
    from pykvm.cli.serialport import SerialPort
    from pykvm.core.outcome import Outcome
    from pykvm.virtio.device import VirtioDevice

    class Observer(Protocol):
        """What watches a run from its start to its end."""

        def close(self) -> object: ...
        def text(self) -> str: ...


def _count(text: str) -> int:
    return parse_int(text, "cpus")


def _address(text: str) -> int:
    value = parse_int(text, "address")
    if not 0 <= value < 1 << 64:
        raise ConfigError("address", f"{text} is not a 64-bit address")
    return value


def _module(text: str) -> tuple[str, str]:
    path, _, arguments = text.partition(":")
    return path, arguments


def _level(text: str) -> str:
    if text not in log.LEVELS:
        raise ConfigError("log-level", f"{text!r} is none of {', '.join(log.LEVELS)}")
    return text


OPTIONS = (
    Option("--mem", "SIZE", "RAM: 512M, 2G (default 128M)", default="128M"),
    Option("--cpus", "N", "vCPUs (default 1)", default=1, convert=_count),
    Option("--append", "STR", "kernel command line", default=""),
    Option("--initrd", "FILE", "initial RAM disk; the first module of a multiboot kernel"),
    Option("--module", "FILE[:ARGS]", "multiboot module with its command line; repeatable", many=True, convert=_module),
    Option("--bios", "FILE", "firmware image; KERNEL is then offered to it through fw_cfg"),
    Option("--mode", "MODE", "take KERNEL as a flat image: real, protected or long"),
    Option("--entry", "ADDR", "entry point (real mode: IP)", convert=_address),
    Option("--load-addr", "ADDR", "where a flat image goes", convert=_address),
    Option("--no-unpack", "", "let a bzImage decompress itself"),
    Option("--irqchip", "KIND", "kernel, split or none (default kernel)", default="kernel"),
    Option("--cpu-feature", "+NAME", "force (+) or mask (-) a CPUID feature; repeatable", many=True),
    Option("--hugepages", "", "back RAM with transparent huge pages"),
    Option("--serial", "WHERE", "COM1, and repeated COM2 to COM4: stdio, file:PATH, pty or none", many=True),
    Option("--debug-exit", "", "isa-debug-exit at port 0xf4: the guest's write ends the run with its code"),
    Option("--coverage", "FILE", "basic blocks that an ELF kernel executed: FILE.info for lcov, else drcov"),
    Option("--gdb", "WHERE", "serve gdb at [HOST:]PORT (port 0: a free one) or unix:PATH"),
    Option("--gdb-wait", "", "run no instruction before a gdb has come and gone on"),
    Option("--gdb-arch", "BITS", "tell gdb of a CPU of 16, 32 or 64 bits (default: by the guest's mode then)"),
    Option("--testdev", "", "the PC test device of kernel test suites"),
    Option(
        "--disk",
        "FILE[,...]",
        "disk image: FILE[,ro][,id=TEXT][,direct][,thread][,queues=N][,rate=..][,format=qcow2]; repeatable",
        many=True,
    ),
    Option(
        "--net",
        "KIND[,...]",
        "network: user[,hostfwd=tcp::2222-:22] or tap[,ifname=NAME][,fd=N][,vhost]; [,mac=..][,mtu=..][,rate=..]",
        many=True,
    ),
    Option(
        "--console",
        "WHERE[,port=NAME]",
        "virtio console hvc0, hvc1, or a named port: stdio, file:PATH, pty, unix:PATH or none; repeatable",
        many=True,
    ),
    Option("--balloon", "[=SPEC]", "memory balloon and free page reporting: size=SIZE,no-deflate-on-oom,no-reporting"),
    Option("--rng", "[=rate=..]", "random number generator, fed by the host's; rate in bytes a second"),
    Option(
        "--vsock", "CID:PATH", "sockets between guest and host: CONNECT PORT at PATH; the guest's own go to PATH_PORT"
    ),
    Option(
        "--share",
        "DIR[:TAG][,...]",
        "shared folder, by virtiofsd: DIR[:TAG][,ro][,cache=auto|always|never]; repeatable; "
        "in the guest: mount -t virtiofs TAG /mnt",
        many=True,
    ),
    Option("--pmem", "FILE[,ro]", "FILE as persistent memory: /dev/pmem0 in Linux, for DAX; repeatable", many=True),
    Option("--virtio-cmdline", "", "announce virtio devices on the kernel's command line instead of by ACPI"),
    Option(
        "--save",
        "FILE",
        "Ctrl-A w and SIGUSR1 save the machine to FILE, for pykvm restore; Ctrl-A q and SIGUSR2 end it then",
    ),
    Option("--timeout", "S", "stop after S seconds with status 124", convert=parse_seconds),
    Option("--trace", "FILE", "record every exit; `pykvm trace` shows, sums and exports FILE"),
    Option("--stats", "", "print exit statistics at the end"),
    Option("--json", "", "print one JSON document with outcome and console instead of the console"),
    Option(
        "--log-level", "LEVEL", "debug, info, warning or error (default warning)", default="warning", convert=_level
    ),
    Option("--log-json", "", "log as JSON lines"),
)

PARSER = Parser(
    "pykvm start [OPTION...] KERNEL",
    "Boot KERNEL (flat image, ELF, multiboot, bzImage, vmlinux) in a virtual machine.",
    OPTIONS,
    positionals=1,
    epilog=(
        "On a terminal Ctrl-A x ends the machine and Ctrl-A c shows what else there is.\n"
        "Exit status: 0 the guest powered off, reset or halted for good; (code << 1) | 1 for debug-exit;\n"
        "2 wrong usage; 4 this host cannot run it; 6 the guest crashed; 124 timeout; 128 + N ended by signal N."
    ),
)


# The options that make virtio devices; pykvm.cli.devices knows what their values mean.
DEVICE_OPTIONS: tuple[str, ...] = ("disk", "net", "rng", "balloon", "vsock", "console", "share", "pmem")


# The longest time from a signal to its handler: Python runs the handler between two bytecodes, so that a signal in the
# moment before the main thread blocks in wait() would else be heard at the end of the wait.
SIGNAL_LAG_S = 0.2


class Signals:
    """SIGINT, SIGTERM and SIGHUP: the first one ends the machine in order; later ones do not cut that short.

    The handler raises nothing: an exception in the middle of a lock would break the lock. Until `watch` there is
    nothing to tidy up, so they just end the process.
    """

    def __init__(self) -> None:
        self.number = 0
        self._stop: Callable[[], None]
        if getsignal(SIGINT) is default_int_handler:
            signal(SIGINT, SIG_DFL)

    def watch(self, stop: Callable[[], None]) -> None:
        """Call `stop` (a short function that takes no lock that the main thread holds) at the first signal."""
        self._stop = stop
        for number in (SIGINT, SIGTERM, SIGHUP):
            if getsignal(number) != SIG_IGN:  # as nohup and a shell's & want it
                signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number = number
            self._stop()


def run(argv: list[str], parser: Parser = PARSER, observers: Sequence[Callable[[Pc], Observer]] = ()) -> int:
    """Boot, wait, report; the exit status. `observers` are made before the guest runs, and closed after it."""
    try:
        values, rest = parser.parse(argv)
    except HelpWanted as wanted:
        print(wanted)
        return 0
    log.configure(values["log_level"], json=values["log_json"])
    if values["gdb"] is None and (values["gdb_wait"] or values["gdb_arch"]):
        raise UsageError("--gdb-wait and --gdb-arch need --gdb WHERE")
    boot, config = _configs(values, rest)
    serial = serial_plan(values["serial"], capture=values["json"], taken=_console_on_stdio(values))
    from pykvm.board import Pc

    signals = Signals()
    # Pc closes itself when its constructor fails
    with Pc(
        boot,
        config,
        serial_ports=len(serial),
        debug_exit=values["debug_exit"],
        testdev=values["testdev"],
        devices=_devices(values),
        virtio_cmdline=values["virtio_cmdline"],
    ) as pc:
        return run_session(pc, serial, values, signals, [*_observers(values), *observers])


class _CoverageFile:
    """--coverage: an Observer that writes the file at the end."""

    def __init__(self, pc: Pc, path: str) -> None:
        self._coverage = pc.coverage()
        self._path = path
        if path.endswith(".info"):
            self._coverage.check_lines()

    def close(self) -> None:
        self._coverage.stop()

    def text(self) -> str:
        self._coverage.write(self._path)
        return f"coverage: {len(self._coverage.hit)} of {len(self._coverage.blocks)} blocks, in {self._path}"


def _observers(values: dict[str, Any]) -> list[Callable[[Pc], Observer]]:
    makers: list[Callable[[Pc], Observer]] = []
    if values["coverage"] is not None:
        makers.append(lambda pc: _CoverageFile(pc, values["coverage"]))
    if values["trace"] is not None:
        makers.append(lambda pc: pc.trace_exits(values["trace"]))
    return makers


def _configs(values: dict[str, Any], rest: list[str]) -> tuple[BootConfig, MachineConfig]:
    boot = BootConfig(
        rest[0] if rest else None,
        bios=values["bios"],
        cmdline=values["append"],
        initrd=values["initrd"],
        modules=values["module"],
        mode=values["mode"],
        entry=values["entry"],
        load_addr=values["load_addr"],
        unpack=not values["no_unpack"],
    )
    config = MachineConfig(
        memory=values["mem"],
        cpus=values["cpus"],
        irqchip=values["irqchip"],
        hugepages=bool(values["hugepages"]),
        cpu_features=",".join(values["cpu_feature"]),
        stats=bool(values["stats"]),
        firmware=values["bios"] is not None,
    )
    return boot, config


def _devices(values: dict[str, Any]) -> list[VirtioDevice]:
    if all(values[key] in (None, False, []) for key in DEVICE_OPTIONS):
        return []
    from pykvm.cli.devices import make_devices

    return make_devices(values)


def _console_on_stdio(values: dict[str, Any]) -> bool:
    return any(text.partition(",")[0] == "stdio" for text in values["console"])


def serial_plan(wanted: list[str], *, capture: bool, taken: bool) -> list[str]:
    """Where each serial port goes, checked; `taken`: a virtio console is on stdio."""
    plan = wanted or ["none" if taken else "stdio"]
    if len(plan) > 4:
        raise UsageError("--serial: a PC has four serial ports")
    if plan.count("stdio") + taken > 1:
        raise UsageError("--serial: only one port can be stdio" + (", and --console is it" if taken else ""))
    for where in plan:
        if where not in ("stdio", "pty", "none") and not where.startswith("file:"):
            raise UsageError(f"--serial: {where!r} is none of stdio, file:PATH, pty, none")
    return ["captured" if where == "stdio" and capture else where for where in plan]


def _saver(path: str | None) -> Saver | None:
    if path is None:
        return None
    from pykvm.cli.saving import Saver

    return Saver(path)


def run_session(
    pc: Pc,
    plan: list[str],
    values: dict[str, Any],
    signals: Signals,
    makers: Sequence[Callable[[Pc], Observer]] = (),
) -> int:
    """Connect the ports, run the machine to its end, report; the exit status."""
    raw = RawMode(0)
    saver = _saver(values["save"])
    ports: list[SerialPort] = []
    observers: list[Observer] = []

    def stop() -> None:
        for port in ports:
            port.hurry()
        pc.stop_soon()

    signals.watch(stop)
    try:
        for index, where in enumerate(plan):
            ports.append(open_serial(pc, index, where))
        if values["console"]:
            from pykvm.cli.consoleport import open_consoles

            open_consoles(pc, ports, capture=values["json"])
        if values["gdb"] is not None:
            server = pc.gdb_server(values["gdb"], wait=bool(values["gdb_wait"]), arch=values["gdb_arch"] or "auto")
            say(f"gdb: target remote {server.address}")
        observers.extend(make(pc) for make in makers)
        if "stdio" in plan or _console_on_stdio(values):
            raw.enter()
        pc.start()
        if signals.number:
            stop()  # it came before the start, when there was nothing to stop
        outcome = _wait(pc, values["timeout"], saver)
    finally:
        try:
            stop()
            pc.stop()
            pc.console.flush()
            _close(observers, ports)
        finally:
            raw.leave()
    for observer in observers:
        say(observer.text())
    if signals.number:
        return 128 + signals.number
    _report(pc, outcome, values)
    for port in ports:
        port.check()
    return outcome.exit_status


def _close(observers: Sequence[Observer], ports: Sequence[SerialPort]) -> None:
    for observer in observers:
        observer.close()
    for port in ports:
        port.close()


def _wait(pc: Pc, timeout: float | None, saver: Saver | None) -> Outcome:
    from pykvm.core.outcome import Outcome

    end = float("inf") if timeout is None else monotonic() + timeout
    published = False
    while (left := end - monotonic()) > 0:
        outcome = pc.wait(min(left, SIGNAL_LAG_S))
        if outcome is not None:
            return outcome
        if not published:  # a run that lasts: let `pykvm top` see it
            from pykvm.control.status import serve

            published = serve(pc) or True
        if saver is not None and saver.work(pc):
            return Outcome("STOPPED", detail="saved")
    return Outcome("TIMEOUT", detail=f"after {timeout:g} s")


def _report(pc: Pc, outcome: Outcome, values: dict[str, Any]) -> None:
    if values["json"]:
        import json

        print(json.dumps(_as_json(pc, outcome, values), indent=2))
        return
    if outcome.report is not None:
        print(outcome.report.text(), file=sys.stderr)
    elif outcome.exit_status and outcome.kind != "DEBUG_EXIT":
        say(f"{outcome.kind}: {outcome.detail}")
    if values["stats"]:
        from pykvm.debug.stats import collect_stats

        print(collect_stats(pc).text(), file=sys.stderr)


def _as_json(pc: Pc, outcome: Outcome, values: dict[str, Any]) -> dict[str, object]:
    from pykvm.debug.stats import collect_stats

    document: dict[str, object] = {
        "outcome": outcome.kind,
        "code": outcome.code,
        "detail": outcome.detail,
        "vcpu": outcome.vcpu,
        "exit_status": outcome.exit_status,
        "protocol": pc.boot.protocol if pc.boot is not None else None,
        "console": pc.console.text,
    }
    if outcome.report is not None:
        document["report"] = outcome.report.as_dict()
    if values["stats"]:
        document["stats"] = collect_stats(pc).as_dict()
    return document
