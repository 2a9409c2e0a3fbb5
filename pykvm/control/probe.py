"""Facts about this host: what `pykvm doctor` shows. Layer: control.

`probe` collects; nothing here prints. Every check is a Check: a state, a value for people, and for whatever is not as
it should be what to do about it. Paths can be replaced, so that a test can show it any host.
"""

from __future__ import annotations

import errno
import os

from pykvm._native import lib
from pykvm.control.capabilities import PURPOSES, Capability
from pykvm.debug.host import detect_backend, is_yes, read_line
from pykvm.errors import KvmUnavailable, PykvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.debug.host import Backend
    from pykvm.kvm.system import Kvm

OK, NOTE, FAIL = "ok", "note", "fail"  # as it should be; pykvm works, with less; pykvm cannot run machines

LAB = "use `scripts/lab`, or a machine with VT-x or AMD-V"


class Check:
    """One thing that was looked at. `data` is the bare value for programs."""

    __slots__ = ("advice", "data", "group", "name", "state", "value")

    def __init__(self, group: str, name: str, state: str, value: str, *, advice: str = "", data: object = None) -> None:
        self.group = group
        self.name = name
        self.state = state
        self.value = value
        self.advice = advice
        self.data = value if data is None else data

    def __repr__(self) -> str:
        return f"<Check {self.group}/{self.name}: {self.state}, {self.value}>"

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {
            "group": self.group,
            "name": self.name,
            "state": self.state,
            "value": self.data,
            "text": self.value,
            "advice": self.advice,
        }


class Places:
    """Where the host's facts are read: replaced in tests."""

    __slots__ = ("dev", "proc", "sys")

    def __init__(self, *, dev: str = "/dev", proc: str = "/proc", sys: str = "/sys") -> None:
        self.dev = dev
        self.proc = proc
        self.sys = sys


class HostReport:
    """All checks and capabilities. `usable`: pykvm can run machines here."""

    __slots__ = ("capabilities", "checks")

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.capabilities: list[Capability] = []

    @property
    def usable(self) -> bool:
        """Whether no check failed."""
        return all(check.state != FAIL for check in self.checks)

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {
            "usable": self.usable,
            "checks": [check.as_dict() for check in self.checks],
            "capabilities": [capability.as_dict() for capability in self.capabilities],
        }


def probe(places: Places | None = None) -> HostReport:
    """Look at everything; takes a few hundred milliseconds, most of them for the measuring guests."""
    places = places or Places()
    report = HostReport()
    backend = detect_backend(places.sys)
    flags = cpu_flags(places)
    report.checks += [_cpu(places, flags), _virtualised(flags), _kernel(places), _load(places)]
    report.checks += [_module(backend, flags, places)]
    kvm = _open_device(report, places)
    if kvm is not None:
        with kvm:
            _look_at_kvm(report, kvm, backend)
    report.checks += [_nested(backend, places), *_memory(places), _ksm(places), _tun(places), _uring(places)]
    return report


# -- the processor and its module ----------------------------------------------------------------------------


def cpu_flags(places: Places) -> frozenset[str]:
    """The flags of the first processor in /proc/cpuinfo."""
    return frozenset(_cpuinfo(places).get("flags", "").split())


def _cpuinfo(places: Places) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in (read_line(f"{places.proc}/cpuinfo", limit=16384) or "").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


def _cpu(places: Places, flags: frozenset[str]) -> Check:
    extension = "VT-x" if "vmx" in flags else "AMD-V" if "svm" in flags else "neither VT-x nor AMD-V"
    model = _cpuinfo(places).get("model name", "unknown model")
    return Check("host", "processor", OK, f"{model}, {extension}", data={"model": model, "extension": extension})


def _virtualised(flags: frozenset[str]) -> Check:
    inside = "hypervisor" in flags
    return Check("host", "runs on", OK, "a hypervisor (this is a VM)" if inside else "bare metal", data=inside)


def _kernel(places: Places) -> Check:
    return Check("host", "kernel", OK, read_line(f"{places.proc}/sys/kernel/osrelease") or "unknown")


def _load(places: Places) -> Check:
    cpus = os.cpu_count() or 1
    first = (read_line(f"{places.proc}/loadavg") or "").split()[:1]
    load = first[0] if first and first[0].replace(".", "", 1).isdigit() else "0"
    busy = float(load) > cpus
    advice = "the measurements below are too slow: repeat them on an idle host" if busy else ""
    value = f"{load} on {cpus} CPUs"
    return Check("host", "load", NOTE if busy else OK, value, advice=advice, data=float(load))


