"""The architecture as a test: imports point downward only, and `pykvm start` imports nothing slow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pykvm

PACKAGE = Path(pykvm.__file__).parent

# From the bottom up. A module belongs to the layer with the longest prefix of its name, and may import at run time
# from its own layer and from those below. An annotation may name a class from above (under TYPE_CHECKING): the
# handlers of core.exits get the vCPU that called them, but core.exits does not know what a vCPU does.
LAYERS: dict[str, tuple[str, ...]] = {
    "ground": ("pykvm._native", "pykvm.errors", "pykvm.log", "pykvm.x86"),
    "the ABI": ("pykvm.kvm",),
    "parts of a machine": (
        "pykvm.config",
        "pykvm.core.actions",
        "pykvm.core.console",
        "pykvm.core.device",
        "pykvm.core.filememory",
        "pykvm.core.iothread",
        "pykvm.core.irq",
        "pykvm.core.memory",
        "pykvm.core.outcome",
        "pykvm.core.reaper",
        "pykvm.core.registers",
        "pykvm.core.state",
        "pykvm.core.memimage",
        "pykvm.core.wires",
        "pykvm.core.memshared",
    ),
    "the bus": ("pykvm.core.bus",),
    "exits": ("pykvm.core.exits",),
    "the vCPU": ("pykvm.core.vcpu",),
    "live objects": (
        "pykvm.core.debugging",
        "pykvm.core.driving",
        "pykvm.core.fastuart",
        "pykvm.core.guestclock",
        "pykvm.core.halt",
        "pykvm.core.machine",
        "pykvm.core.vmsetup",
        "pykvm.core.snapshots",
        "pykvm.core.spare",
        "pykvm.snapshot",
        "pykvm.debug",
        "pykvm.testing.call",
        "pykvm.testing.callframe",
        "pykvm.testing.talk",
        "pykvm.testing.until",
        "pykvm.testing.waiting",
        "pykvm.testing.watchdog",
    ),
    "what exists": ("pykvm.boot", "pykvm.devices", "pykvm.virtio"),
    "the board": ("pykvm.board",),
    "verbs that front ends share": ("pykvm.control", "pykvm.kernels"),
    "people and programs": ("pykvm.cli", "pykvm.testing", "pykvm.__main__", "pykvm"),
}

# Beside a bare interpreter's 11 ms each of these costs one to a hundred milliseconds.
SLOW_NAMES = """
    argparse asyncio collections concurrent contextlib ctypes dataclasses datetime decimal elftools enum functools
    hashlib iced_x86 importlib inspect json logging lz4 multiprocessing pathlib pdb pexpect pickle platform ptrace
    random re rich shutil socket ssl string structlog subprocess tempfile textwrap traceback typing unittest urllib uuid
    zstandard
"""
SLOW = frozenset(SLOW_NAMES.split())
START_PATH = (
    "pykvm.__main__",
    "pykvm.board",
    "pykvm.boot",
    "pykvm.cli.main",
    "pykvm.cli.options",
    "pykvm.cli.serialport",
    "pykvm.cli.start",
    "pykvm.cli.terminal",
    "pykvm.config",
    "pykvm.core",
    "pykvm.devices",
    "pykvm.errors",
    "pykvm.kvm",
    "pykvm.log",
    "pykvm.x86",
)


def module_name(path: Path) -> str:
    """pykvm/kvm/vm.py -> pykvm.kvm.vm, and pykvm/kvm/__init__.py -> pykvm.kvm."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


class Imports(ast.NodeVisitor):
    """The modules that one source imports when it is loaded (`eager`) and at all at run time (`all`)."""

    def __init__(self, source: str) -> None:
        self.eager: set[str] = set()
        self.all: set[str] = set()
        self._depth = 0  # of functions
        self.visit(ast.parse(source))

    def visit_If(self, node: ast.If) -> None:
        """What stands under `if TYPE_CHECKING:` never runs."""
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """What a function imports is imported when it is called."""
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    def visit_Import(self, node: ast.Import) -> None:
        """`import NAME`."""
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """`from MODULE import NAME`, where NAME may be a module itself."""
        module = node.module or ""
        assert node.level == 0, "the house style is absolute imports"
        for alias in node.names:
            name = f"{module}.{alias.name}"
            self._add(name if name in MODULES or name == "pykvm._native" else module)

    def _add(self, name: str) -> None:
        self.all.add(name)
        if not self._depth:
            self.eager.add(name)


def layer_of(module: str) -> int | None:
    """The number of a module's layer, from the bottom; None when it has none."""
    best: tuple[int, int] | None = None
    for number, prefixes in enumerate(LAYERS.values()):
        for prefix in prefixes:
            # The bare package is itself only: a new top-level module has to be given a place.
            if module == prefix or (prefix != "pykvm" and module.startswith(prefix + ".")):
                best = max(best or (0, 0), (len(prefix), number))
    return best[1] if best else None


IMPORTS = {name: Imports(path.read_text()) for name, path in MODULES.items()}


def is_code(module: str) -> bool:
    """The __init__ of a subpackage holds no code and needs no layer."""
    return module == "pykvm" or module not in MODULES or MODULES[module].name != "__init__.py"


def test_every_module_has_a_layer() -> None:
    """A new module is given its place in the architecture before it is used."""
    homeless = [name for name in MODULES if is_code(name) and layer_of(name) is None]
    assert not homeless, f"give these modules a layer in {Path(__file__).name}: {homeless}"


@pytest.mark.parametrize("module", [name for name in MODULES if is_code(name)])
def test_imports_point_downward(module: str) -> None:
    """Nothing is imported at run time from a layer above."""
    names = list(LAYERS)
    own = layer_of(module)
    for imported in sorted(IMPORTS[module].all):
        if imported.partition(".")[0] != "pykvm" or not is_code(imported):
            continue
        other = layer_of(imported)
        assert own is not None and other is not None, f"{imported} has no layer"
        assert other <= own, (
            f'{module} (layer "{names[own]}") imports {imported} (layer "{names[other]}" above it): '
            "move the code down, hand the object in, or import it only under TYPE_CHECKING"
        )


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("pykvm.x86.")])
def test_x86_knows_only_itself(module: str) -> None:
    """The facts about the architecture depend on nothing of the monitor but its exceptions."""
    foreign = {name for name in IMPORTS[module].all if name.startswith("pykvm")}
    foreign = {name for name in foreign if not name.startswith(("pykvm.x86", "pykvm.errors"))}
    assert not foreign, f"{module} imports {foreign}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(START_PATH)])
def test_the_start_path_imports_nothing_slow(module: str) -> None:
    """What `pykvm start` loads leaves slow modules to the functions that need them."""
    slow = {name for name in IMPORTS[module].eager if name.partition(".")[0] in SLOW}
    assert not slow, f"{module} imports {slow} when it is loaded: do it in the function, or under TYPE_CHECKING"


def test_the_layers_name_real_modules() -> None:
    """A module that was moved or renamed does not leave its old name in the table."""
    prefixes = {prefix for layer in LAYERS.values() for prefix in layer} | set(START_PATH)
    unknown = prefixes - {"pykvm._native"} - set(MODULES)
    assert not unknown, f"no such modules: {unknown}"
