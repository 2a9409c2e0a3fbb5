"""The exception tree. Layer: below everything.

    PykvmError
    ├── HostError            this host cannot do it (CLI exit status 4)
    │   ├── KvmError         a KVM ioctl failed: .ioctl, .errno
    │   ├── KvmUnavailable   /dev/kvm is absent, forbidden, busy or of the wrong version: .reason
    │   ├── DebugUnsupported  this host's KVM cannot break, watch or step that way
    │   └── MissingCapability  .names lists every capability that is missing
    ├── UsageError           the caller's input is wrong (CLI exit status 2)
    │   ├── ConfigError      a machine option: .option
    │   ├── SnapshotError    a snapshot that is damaged, or of another machine or CPU; a machine that cannot be saved
    │   ├── ImageError       a kernel, initrd or firmware file: .path, .reason
    │   └── SymbolError      no symbol of this name: .name
    ├── GuestAddressError    an access outside guest memory: .gpa, .length
    │   └── LinearAddressError   the same by linear address: not mapped, or to where no memory is
    ├── MachineStateError    an operation that the machine's state forbids
    ├── GuestError           what a test asked of the guest did not happen: .outcome, .console (an AssertionError too)
    │   ├── ExpectError      run_until or expect: the guest ended or time ran out first
    │   └── CallError        call: the function ended the guest, or did not return: .function
    └── DeviceError          a user's device or hook raised: .device, __cause__ has the traceback

A guest that ends, however badly, is an Outcome (pykvm.core.outcome), never an exception.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pykvm.core.outcome import Outcome


class PykvmError(Exception):
    """Base of every exception that pykvm raises on purpose."""


class HostError(PykvmError):
    """This host cannot do what was asked."""


class KvmError(HostError):
    """A KVM ioctl failed. `ioctl` is its name, `errno` the kernel's answer, `advice` what to do, if known."""

    def __init__(self, ioctl: str, errno: int, advice: str = "") -> None:
        self.ioctl = ioctl
        self.errno = errno
        self.advice = advice
        text = f"{ioctl}: {os.strerror(errno)} (errno {errno})"
        super().__init__(f"{text}: {advice}" if advice else text)


class KvmUnavailable(HostError):
    """/dev/kvm cannot be used. `reason` is one of absent, permission, busy, version, other."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class MissingCapability(HostError):
    """The kernel (or the header that pykvm was built with) lacks these capabilities; all are named together."""

    def __init__(self, names: Iterable[str], why: str = "this kernel's KVM lacks") -> None:
        self.names = tuple(names)
        super().__init__(f"{why} {', '.join(self.names)}; see `pykvm doctor`")


class DebugUnsupported(HostError):
    """This host's KVM cannot stop the guest in that way; the message says what it lacks."""


class UsageError(PykvmError):
    """The caller's input is wrong; the message says what to change."""


class ConfigError(UsageError):
    """A machine option has an impossible value. `option` is its name."""

    def __init__(self, option: str, message: str) -> None:
        self.option = option
        super().__init__(f"{option}: {message}")


class ImageError(UsageError):
    """A kernel, initrd, module or firmware file cannot be loaded. `path` names it, `reason` says why."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = os.fspath(path)
        self.reason = reason
        super().__init__(f"{self.path}: {reason}")


class SnapshotError(UsageError):
    """A snapshot cannot be taken, read or restored; the message says why. Nothing was changed."""


class SymbolError(UsageError, KeyError):
    """The guest's symbols have no such name. `near` lists those that look like it."""

    def __init__(self, name: str, near: Iterable[str] = ()) -> None:
        self.name = name
        self.near = tuple(near)
        hint = f" (did you mean {' or '.join(self.near)}?)" if self.near else ""
        super().__init__(f"no symbol {name!r}{hint}")

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote it


class GuestAddressError(PykvmError, ValueError):
    """[gpa, gpa + length) is not all inside guest memory (or not writable, or not in one slot, as `why` says)."""

    def __init__(self, gpa: int, length: int, why: str = "is outside guest memory") -> None:
        self.gpa = gpa
        self.length = length
        super().__init__(f"guest physical [{gpa:#x}, {gpa + length:#x}) {why}")


class LinearAddressError(GuestAddressError):
    """[gpa, gpa + length), linear here, is not all mapped to guest memory."""

    def __init__(self, address: int, length: int, why: str) -> None:
        super().__init__(address, length)
        self.args = (f"guest linear [{address:#x}, {address + length:#x}): {why}",)


class MachineStateError(PykvmError):
    """The machine (or vCPU) is in a state that does not allow the operation."""


class GuestError(PykvmError, AssertionError):
    """What a test asked of the guest did not happen. `outcome` is how the guest ended, None if it still could run on.

    `console` has the last lines that it printed.
    """

    def __init__(self, message: str, outcome: Outcome | None, console: Sequence[str] = ()) -> None:
        self.outcome = outcome
        self.console = tuple(console)
        said = "\n".join(f"  | {line}" for line in self.console)
        super().__init__(f"{message}\nits last words:\n{said}" if said else f"{message}; it printed nothing")


class ExpectError(GuestError):
    """The guest ended, or its time was over, before it came to what was waited for."""


class CallError(GuestError):
    """A function called in the guest did not return. `function` is its name or address."""

    def __init__(self, function: str, message: str, outcome: Outcome | None, console: Sequence[str] = ()) -> None:
        self.function = function
        super().__init__(f"{function}(): {message}", outcome, console)


class DeviceError(PykvmError):
    """A user's device or hook raised inside a vCPU thread; `__cause__` carries the original traceback."""

    def __init__(self, device: str, what: str) -> None:
        self.device = device
        super().__init__(f"device {device!r} failed in {what}; the machine was stopped")
