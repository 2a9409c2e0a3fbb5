"""The machines of one test, and those that a session boots once. Layer: programs."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest

from pykvm.errors import GuestError, KvmUnavailable, MissingCapability, SnapshotError, UsageError
from pykvm.kvm.system import Kvm
from pykvm.testing.spec import MachineSpec, spec_of
from pykvm.testing.watchdog import Watchdog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn, Protocol

    from pykvm.board import Pc
    from pykvm.snapshot.state import Snapshot

    class MachineFactory(Protocol):
        """What the fixture vm_factory is."""

        def __call__(self, kernel: str | None = None, **options: Any) -> Pc: ...


kvm_key = pytest.StashKey["Kvm | str"]()  # the session's open /dev/kvm, or why there is none


def host_kvm(config: pytest.Config) -> Kvm:
    """The session's /dev/kvm; without one the test is skipped, or fails under --pykvm-require."""
    found = config.stash.get(kvm_key, None)
    if found is None:
        try:
            found = Kvm()
            config.add_cleanup(found.close)
        except KvmUnavailable as problem:
            found = str(problem)
        config.stash[kvm_key] = found
    if isinstance(found, str):
        give_up(config, found)
    return found


def give_up(config: pytest.Config, reason: str) -> NoReturn:
    """Skip the test because of the host, or fail it under --pykvm-require."""
    if config.getoption("--pykvm-require"):
        pytest.fail(f"--pykvm-require: {reason}", pytrace=False)
    pytest.skip(reason)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Fail a fixture with the message alone where that says everything: a mistake in the marker, a boot that failed."""
    try:
        yield
    except (UsageError, GuestError) as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


class Machines:
    """The machines of the test `item`. `named` has them as they were made."""

    def __init__(self, item: pytest.Item, kernel: str | None) -> None:
        self.item = item
        self.named: list[tuple[str, Pc]] = []
        self._kernel = kernel
        self._forked_from: Boot | None = None

    def spec(self, **options: Any) -> MachineSpec:
        """What the test's marker and `options` describe."""
        return spec_of(self.item, self._kernel, options)

    def make(self, kernel: str | None = None, **options: Any) -> Pc:
        """A machine before its first instruction."""
        kvm = host_kvm(self.item.config)
        spec = self.spec(**({} if kernel is None else {"kernel": kernel}), **options)
        try:
            machine = spec.build(kvm)
        except MissingCapability as problem:
            give_up(self.item.config, str(problem))
        return self._take(machine, spec)

    def fork_of(self, boots: Boots) -> Pc:
        """A fork of the machine that the session has booted as the marker says."""
        host_kvm(self.item.config)
        spec = self.spec()
        self._forked_from = boot = boots.get(spec)
        return self._take(boot.fork(), spec)

    def _take(self, machine: Pc, spec: MachineSpec) -> Pc:
        count = len(self.named)
        self.named.append(("vm" if not count else f"vm {count + 1}", machine))
        Watchdog(machine, spec.timeout)
        return machine

    @property
    def booted_as(self) -> Pc | None:
        """The machine that the session booted, and that booted_vm is a fork of."""
        return self._forked_from.machine if self._forked_from is not None else None

    def close(self) -> None:
        """Close them all, whatever they do; the first problem is raised at the end."""
        if self._forked_from is not None and self.named:
            self._forked_from.learn(self.named[0][1])
        problems: list[BaseException] = []
        while self.named:
            try:
                self.named.pop()[1].close()
            except Exception as problem:
                problems.append(problem)
        if problems:
            raise problems[0]


class Boot:
    """One machine that was booted, or what went wrong: then each test that wants it hears the same."""

    def __init__(self, machine: Pc, spec: MachineSpec) -> None:
        self.machine = machine
        self._spec = spec
        self._snapshot: Snapshot | None = None
        self.error: GuestError | None = None
        try:
            machine.run_until(**spec.until(), timeout=spec.timeout)
        except GuestError as error:
            self.error = error
            return
        try:
            self._snapshot = machine.snapshot()
        except SnapshotError as problem:
            _warn_of_boots(problem)

    def fork(self) -> Pc:
        """A new machine that goes on where the boot ended. Raises the boot's GuestError."""
        if self.error is not None:
            raise self.error.with_traceback(None)
        if self._snapshot is not None:
            try:
                return self.machine.fork(self._snapshot)
            except SnapshotError as problem:
                self._snapshot = None
                _warn_of_boots(problem)
        return self._boot_again()

    def _boot_again(self) -> Pc:
        machine = self._spec.build(self.machine.kvm)
        try:
            machine.run_until(**self._spec.until(), timeout=self._spec.timeout)
        except BaseException:
            machine.close()
            raise
        machine.share_symbols(self.machine)
        return machine

    def learn(self, fork: Pc) -> None:
        """Keep the symbols that a fork had to read: the next ones need not."""
        self.machine.share_symbols(fork)


def _warn_of_boots(problem: SnapshotError) -> None:
    warnings.warn(pytest.PytestWarning(f"booted_vm boots anew for every test: {problem}"), stacklevel=2)


class Boots:
    """The booted machines of a session, by what they booted."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self.booted: dict[str, Boot] = {}

    def get(self, spec: MachineSpec) -> Boot:
        """The machine of `spec`, booted now if it is the first test that wants it."""
        boot = self.booted.get(spec.key)
        if boot is None:
            boot = self.booted[spec.key] = self._boot(spec)
        return boot

    def _boot(self, spec: MachineSpec) -> Boot:
        spec.until()  # a mistake in it costs no machine
        try:
            machine = spec.build(host_kvm(self._config), **({} if "hugepages" in spec.settings else {"memfd": True}))
        except MissingCapability as problem:
            give_up(self._config, str(problem))
        try:
            return Boot(machine, spec)
        except BaseException:
            machine.close()
            raise

    def close(self) -> None:
        """Close them all."""
        for boot in self.booted.values():
            boot.machine.close()
