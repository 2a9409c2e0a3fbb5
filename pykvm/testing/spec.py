"""What machine a test wants: its markers over pytest's ini file. Layer: programs."""

from __future__ import annotations

from functools import cache
from inspect import signature
from pathlib import Path

from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    import pytest

    from pykvm.board import Pc
    from pykvm.kvm.system import Kvm
    from pykvm.virtio.device import VirtioDevice

DEFAULT_TIMEOUT_S = 60.0
INI_KEYS = ("kernel", "memory", "cpus", "append", "initrd", "disks", "until", "timeout")
BOOT_KEYS = ("bios", "initrd", "modules", "mode", "entry", "load_addr", "unpack")
OWN_KEYS = ("kernel", "append", "disks", "until", "timeout", *BOOT_KEYS)
UNTIL_KEYS = ("console", "rip", "port_write")
PATH_KEYS = ("kernel", "bios", "initrd")
DEBUG_EXIT_PORT = 0xF4
NO_KERNEL = (
    "no kernel to boot: give @pytest.mark.pykvm(kernel=...), pykvm_kernel in pytest's ini file, or override the "
    "fixture pykvm_kernel"
)
NO_CONDITION = (
    "say how far booted_vm boots: until='REGEX' on the console, {'rip': 'main'}, {'port_write': 0x80} or 'debug_exit', "
    "in the marker or as pykvm_until in pytest's ini file"
)


class MachineSpec:
    """One machine's description. `settings` has only what was said; paths in it are found and absolute.

    kernel, append, initrd, bios, modules, mode, entry, load_addr, unpack   as BootConfig
    disk/disks and the other device options of `pykvm start`                text (or a list), as on its command line
    until      how far booted_vm boots
    timeout    seconds of guest-run time
    all else   options of Pc: memory, cpus, irqchip, testdev, stats, ...
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    @property
    def timeout(self) -> float:
        """Seconds of guest-run time for a boot, or for all runs of one test. Raises ConfigError."""
        given = self.settings.get("timeout", DEFAULT_TIMEOUT_S)
        try:
            seconds = float(given)
        except (TypeError, ValueError):
            seconds = -1.0
        if not 0 < seconds < 1e9:
            raise ConfigError("timeout", f"{given!r} is no number of seconds")
        return seconds

    @property
    def key(self) -> str:
        """Equal for machines that boot to the same state; a kernel that was built again is another one."""
        stamps = [(name, Path(self.settings[name]).stat().st_mtime_ns) for name in PATH_KEYS if name in self.settings]
        return repr(sorted((name, value) for name, value in self.settings.items() if name != "timeout")) + repr(stamps)

    def build(self, kvm: Kvm, **defaults: Any) -> Pc:
        """The machine, paused before its first instruction; `defaults` are options of MachineConfig.

        Raises what Pc raises, ConfigError for unknown options.
        """
        from pykvm.board import Pc
        from pykvm.config import BootConfig, MachineConfig

        if "kernel" not in self.settings and "bios" not in self.settings:
            raise ConfigError("kernel", NO_KERNEL)
        boot = BootConfig(self.settings.get("kernel"), cmdline=self.settings.get("append", ""), **self._only(BOOT_KEYS))
        device_keys = _device_keys()
        options = {name: self.settings[name] for name in self.settings if name not in (*OWN_KEYS, *device_keys)}
        machine_options = {name: options.pop(name) for name in MachineConfig.__slots__ if name in options}
        for name in options:
            if name not in _pc_options():
                raise ConfigError(name, "neither pykvm.Pc nor `pykvm start` has an option of this name")
        config = MachineConfig(**{"firmware": "bios" in self.settings} | defaults | machine_options)
        # the last step before Pc, which closes them when it fails
        return Pc(boot, config, devices=self._devices(device_keys), kvm=kvm, **options)

    def _only(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: self.settings[name] for name in names if name in self.settings}

    def _devices(self, keys: Iterable[str]) -> list[VirtioDevice]:
        wanted = self._only(keys)
        if "disks" in self.settings:
            wanted["disk"] = [*_as_list(wanted.get("disk", [])), *_as_list(self.settings["disks"])]
        if not wanted:
            return []
        from pykvm.cli.devices import make_devices

        return make_devices(wanted)

    def until(self) -> dict[str, Any]:
        """The conditions for run_until. Raises ConfigError."""
        given = self.settings.get("until")
        if not given:
            raise ConfigError("until", NO_CONDITION)
        if isinstance(given, dict):
            unknown = [name for name in given if name not in UNTIL_KEYS]
            if unknown:
                raise ConfigError("until", f"{unknown[0]!r} is none of {', '.join(UNTIL_KEYS)}")
            return dict(given)
        return _parse_until(str(given))


def _parse_until(text: str) -> dict[str, Any]:
    kind, colon, value = text.partition(":")
    if kind == "debug_exit":
        return {"port_write": (DEBUG_EXIT_PORT, _number(value)) if colon else DEBUG_EXIT_PORT}
    if not colon or kind not in UNTIL_KEYS:
        return {"console": text}
    if kind == "port_write":
        port, equals, number = value.partition("=")
        return {"port_write": (_number(port), _number(number)) if equals else _number(port)}
    return {kind: value}


def _number(text: str) -> int:
    from pykvm.config import parse_int

    return parse_int(text, "until")


@cache
def _pc_options() -> frozenset[str]:
    from pykvm.board import Pc

    return frozenset(signature(Pc).parameters)


def _device_keys() -> tuple[str, ...]:
    from pykvm.cli.devices import MAKERS

    return tuple(MAKERS)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def spec_of(item: pytest.Item, kernel: str | None, overrides: dict[str, Any]) -> MachineSpec:
    """What `item`'s markers (the closest first), the kernel fixture and the ini file say, under `overrides`."""
    settings = {name: value for name in INI_KEYS if (value := item.config.getini(f"pykvm_{name}"))}
    root = item.config.rootpath
    if kernel is not None:
        settings["kernel"] = str(kernel)
    if "cpus" in settings:
        settings["cpus"] = _count(settings["cpus"])
    for mark in reversed(list(item.iter_markers("pykvm"))):
        settings.update(zip(("kernel",), mark.args, strict=False), **mark.kwargs)
    settings |= overrides
    for name in PATH_KEYS:
        if name in settings:
            settings[name] = _find(str(settings[name]), name, item.path.parent, root)
    if "disks" in settings:
        settings["disks"] = [_find_disk(each, item.path.parent, root) for each in _as_list(settings["disks"])]
    return MachineSpec(settings)


def _count(text: str) -> int:
    from pykvm.config import parse_int

    return parse_int(text, "pykvm_cpus")


def _find(path: str, option: str, *folders: Path) -> str:
    """`path` below the first folder that has it: the test file's, then pytest's root."""
    for folder in folders:
        if (folder / path).exists():
            return str(folder / path)
    tried = ", ".join(dict.fromkeys(str(folder / path) for folder in folders))
    raise ConfigError(option, f"no such file: {tried}")


def _find_disk(text: str, *folders: Path) -> str:
    path, comma, words = text.partition(",")
    return _find(path, "disks", *folders) + comma + words
