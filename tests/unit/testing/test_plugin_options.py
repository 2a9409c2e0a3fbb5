"""The pytest plugin where no machine is needed: what it costs, what it says on hosts without KVM, what it reads."""

from __future__ import annotations

from typing import Any

import pytest

from pykvm import ConfigError, KvmUnavailable, Outcome
from pykvm.testing import machines, report
from pykvm.testing.spec import MachineSpec, spec_of

QUIET = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
USES_VM = """
import pytest

@pytest.mark.pykvm(kernel=__file__)
def test_it(vm):
    pass

@pytest.mark.pykvm(kernel=__file__, until="ready")
def test_forked(booted_vm):
    pass

def test_without_a_machine():
    pass
"""


@pytest.fixture
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without /dev/kvm."""

    def unavailable() -> None:
        raise KvmUnavailable("absent", "/dev/kvm does not exist: enable virtualisation")

    monkeypatch.setattr(machines, "Kvm", unavailable)


@pytest.mark.usefixtures("no_kvm")
def test_without_kvm_tests_are_skipped(pytester: pytest.Pytester) -> None:
    """Tests that want a machine are skipped with the reason; the others run."""
    pytester.makepyfile(USES_VM)
    result = pytester.runpytest_inprocess("-rs", *QUIET)
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED *: /dev/kvm does not exist: enable virtualisation"])


@pytest.mark.usefixtures("no_kvm")
def test_kvm_can_be_required(pytester: pytest.Pytester) -> None:
    """With --pykvm-require they are errors with the same reason."""
    pytester.makepyfile(USES_VM)
    result = pytester.runpytest_inprocess("--pykvm-require", *QUIET)
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["*--pykvm-require: /dev/kvm does not exist*"])


def test_the_plugin_loads_nothing_unasked(pytester: pytest.Pytester) -> None:
    """A test run that uses no machine imports no more of pykvm than the plugin's own file."""
    pytester.makepyfile(
        """
        import sys

        def test_it():
            loaded = {name for name in sys.modules if name.partition(".")[0] in ("pykvm", "cffi", "_cffi_backend")}
            assert loaded == {"pykvm", "pykvm.testing", "pykvm.testing.plugin"}
        """
    )
    pytester.runpytest_subprocess(*QUIET).assert_outcomes(passed=1)


def test_marker_and_options_are_known(pytester: pytest.Pytester) -> None:
    """The marker passes --strict-markers, and the help names the plugin's options."""
    pytester.makepyfile(USES_VM)
    result = pytester.runpytest_inprocess("--strict-markers", "--collect-only", "-q", *QUIET)
    assert result.ret == 0
    result = pytester.runpytest_inprocess("--help", *QUIET)
    result.stdout.fnmatch_lines(["*--pykvm-artifacts=DIR*", "*--pykvm-require*", "*pykvm_until*"])


def spec(pytester: pytest.Pytester, source: str, ini: str = "", **overrides: Any) -> MachineSpec:
    """What the first test of `source` describes, beside a file kernel.elf."""
    (pytester.path / "kernel.elf").touch()
    pytester.makeini(f"[pytest]\n{ini}")
    return spec_of(pytester.getitem(source), None, overrides)


def test_the_closest_marker_counts(pytester: pytest.Pytester) -> None:
    """Function over class over module over ini; what only one says is kept."""
    source = """
        import pytest

        pytestmark = pytest.mark.pykvm(memory="32M", append="module", cpus=3)

        @pytest.mark.pykvm(append="class")
        class TestIt:
            @pytest.mark.pykvm("kernel.elf", cpus=2)
            def test_func(self): pass
    """
    (pytester.path / "kernel.elf").touch()
    pytester.makeini("[pytest]\npykvm_memory = 16M\npykvm_cpus = 4\npykvm_timeout = 7\npykvm_disks =\n")
    item = next(item for item in pytester.getitems(source) if item.name == "test_func")
    found = spec_of(item, None, {"testdev": True})
    assert found.settings == {
        "memory": "32M",
        "append": "class",
        "cpus": 2,
        "timeout": "7",
        "kernel": str(pytester.path / "kernel.elf"),
        "testdev": True,
    }
    assert found.timeout == 7.0


def test_files_are_found_beside_the_test_and_in_the_root(pytester: pytest.Pytester) -> None:
    """A relative path starts at the test file's folder or at pytest's root; both are named when it is in neither."""
    (pytester.path / "disk.img").touch()
    found = spec(pytester, "def test_func(): pass", "pykvm_kernel = kernel.elf\npykvm_disks = disk.img,ro\n")
    assert found.settings["kernel"] == str(pytester.path / "kernel.elf")
    assert found.settings["disks"] == [f"{pytester.path / 'disk.img'},ro"]
    with pytest.raises(ConfigError, match=r"kernel: no such file: .*missing\.elf"):
        spec(pytester, "def test_func(): pass", kernel="missing.elf")


@pytest.mark.parametrize(
    ("until", "conditions"),
    [
        ("ready", {"console": "ready"}),
        ("console:a:b", {"console": "a:b"}),
        ("login: ", {"console": "login: "}),
        ("rip:main+4", {"rip": "main+4"}),
        ("port_write:0x80", {"port_write": 0x80}),
        ("port_write:0x80=7", {"port_write": (0x80, 7)}),
        ("debug_exit", {"port_write": 0xF4}),
        ("debug_exit:3", {"port_write": (0xF4, 3)}),
        ({"rip": 0x100000}, {"rip": 0x100000}),
    ],
)
def test_until(until: object, conditions: dict[str, object]) -> None:
    """How far to boot, as text of the ini file or as run_until's own words."""
    assert MachineSpec({"until": until}).until() == conditions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "say how far booted_vm boots"),
        ({"until": {"text": "x"}}, "'text' is none of console, rip, port_write"),
        ({"until": "port_write:COM1"}, "'COM1' is no number"),
    ],
)
def test_wrong_until(settings: dict[str, Any], message: str) -> None:
    """A mistake in it is said in one line."""
    with pytest.raises(ConfigError, match=message):
        MachineSpec(settings).until()


@pytest.mark.parametrize("timeout", ["soon", 0, -1, None, float("nan")])
def test_wrong_timeouts(timeout: object) -> None:
    """A time limit is a positive number of seconds."""
    with pytest.raises(ConfigError, match="is no number of seconds"):
        _ = MachineSpec({"timeout": timeout}).timeout


def test_artifacts_have_names_of_their_own() -> None:
    """Different tests get different folders, whose names a file system takes."""
    ids = ["a/test_x.py::test[a]", "a/test_x.py::test[b]", *(f"a/test_x.py::test[{'x' * 300}{n}]" for n in range(2))]
    names = [report.folder_name(each) for each in ids]
    assert len(set(names)) == len(ids)
    assert names[0] == "a-test_x.py-test-a"
    assert all(len(name) < 200 and "/" not in name for name in names)


def test_outcomes_are_explained() -> None:
    """A failed comparison of outcomes says why the guest ended as it did."""
    lines = report.explain_outcomes("==", Outcome("TIMEOUT", detail="after 3 s"), Outcome.HALTED)
    assert lines == ["<Outcome TIMEOUT: after 3 s> == <Outcome HALTED>", "it is TIMEOUT because: after 3 s"]
    lines = report.explain_outcomes("==", Outcome("DEBUG_EXIT", 3), Outcome("DEBUG_EXIT", 0))
    assert lines[1] == "debug-exit code 0x3 instead of 0x0"
