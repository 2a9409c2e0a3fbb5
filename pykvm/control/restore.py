"""A machine from a snapshot file. Layer: control."""

from __future__ import annotations

import os

from pykvm.board import Pc
from pykvm.config import BootConfig, MachineConfig
from pykvm.control.recipes import PATH, Ends, make_devices
from pykvm.core.machine import Machine
from pykvm.core.state import BOOL, U64, Int, ListOf, Row, Shape, Text
from pykvm.core.vmsetup import host_cpuid
from pykvm.errors import HostError, SnapshotError, UsageError
from pykvm.kvm.system import Kvm
from pykvm.snapshot.apply import check, put_state
from pykvm.snapshot.describe import check_cpu, machine_config
from pykvm.snapshot.load import SnapshotFile, load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pykvm.virtio.netbackend import NetBackend

TSC_TOLERANCE_PPM = 250  # what NTP can correct, and what QEMU and KVM's own TSC scaling tolerate

_BOARD = Shape(1, serial_ports=Int(0, 4), debug_exit=BOOL, testdev=BOOL, virtio_cmdline=BOOL)
_BOOT = {
    "kernel": PATH,
    "bios": PATH,
    "cmdline": Text(1 << 16),
    "initrd": PATH,
    "modules": ListOf(Row(PATH, Text(1 << 16)), 0, 64),
    "mode": Text(16),
    "entry": U64,
    "load_addr": U64,
    "unpack": BOOL,
}


def restore_file(
    path: str | os.PathLike[str],
    *,
    lazy: bool = False,
    parent: str | os.PathLike[str] | None = None,
    attach: Callable[[Machine], object] | None = None,
    net: Sequence[NetBackend | None] | None = None,
    vsock: str | None = None,
    **board: Any,
) -> Machine:
    """The machine that `Machine.save` wrote to `path`: a Pc or a Machine, paused, about to go on.

    lazy     map its memory without reading it first: takes no time, and damage in it goes unnoticed
    parent   the file that a differential snapshot is relative to, if it is not beside `path` under its old name
    attach   puts the caller's own devices on the machine, at the addresses that they had
    net      what its networks are plugged into, in order, instead of what they were; None for nothing. Closed with it
    vsock    where its vsock listens instead of at its old path; "" for nowhere
    board    overrides options of the Pc: `devices=[...]` gives it other virtio devices of the same kinds

    Raises SnapshotError for a file that is damaged, of another machine or CPU, before anything is made; ConfigError
    when an end of a device cannot be had on this host (a socket's path that is in use).
    """
    where = os.fspath(path)
    ends = Ends(net=net, vsock=vsock)
    try:
        file = load(where, lazy=lazy, parent=None if parent is None else os.fspath(parent))
        machine = _make(file, ends, board)
    finally:
        ends.close()
    try:
        if attach is not None:
            attach(machine)
        devices = check(machine, file.snapshot).devices
        _check_tsc(machine, file)
        put_state(machine, file.snapshot, devices)
        for vcpu in machine.vcpus:
            vcpu.forgive_pause()
    except BaseException:
        machine.close()
        raise
    return machine


def _make(file: SnapshotFile, ends: Ends, overrides: dict[str, Any]) -> Machine:
    config = machine_config(file.document, file.path)
    with Kvm() as kvm:
        tables = file.document["machine"]["state"]["cpuid"]
        check_cpu(tables[0], host_cpuid(kvm, machine_config(file.document, file.path, host=True)), file.path)
    try:
        return _make_board(file, config, ends, overrides)
    except HostError as error:
        raise SnapshotError(f"{file.path}: this host cannot make its machine: {error}") from error


def _make_board(file: SnapshotFile, config: MachineConfig, ends: Ends, overrides: dict[str, Any]) -> Machine:
    kind, board = file.document["kind"], file.document["board"]
    if kind == "machine":
        return Machine(config, image=file.snapshot.memory)
    if kind != "pc" or not isinstance(board, dict):
        raise SnapshotError(f"{file.path}: a machine of kind {str(kind)[:20]!r} is unknown")
    options = dict(board)
    boot = _boot_config(options.pop("boot", None), file.path)
    recipes = options.pop("devices", None)
    _BOARD.check(f"{file.path}: board", 1, options)
    if "devices" not in overrides:
        options["devices"] = make_devices(recipes, file.path, ends)
    return Pc(boot, config, image=file.snapshot.memory, **{**options, **overrides})


def _boot_config(saved: object, path: str) -> BootConfig | None:
    """What a reset of the machine loads again; the files are not looked at now."""
    if saved is None:
        return None
    if not isinstance(saved, dict) or saved.keys() != _BOOT.keys():
        raise SnapshotError(f"{path}: what it boots is malformed")
    for name, kind in _BOOT.items():
        if saved[name] is not None and not kind.accepts(saved[name]):
            raise SnapshotError(f"{path}: what it boots is malformed: {name} is not {kind.what}")
    modules = [(name, arguments) for name, arguments in saved["modules"] or ()]
    rest = {name: value for name, value in saved.items() if name not in ("kernel", "modules")}
    try:
        return BootConfig(saved["kernel"], modules=modules, **rest)
    except UsageError as error:
        raise SnapshotError(f"{path}: what it boots is malformed: {error}") from None


def _check_tsc(machine: Machine, file: SnapshotFile) -> None:
    """A guest that measured its TSC must find the same one."""
    for vcpu, part in zip(machine.vcpus, file.snapshot.vcpus, strict=True):
        saved, ours = part.state["tsc_khz"], vcpu.fd.get_tsc_khz()
        if saved and ours and abs(saved - ours) * 1_000_000 > TSC_TOLERANCE_PPM * ours:
            try:
                vcpu.fd.set_tsc_khz(saved)
            except HostError:
                raise SnapshotError(
                    f"{file.path}: its TSC runs at {saved} kHz; this host's runs at {ours} kHz and cannot be scaled"
                ) from None
