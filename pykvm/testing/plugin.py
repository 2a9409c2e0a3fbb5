"""The pytest plugin (entry point pytest11). Layer: programs. What it does is explained in README.md beside this file.

pytest loads this module in every project of an environment that has pykvm: it imports nothing but pytest, and the rest
when a test asks for a machine.
"""

from __future__ import annotations

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from pykvm.board import Pc
    from pykvm.testing.machines import Boots, MachineFactory, Machines

MARKER = (
    "pykvm(kernel=..., memory='64M', cpus=1, append='', initrd=..., disks=[...], until=..., timeout=60, ...): "
    "the machine that the fixtures vm, vm_factory and booted_vm make; all options are in pykvm/testing/README.md"
)
INI = {
    "pykvm_kernel": "the kernel that is booted; relative to the root directory",
    "pykvm_memory": "RAM: 64M",
    "pykvm_cpus": "number of vCPUs",
    "pykvm_append": "kernel command line",
    "pykvm_initrd": "initial RAM disk",
    "pykvm_until": "how far booted_vm boots: console REGEX, rip:SYMBOL, port_write:PORT[=VALUE] or debug_exit[:CODE]",
    "pykvm_timeout": "seconds of guest-run time for a boot, and for all runs of a test together (60)",
}

machines_key = pytest.StashKey["Machines"]()
boots_key = pytest.StashKey["Boots"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options and ini values."""
    group = parser.getgroup("pykvm", "tests of kernels on pykvm's virtual machines")
    group.addoption(
        "--pykvm-artifacts", metavar="DIR", help="save console, registers and crash report of failed tests' machines"
    )
    group.addoption(
        "--pykvm-artifact-snapshots",
        action="store_true",
        help="with --pykvm-artifacts: a snapshot file of each machine too, to look at with a debugger",
    )
    group.addoption(
        "--pykvm-require", action="store_true", help="an error instead of a skip where /dev/kvm cannot be used"
    )
    for name, text in INI.items():
        parser.addini(name, text)
    parser.addini("pykvm_disks", "disks, one a line: FILE[,ro][,...] as for `pykvm start --disk`", type="linelist")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", MARKER)


@pytest.fixture(scope="session")
def pykvm_kernel() -> str | None:
    """Path of the kernel for tests whose marker names none. Override it to build one; None: the ini value."""
    return None


@pytest.fixture(scope="session")
def pykvm_boots(pytestconfig: pytest.Config) -> Iterator[Boots]:
    """The machines that were booted for booted_vm, kept for the session."""
    from pykvm.testing.machines import Boots

    boots = pytestconfig.stash[boots_key] = Boots(pytestconfig)
    yield boots
    boots.close()


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest, pykvm_kernel: str | None) -> Iterator[MachineFactory]:
    """Makes machines: vm_factory(kernel=..., **options), with what the marker says for all that is left out.

    They are paused before their first instruction, and closed at the test's end.
    """
    from pykvm.testing.machines import Machines

    machines = request.node.stash[machines_key] = Machines(request.node, pykvm_kernel)
    yield machines.make
    machines.close()


@pytest.fixture
def vm(vm_factory: MachineFactory) -> Pc:
    """The machine that the marker describes, paused before its first instruction."""
    from pykvm.testing.machines import plain_errors

    with plain_errors():
        return vm_factory()


@pytest.fixture
def booted_vm(request: pytest.FixtureRequest, pykvm_boots: Boots, vm_factory: MachineFactory) -> Pc:
    """A fork of the machine that the marker describes, booted once in the session as far as `until` says."""
    from pykvm.testing.machines import plain_errors

    machines: Machines = request.node.stash[machines_key]
    with plain_errors():
        return machines.fork_of(pykvm_boots)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell of a failed test's machines: in the report, and in files under --pykvm-artifacts."""
    report = yield
    machines = item.stash.get(machines_key, None)
    if machines is not None and report.failed:
        from pykvm.testing.report import tell

        tell(machines, report)
    return report


def pytest_assertrepr_compare(config: pytest.Config, op: str, left: object, right: object) -> list[str] | None:
    """Say of two outcomes in a failed comparison what they mean."""
    if type(left).__name__ != "Outcome" or type(right).__name__ != "Outcome":
        return None
    from pykvm.testing.report import explain_outcomes

    return explain_outcomes(op, left, right)
