"""A snapshot's state as a document, and back. Layer: live objects.

The machine's description is what a new one is made of; `machine_config` makes the MachineConfig, the board the rest.
"""

from __future__ import annotations

from pykvm.config import MAX_CPUS, MAX_MEMORY, MachineConfig
from pykvm.core.memimage import SlotImage
from pykvm.core.state import BOOL, U32, U64, Bytes, Int, ListOf, Row, Shape, Text
from pykvm.errors import SnapshotError
from pykvm.kvm.system import cpuid_tuple
from pykvm.snapshot.state import Part
from pykvm.x86.cpuid import CpuidEntry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pykvm._native import CData
    from pykvm.core.machine import Machine
    from pykvm.snapshot.state import Snapshot

MAX_CPUID = 256
MAX_PIECES = 1 << 21
PIECE_ROW = 48  # bytes: slot, offset, length, file offset, stored length, CRC

MACHINE_SHAPE = Shape(
    1,
    memory=Int(0, MAX_MEMORY),
    cpus=Int(1, MAX_CPUS),
    irqchip=Text(10),
    pit=BOOL,
    cpu_features=Text(4096),
    c_actions=BOOL,
    halt_detection=BOOL,
    firmware=BOOL,
    cpuid=ListOf(ListOf(Row(*[U32] * 7), 1, MAX_CPUID), 1, MAX_CPUS),
)
SLOTS = ListOf(Row(U64, U64, Text(64), BOOL), 1, 64)  # gpa, size, name, read-only
LAYERS = ListOf(Int(1, 1 << 50), 0, 64)  # sizes of what disks have in memory: regions after those of the slots
_PIECES = Bytes(0, MAX_PIECES * PIECE_ROW)
DOCUMENT = {"kind", "board", "machine", "slots", "layers", "vcpus", "vm", "devices", "pieces"}


def describe(machine: Machine, snapshot: Snapshot) -> dict[str, Any]:
    """Everything but memory."""
    config = machine.config
    kind, board = machine.describe_board()
    plain = {name: getattr(config, name) for name in MACHINE_SHAPE.fields if name != "cpuid"}
    plain["cpuid"] = [_rows(vcpu.cpuid) for vcpu in machine.vcpus]
    return {
        "kind": kind,
        "board": board,
        "machine": {"version": MACHINE_SHAPE.version, "state": plain},
        "layers": [each.size for each in layers_of(snapshot)],
        "slots": [[each.gpa, each.size, each.name, each.readonly] for each in snapshot.memory],
        "vcpus": [_part(part) for part in snapshot.vcpus],
        "vm": _part(snapshot.vm),
        "devices": _devices(snapshot),
    }


def layers_of(snapshot: Snapshot) -> list[SlotImage]:
    """What the devices have in memory, in the order of the devices and their fields."""
    states = [part.state for part in snapshot.devices.values()]
    return [value for state in states for value in state.values() if isinstance(value, SlotImage)]


def _devices(snapshot: Snapshot) -> dict[str, Any]:
    """Their states, with {"layer": number} in the place of a layer."""
    found: dict[str, Any] = {}
    count = 0
    for name, part in snapshot.devices.items():
        state = dict(part.state)
        for field, value in part.state.items():
            if isinstance(value, SlotImage):
                state[field], count = {"layer": count}, count + 1
        found[name] = {"version": part.version, "state": state}
    return found


def read_device(value: object, what: str, layers: Sequence[SlotImage]) -> Part:
    """A device's saved state, its layers filled in."""
    part = read_part(value, what)
    for field, each in part.state.items():
        if isinstance(each, dict) and each.keys() == {"layer"}:
            number = each["layer"]
            if type(number) is not int or not 0 <= number < len(layers):
                raise SnapshotError(f"{what}: malformed: {field} is not in the file")
            part.state[field] = layers[number]
    return part


def _rows(table: CData) -> list[list[int]]:
    return [list(cpuid_tuple(table.entries[i])) for i in range(table.nent)]


def _part(part: Part) -> dict[str, Any]:
    return {"version": part.version, "state": part.state}


def check_document(document: dict[str, Any], path: str) -> None:
    """Raise SnapshotError unless the document has its parts; those of components are checked when they are known."""
    problem = ""
    if not DOCUMENT <= document.keys() <= DOCUMENT | {"parent"}:
        problem = "parts are missing or unknown"
    elif not _PIECES.accepts(document["pieces"]) or len(document["pieces"]) % PIECE_ROW:
        problem = "the list of its memory is malformed"
    elif not SLOTS.accepts(document["slots"]):
        problem = "its memory slots are malformed"
    elif not LAYERS.accepts(document["layers"]):
        problem = "the content of its disks is malformed"
    elif not isinstance(document["vcpus"], list) or not isinstance(document["devices"], dict):
        problem = "its components are malformed"
    elif "parent" in document and not Text(255).accepts(document["parent"]):
        problem = "its parent's name is malformed"
    if problem:
        raise SnapshotError(f"{path}: {problem}")


def read_part(value: object, what: str) -> Part:
    """A component's saved state; its fields are checked by whoever knows the component."""
    if isinstance(value, dict) and value.keys() == {"version", "state"} and isinstance(value["state"], dict):
        return Part(value["version"], value["state"])
    raise SnapshotError(f"{what}: malformed")


def machine_config(document: dict[str, Any], path: str, *, host: bool = False) -> MachineConfig:
    """The configuration, whose vCPUs get exactly the saved CPUID; with `host` what this host gives.

    Raises SnapshotError, ConfigError.
    """
    part = read_part(document["machine"], f"{path}: machine")
    MACHINE_SHAPE.check(f"{path}: machine", part.version, part.state)
    options = dict(part.state)
    tables = options.pop("cpuid")

    def cpuid(entries: list[CpuidEntry], index: int) -> None:
        entries[:] = [CpuidEntry(*row) for row in tables[min(index, len(tables) - 1)]]

    return MachineConfig(cpuid=None if host else cpuid, **options)


# -- the CPU -----------------------------------------------------------------------------------------------------------

# (leaf, index) -> the registers (by place in a row) that are sets of features, and bits that say no such thing
_FEATURES = {
    (1, 0): {5: 1 << 27, 6: 0},  # OSXSAVE follows CR4
    (7, 0): {4: 0, 5: 1 << 4, 6: 0},  # OSPKE, too
    (0x80000001, 0): {5: 0, 6: 0},
    (0xD, 1): {3: 0},
}


def check_cpu(saved: list[list[int]], host: CData, path: str) -> None:
    """Raise SnapshotError when a saved vCPU has what this host's CPU has not; `host` is a struct kvm_cpuid2."""
    ours = {(row[0], row[1]): row for row in _rows(host)}
    theirs = {(row[0], row[1]): row for row in saved}
    if (0, 0) in ours and (0, 0) in theirs and tuple(theirs[0, 0][4:7]) != tuple(ours[0, 0][4:7]):
        raise SnapshotError(f"{path}: was saved on a CPU of another vendor")
    for leaf, registers in _FEATURES.items():
        for place, ignored in registers.items():
            have = ours[leaf][place] if leaf in ours else 0
            lacking = theirs[leaf][place] & ~have & ~ignored if leaf in theirs else 0
            if lacking:
                name = ("eax", "ebx", "ecx", "edx")[place - 3]
                raise SnapshotError(
                    f"{path}: was saved on another CPU: this one lacks CPUID {leaf[0]:#x}.{leaf[1]} {name} {lacking:#x}"
                )
