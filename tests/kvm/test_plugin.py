"""The pytest plugin with real guests: fixtures, reports, artifacts, and guests that hang."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import cguest
import pytest

from pykvm import Pc, SnapshotError, restore_file

# pytester forgets after each run what was imported in it: these stay
for _name in ("board", "debug.breakpoints", "debug.elfsymbols", "debug.render", "debug.stats", "testing.report"):
    import_module(f"pykvm.{_name}")
for _name in ("testing.call", "testing.machines", "testing.until", "virtio.blk"):
    import_module(f"pykvm.{_name}")
for _name in ("elftools.elf.elffile", "iced_x86"):
    import_module(_name)

QUIET = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")

SOURCE = """
volatile int touched;
__attribute__((noinline)) int touch(void) { return ++touched; }
void kmain(void) {
    print("boot\\r\\nready\\r\\n");
    for (;;) {
        char c = get();
        if (c == 'q') outb(0xf4, 5);
        if (c == 'p') outb(0x5000, 1);
        if (c == 'c') { print("going wild\\r\\n"); ((void (*)(void))0xfd000000)(); }
        if (c == 'h') for (;;) __asm__ volatile("pause");
        put(c); print(" ok\\r\\n");
    }
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SOURCE as an ELF file."""
    return cguest.build(tmp_path_factory.mktemp("plugin"), SOURCE)


@pytest.fixture
def project(pytester: pytest.Pytester, kernel: str) -> pytest.Pytester:
    """A project whose ini file names the kernel."""
    pytester.makeini(
        f"[pytest]\npykvm_kernel = {kernel}\npykvm_memory = 16M\npykvm_until = ready\npykvm_timeout = 20\n"
    )
    return pytester


def run(project: pytest.Pytester, source: str, *arguments: str) -> pytest.RunResult:
    """Run a test file."""
    project.makepyfile(source)
    return project.runpytest_inprocess(*QUIET, *arguments)


def test_vm_is_what_the_marker_says(project: pytest.Pytester) -> None:
    """The fixture vm boots the kernel with the marker's options, each test from its first instruction."""
    result = run(
        project,
        """
        import pytest

        @pytest.mark.pykvm(memory="32M", cpus=2, irqchip="split")
        @pytest.mark.parametrize("number", [1, 2])
        def test_it(vm, number):
            assert vm.config.memory == 32 << 20 and len(vm.vcpus) == 2
            assert vm.config.irqchip == "split"
            assert vm.symbols.describe(vm.regs.rip) == "_start"
            vm.console.expect("ready")
            assert vm.call("touch") == 1
        """,
    )
    result.assert_outcomes(passed=2)


def test_vm_factory_makes_several(project: pytest.Pytester) -> None:
    """vm_factory makes any number of machines with options of their own, and closes them at the end."""
    result = run(
        project,
        """
        import pytest
        made = []

        def test_two(vm_factory):
            made.extend([vm_factory(), vm_factory(memory="32M")])
            assert [vm.config.memory >> 20 for vm in made] == [16, 32]
            for vm in made:
                vm.console.expect("ready")

        def test_they_are_closed():
            import pykvm
            for vm in made:
                with pytest.raises(pykvm.MachineStateError):
                    vm.regs
        """,
    )
    result.assert_outcomes(passed=2)


def test_booted_vm_is_each_tests_own(project: pytest.Pytester) -> None:
    """Every test gets the booted guest as it was, whatever the tests before did to theirs; it was booted once."""
    result = run(
        project,
        """
        import pytest

        @pytest.mark.parametrize("number", range(5))
        def test_it(booted_vm, number):
            assert booted_vm.call("touch") == 1
            booted_vm.memory.write(booted_vm.symbols["touch"], b"\\x0f\\x0b")
            booted_vm.console.send("x")
            booted_vm.console.expect("x ok")

        def test_once(pykvm_boots):
            assert len(pykvm_boots.booted) == 1
        """,
    )
    result.assert_outcomes(passed=6)


@pytest.mark.parametrize("method", ["snapshot", "fork"])
def test_what_cannot_be_forked_is_booted_again(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """With a device that cannot be saved each test still gets a booted guest of its own, and a warning says why."""

    def refuse(*arguments: object) -> None:
        raise SnapshotError("tape cannot be saved")

    monkeypatch.setattr(Pc, method, refuse)
    result = run(
        project,
        """
        import pytest

        @pytest.mark.parametrize("number", range(2))
        def test_it(booted_vm, number):
            assert booted_vm.call("touch") == 1
            booted_vm.console.send("x")
            booted_vm.console.expect("x ok")
        """,
    )
    result.assert_outcomes(passed=2, warnings=1)
    result.stdout.fnmatch_lines(["*booted_vm boots anew for every test: tape cannot be saved"])


SIGNALS = """
__attribute__((noinline)) void later(void) { print("later\\r\\n"); }
void kmain(void) {
    print("early\\r\\n"); later(); outb(0xf4, 9); print("at last\\r\\n"); for (;;) __asm__ volatile("cli\\nhlt");
}
"""


def test_how_far_a_boot_goes(pytester: pytest.Pytester) -> None:
    """A boot ends at a console line, a debug-exit, a port write or a function, and each fork goes on from there."""
    cguest.build(pytester.path, SIGNALS)
    result = run(
        pytester,
        """
        import pytest

        UNTIL = ["early", "debug_exit", "debug_exit:9", "port_write:0xf4=9", "rip:later", {"rip": "later"}]
        WAYS = [pytest.param(each, marks=pytest.mark.pykvm("guest64.elf", until=each)) for each in UNTIL]

        @pytest.mark.parametrize("way", WAYS)
        @pytest.mark.parametrize("number", range(2))
        def test_it(booted_vm, way, number):
            if "rip" in way:
                assert booted_vm.regs.rip == booted_vm.symbols["later"]
                assert booted_vm.run().code == 9
            outcome = booted_vm.run()
            if way == "early" and outcome.kind == "DEBUG_EXIT":
                outcome = booted_vm.run()
            assert outcome.kind == "HALTED"
            booted_vm.console.expect("at last")
        """,
    )
    result.assert_outcomes(passed=12)


def test_a_failed_test_tells_of_its_guest(project: pytest.Pytester, kernel: str) -> None:
    """The report has the outcome, the crash report, the place, the exits and the console; files have it as well."""
    result = run(
        project,
        """
        from pykvm import Outcome

        def test_it(booted_vm):
            booted_vm.console.send("c")
            assert booted_vm.run() == Outcome.HALTED
        """,
        "--pykvm-artifacts=saved",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines_random([
        "E * it is CRASH because: KVM_EXIT_INTERNAL_ERROR, suberror 1",
        "*- pykvm vm -*",
        "outcome: <Outcome CRASH: *>",
        "vCPU 0: rip 0xfd000000",
        "exits: IO *",
        "*KVM_EXIT_INTERNAL_ERROR*",
        "  | going wild",
        "artifacts: *saved*",
    ])  # fmt: skip
    (folder,) = (project.path / "saved").iterdir()
    assert b"going wild" in (folder / "vm" / "console.log").read_bytes()
    assert "KVM_EXIT_INTERNAL_ERROR" in (folder / "vm" / "crash.txt").read_text()
    assert json.loads((folder / "vm" / "crash.json").read_text())["kind"] == "CRASH"
    state = json.loads((folder / "vm" / "machine.json").read_text())
    assert state["outcome"]["kind"] == "CRASH"
    assert state["vcpus"][0]["registers"]["rip"] == "0xfd000000"


def test_artifacts_may_have_a_snapshot(project: pytest.Pytester) -> None:
    """With --pykvm-artifact-snapshots the failed test's machine is saved, to be looked at or to run on."""
    run(
        project,
        """
        def test_it(booted_vm):
            assert booted_vm.call("touch") == 1
            booted_vm.console.send("x")
            booted_vm.console.expect("x ok")
            assert booted_vm.memory.read_u32(booted_vm.symbols["touched"]) == 2
        """,
        "--pykvm-artifacts=saved",
        "--pykvm-artifact-snapshots",
    ).assert_outcomes(failed=1)
    (path,) = (project.path / "saved").glob("*/vm/snapshot.pykvm")
    with restore_file(str(path)) as machine:
        assert machine.call("touch") == 2
        machine.console.send("y")
        machine.console.expect("y ok")


def test_a_passed_test_leaves_nothing(project: pytest.Pytester) -> None:
    """Artifacts are of failed tests only."""
    result = run(project, "def test_it(vm): vm.console.expect('ready')", "--pykvm-artifacts=saved")
    result.assert_outcomes(passed=1)
    assert not (project.path / "saved").exists()


@pytest.mark.parametrize("wait", ["vm.run()", "vm.start(); vm.wait()", "vm.console.expect('never', timeout=None)"])
def test_a_hung_guest_is_stopped(project: pytest.Pytester, wait: str) -> None:
    """A test that waits for ever for its guest gets a TIMEOUT when the test's time is used up."""
    result = run(
        project,
        f"""
        import pytest

        @pytest.mark.pykvm(timeout=0.4)
        def test_it(booted_vm):
            vm = booted_vm
            vm.console.send("h")
            {wait}
            assert vm.outcome is None
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["outcome: <Outcome TIMEOUT: its 0.4 s of guest-run time are used up>", "vCPU 0: * kmain*"]
    )


def test_a_device_that_hangs_fails_its_test_only(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python code of a device that does not return is reported, and the test run goes on."""
    monkeypatch.setattr("pykvm.core.machine.STOP_TIMEOUT_S", 0.2)
    result = run(
        project,
        """
        import threading
        import pytest
        import pykvm

        gate = threading.Event()

        class Stuck(pykvm.Device):
            name = "stuck"

            def write(self, offset, size, value):
                gate.wait(60)

        @pytest.mark.pykvm(timeout=0.2)
        def test_it(booted_vm):
            booted_vm.attach(Stuck(), ports=range(0x5000, 0x5001))
            booted_vm.console.send("p")
            booted_vm.run()

        def test_next(booted_vm):
            gate.set()
            booted_vm.console.send("x")
            booted_vm.console.expect("x ok")
        """,
    )
    result.assert_outcomes(passed=1, failed=1, errors=1)
    result.stdout.fnmatch_lines_random(["E *does not stop: a device's code hangs", "*hangs in a device's code*"])


def test_a_boot_that_fails_fails_each_test(project: pytest.Pytester) -> None:
    """The boot is tried once; every test that wants it gets the same message, and sees the guest."""
    result = run(
        project,
        """
        import pytest

        @pytest.mark.pykvm(until="never", timeout=0.2)
        @pytest.mark.parametrize("number", range(2))
        def test_it(booted_vm, number):
            pass
        """,
    )
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines([
        "the guest ran for 0.2 s and did not come to the text 'never'",
        "*- pykvm boot -*",
        "vCPU 0: *",
    ])  # fmt: skip
    result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("kernel='nowhere.elf'", "kernel: no such file: *nowhere.elf"),
        ("memory='lots'", "memory: 'lots' is no size*"),
        ("colour='red'", "colour: neither pykvm.Pc nor `pykvm start` has an option of this name"),
        ("disks=['gone.img']", "disks: no such file: *gone.img"),
        ("timeout='never'", "timeout: 'never' is no number of seconds"),
    ],
)
def test_mistakes_are_one_line(project: pytest.Pytester, marker: str, message: str) -> None:
    """A mistake in the marker is an error of one line, without the plugin's insides."""
    result = run(project, f"import pytest\n@pytest.mark.pykvm({marker})\ndef test_it(vm): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])
    result.stdout.no_fnmatch_line("*pykvm/testing*")
    result.stdout.no_fnmatch_line("*another exception*")


def test_a_disk_is_there(project: pytest.Pytester) -> None:
    """disks= are files beside the test, in the words of `pykvm start --disk`."""
    (project.path / "disk.img").write_bytes(bytes(4096))
    result = run(
        project,
        """
        import pytest

        @pytest.mark.pykvm(disks=["disk.img,ro"])
        def test_it(vm):
            assert len(vm.virtio) == 1
        """,
    )
    result.assert_outcomes(passed=1)


def test_workers_share_nothing(project: pytest.Pytester) -> None:
    """With pytest-xdist each worker boots its own, and the reports of all come together."""
    project.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(6))
        def test_it(booted_vm, number):
            assert booted_vm.call("touch") == 1
            assert number != 5
        """
    )
    result = project.runpytest_subprocess("-n2", *QUIET, "--pykvm-artifacts=saved")
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(["*- pykvm vm -*", "  | ready"])
    assert len(list((project.path / "saved").iterdir())) == 1


def test_the_example(pytester: pytest.Pytester) -> None:
    """The example project's own tests pass, spread over two workers."""
    example = Path(__file__).resolve().parents[2] / "images" / "example"
    result = pytester.runpytest_subprocess(
        str(example), "-c", str(example / "pytest.ini"), "--rootdir", str(example), "-n2", *QUIET
    )
    assert result.ret == 0
    result.assert_outcomes(passed=26)