def _module(backend: Backend, flags: frozenset[str], places: Places) -> Check:
    data = {"backend": backend.name, "module": backend.module, "interpreted": backend.interpreted}
    if not backend.name:
        if flags & {"vmx", "svm"}:
            module = "kvm_intel" if "vmx" in flags else "kvm_amd"
            advice = f"run `sudo modprobe {module}`; if that fails, `dmesg | grep -i kvm` says why"
        elif "hypervisor" in flags:
            advice = (
                "this VM's CPU shows no VT-x or AMD-V: ask its host for nested virtualisation (QEMU: -cpu host and "
                "kvm_intel/kvm_amd nested=1; clouds: an instance type that allows it)"
            )
        else:
            advice = "enable VT-x (Intel) or SVM (AMD) in the firmware's set-up"
        return Check("KVM", "module", NOTE, "none loaded", advice=advice, data=data)
    if backend.name == "pvm":
        advice = f"small kernels run, a stock Linux does not: for that {LAB}"
        return Check("KVM", "module", NOTE, "kvm_pvm (no VT-x, no AMD-V)", advice=advice, data=data)
    parameters = f"{places.sys}/module/{backend.module}/parameters"
    name, paging = ("VT-x", "ept") if backend.name == "vmx" else ("AMD-V", "npt")
    value = f"{backend.module} ({name})" if backend.name in ("vmx", "svm") else backend.module
    if read_line(f"{parameters}/{paging}") in ("N", "0"):
        advice = f"guest page faults are slow without nested paging: load {backend.module} with {paging}=1"
        return Check("KVM", "module", NOTE, f"{value}, {paging.upper()} off", advice=advice, data=data)
    if backend.interpreted:
        advice = "old CPU, or kvm_intel was loaded with unrestricted_guest=0: real mode is interpreted"
        return Check("KVM", "module", NOTE, f"{value}, no unrestricted guest", advice=advice, data=data)
    return Check("KVM", "module", OK, value, data=data)


def _nested(backend: Backend, places: Places) -> Check:
    on = bool(backend.module) and is_yes(read_line(f"{places.sys}/module/{backend.module}/parameters/nested"))
    if on:
        return Check("KVM", "nested guests", OK, "guests can run guests", data=True)
    advice = f"for hypervisors as guests: load {backend.module} with nested=1" if backend.name in ("vmx", "svm") else ""
    return Check("KVM", "nested guests", NOTE, "no", advice=advice or f"for hypervisors as guests {LAB}", data=False)


# -- /dev/kvm ------------------------------------------------------------------------------------------------


def _open_device(report: HostReport, places: Places) -> Kvm | None:
    from pykvm.kvm.system import Kvm

    path = f"{places.dev}/kvm"
    try:
        kvm = Kvm(path)
    except KvmUnavailable as error:
        report.checks.append(
            Check("KVM", "device", FAIL, f"{path}: {error.reason}", advice=str(error), data=error.reason)
        )
        return None
    owner = _ownership(path)
    report.checks.append(Check("KVM", "device", OK, f"{path} opens, API {kvm.api_version()}, {owner}"))
    return kvm


def _ownership(path: str) -> str:
    """Who else may open it: "root:kvm 0660"."""
    import grp
    import pwd
    import stat

    status = os.stat(path)
    try:
        names = f"{pwd.getpwuid(status.st_uid).pw_name}:{grp.getgrgid(status.st_gid).gr_name}"
    except KeyError:
        names = f"{status.st_uid}:{status.st_gid}"
    return f"{names} {stat.S_IMODE(status.st_mode):04o}"


def _look_at_kvm(report: HostReport, kvm: Kvm, backend: Backend) -> None:
    try:
        report.capabilities = read_capabilities(kvm)
        report.checks.append(_capabilities(report.capabilities))
        report.checks += _measurements(kvm, backend)
    except PykvmError as error:
        report.checks.append(Check("KVM", "test guest", FAIL, "does not run", advice=str(error)))


def read_capabilities(kvm: Kvm) -> list[Capability]:
    """The values of all capabilities in PURPOSES, asked of a VM, which knows more than /dev/kvm itself."""
    from pykvm._native import lib

    with kvm.create_vm() as vm:
        numbers = {name: getattr(lib, f"KVM_CAP_{name}", None) for name in PURPOSES}
        return [
            Capability(name, None if number is None else vm.ioctl_value("KVM_CHECK_EXTENSION", number))
            for name, number in numbers.items()
        ]


def _capabilities(found: list[Capability]) -> Check:
    there = sum(bool(each.value) for each in found)
    lacking = [each.name for each in found if each.needed and not each.value]
    value = f"{there} of {len(found)} that pykvm uses"
    if lacking:
        advice = f"without {', '.join(lacking)} no machine can run: use a newer kernel"
        return Check("KVM", "capabilities", FAIL, value, advice=advice, data=there)
    return Check("KVM", "capabilities", OK, value, data=there)


def _measurements(kvm: Kvm, backend: Backend) -> list[Check]:
    from pykvm.control import measure

    checks = [_speed("ring 0", measure.ring0_speed(kvm)), _speed("real mode", measure.real_mode_speed(kvm))]
    if checks[0].state != OK:
        lacks = measure.missing_instructions(kvm)
        if lacks:
            advice = f"a kernel that uses them ends with an internal error of KVM: {LAB}"
            checks.append(Check("KVM", "ring 0 lacks", NOTE, ", ".join(lacks), advice=advice, data=lacks))
    in_c, in_python = measure.exit_costs_us(kvm)
    value = f"{in_c:.2f} us answered in C, {in_python:.2f} us by a Python device"
    checks.append(Check("KVM", "exit cost", OK, value, data={"c_us": round(in_c, 3), "python_us": round(in_python, 3)}))
    life = measure.lifecycle_ms(kvm)
    checks.append(
        Check("KVM", "machine's life", OK, f"{life:.2f} ms to create, run to HLT, close", data=round(life, 3))
    )
    return checks


def _speed(name: str, speed: float) -> Check:
    from pykvm.control.measure import NATIVE_THRESHOLD

    data = {"native": speed >= NATIVE_THRESHOLD, "instructions_per_second": round(speed)}
    if speed >= NATIVE_THRESHOLD:
        return Check("KVM", name, OK, f"native ({speed / 1e6:.0f} M instructions/s)", data=data)
    advice = f"keep loops in {name} short, do bulk work in ring 3" if name == "ring 0" else "leave real mode early"
    value = f"interpreted ({speed / 1e6:.1f} M instructions/s)"
    return Check("KVM", name, NOTE, value, advice=advice, data=data)


# -- memory and network --------------------------------------------------------------------------------------


def _memory(places: Places) -> list[Check]:
    thp = read_line(f"{places.sys}/kernel/mm/transparent_hugepage/enabled") or ""
    mode = thp[thp.find("[") + 1 : thp.find("]")] if "[" in thp else "not built in"
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    advice = "" if mode in ("always", "madvise") else f"for --hugepages: `echo madvise | sudo tee {path}`"
    checks = [Check("memory", "huge pages (THP)", NOTE if advice else OK, mode, advice=advice)]

    pool = f"{places.sys}/kernel/mm/hugepages/hugepages-2048kB"
    total, free = (_number(read_line(f"{pool}/{name}_hugepages")) for name in ("nr", "free"))
    advice = "" if total else "for shared memory in huge pages: `sudo sysctl vm.nr_hugepages=256` (512 MiB)"
    value = f"{free} of {total} pages of 2 MiB free"
    checks.append(
        Check(
            "memory",
            "huge pages (hugetlb)",
            OK if total else NOTE,
            value,
            advice=advice,
            data={"total": total, "free": free},
        )
    )
    policy = _number(read_line(f"{places.proc}/sys/vm/overcommit_memory"))
    names = {0: "heuristic", 1: "always", 2: "never"}
    advice = "guest RAM is charged when it is mapped: `sudo sysctl vm.overcommit_memory=0`" if policy == 2 else ""
    checks.append(
        Check("memory", "overcommit", NOTE if advice else OK, names.get(policy, "unknown"), advice=advice, data=policy)
    )
    return checks


def _ksm(places: Places) -> Check:
    run = read_line(f"{places.sys}/kernel/mm/ksm/run")
    if run == "1":
        return Check("memory", "KSM", OK, "merges equal pages", data=True)
    value = "not built in" if run is None else "off"
    advice = "" if run is None else "to share equal pages of many machines: `echo 1 | sudo tee /sys/kernel/mm/ksm/run`"
    return Check("memory", "KSM", NOTE, value, advice=advice or "needs a kernel with CONFIG_KSM", data=False)


def _tun(places: Places) -> Check:
    path = f"{places.dev}/net/tun"
    if not os.path.exists(path):
        return Check("network", "tun", NOTE, f"no {path}", advice="for tap networks: `sudo modprobe tun`", data=False)
    if not os.access(path, os.R_OK | os.W_OK):
        advice = f"for tap networks let a udev rule or root open it: `sudo chmod 0666 {path}`"
        return Check("network", "tun", NOTE, f"{path}: no permission", advice=advice, data=False)
    return Check("network", "tun", OK, f"{path} can be opened", data=True)


def _uring(places: Places) -> Check:
    failed = -lib.pk_uring_probe()
    if not failed:
        return Check("disk", "io_uring", OK, "requests of a disk run side by side", data=True)
    if read_line(f"{places.proc}/sys/kernel/io_uring_disabled") in ("1", "2"):
        advice = "allow it by `sudo sysctl kernel.io_uring_disabled=0`"
    elif failed == errno.ENOSYS:
        advice = "needs Linux 5.12 or newer, and a container that allows it"
    else:
        advice = "let the container's seccomp profile allow io_uring_setup, io_uring_enter and io_uring_register"
    value = f"{os.strerror(failed)}: slow requests of a disk wait for each other"
    return Check("disk", "io_uring", NOTE, value, advice=advice, data=False)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else 0
