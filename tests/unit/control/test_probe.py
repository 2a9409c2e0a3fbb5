"""What `pykvm doctor` finds out about a host, shown hosts made of files."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pykvm.control.capabilities import NEEDED, PURPOSES, REMEDIES, Capability
from pykvm.control.probe import FAIL, NOTE, OK, Check, HostReport, Places, probe

CPUINFO = "processor\t: 0\nmodel name\t: Test CPU\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\nflags\t\t: nothing\n"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host without any file."""
    return Host(tmp_path)


class Host:
    """A tree of files that stands for /dev, /proc and /sys."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.places = Places(dev=f"{root}/dev", proc=f"{root}/proc", sys=f"{root}/sys")

    def write(self, path: str, text: str) -> Host:
        """Make one file."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return self

    def cpu(self, flags: str) -> Host:
        """Let /proc/cpuinfo show these flags."""
        return self.write("proc/cpuinfo", CPUINFO.format(flags=flags))

    def check(self, name: str) -> Check:
        """What probe says of one thing."""
        found = [check for check in probe(self.places).checks if check.name == name]
        assert len(found) == 1
        return found[0]


def test_empty_host_is_unusable_but_described(host: Host) -> None:
    """A host of which nothing can be read gives a complete report: no exception, not usable."""
    report = probe(host.places)
    assert not report.usable
    failed = [check for check in report.checks if check.state == FAIL]
    assert [(check.name, check.data) for check in failed] == [("device", "absent")]
    assert "nested" in failed[0].advice
    assert report.capabilities == []
    json.dumps(report.as_dict())


def test_device_that_is_no_kvm(host: Host) -> None:
    """A /dev/kvm that does not answer KVM's ioctls is told apart from an absent one."""
    host.write("dev/kvm", "")
    device = host.check("device")
    assert (device.state, device.data) == (FAIL, "other")
    assert "not a KVM device" in device.advice


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("vmx", "modprobe kvm_intel"),
        ("svm", "modprobe kvm_amd"),
        ("hypervisor", "nested virtualisation"),
        ("", "firmware"),
    ],
)
def test_no_module_tells_the_next_step(host: Host, flags: str, words: str) -> None:
    """Without a KVM module the advice depends on what the CPU shows and on whether this is a VM."""
    module = host.cpu(flags).check("module")
    assert module.state == NOTE
    assert words in module.advice


@pytest.mark.parametrize(
    ("files", "state", "value", "words"),
    [
        ({"kvm_intel/parameters/ept": "Y", "kvm_intel/parameters/unrestricted_guest": "Y"}, OK, "VT-x", ""),
        ({"kvm_intel/parameters/ept": "N"}, NOTE, "EPT off", "ept=1"),
        ({"kvm_intel/parameters/unrestricted_guest": "N"}, NOTE, "no unrestricted guest", "real mode"),
        ({"kvm_amd/parameters/npt": "1"}, OK, "AMD-V", ""),
        ({"kvm_amd/parameters/npt": "0"}, NOTE, "NPT off", "npt=1"),
        ({"kvm_pvm/parameters/force": "N"}, NOTE, "kvm_pvm", "scripts/lab"),
    ],
)
def test_modules(host: Host, files: dict[str, str], state: str, value: str, words: str) -> None:
    """Each backend and each of its handicaps is named, with what to do."""
    for path, text in files.items():
        host.write(f"sys/module/{path}", text + "\n")
    module = host.check("module")
    assert module.state == state
    assert value in module.value
    assert words in module.advice
    assert bool(module.advice) == (state != OK)


@pytest.mark.parametrize(("text", "on"), [("Y", True), ("1", True), ("N", False), ("0", False)])
def test_nested_guests(host: Host, text: str, on: bool) -> None:
    """Both spellings of the nested parameter are understood; off names the parameter to set."""
    nested = host.write("sys/module/kvm_intel/parameters/nested", text).check("nested guests")
    assert nested.data is on
    assert nested.state == (OK if on else NOTE)
    assert on or "kvm_intel with nested=1" in nested.advice


@pytest.mark.parametrize(
    ("text", "mode", "state"),
    [
        ("always [madvise] never", "madvise", OK),
        ("[always] madvise never", "always", OK),
        ("always [never]", "never", NOTE),
    ],
)
def test_transparent_huge_pages(host: Host, text: str, mode: str, state: str) -> None:
    """The bracketed word is the mode, and only `never` wants changing."""
    check = host.write("sys/kernel/mm/transparent_hugepage/enabled", text).check("huge pages (THP)")
    assert (check.value, check.state) == (mode, state)


def test_memory_checks(host: Host) -> None:
    """hugetlbfs pool, overcommit and KSM are read, and judged."""
    host.write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "8\n")
    host.write("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "5\n")
    host.write("proc/sys/vm/overcommit_memory", "2\n").write("sys/kernel/mm/ksm/run", "1\n")
    assert host.check("huge pages (hugetlb)").data == {"total": 8, "free": 5}
    overcommit = host.check("overcommit")
    assert (overcommit.state, overcommit.value) == (NOTE, "never")
    assert host.check("KSM").state == OK
    assert "ksm/run" in host.write("sys/kernel/mm/ksm/run", "0\n").check("KSM").advice


@pytest.mark.parametrize(
    ("code", "disabled", "advice"),
    [(errno.EPERM, "2\n", "sysctl"), (errno.EPERM, "0\n", "seccomp"), (errno.ENOSYS, "", "5.12")],
)
def test_io_uring(host: Host, monkeypatch: pytest.MonkeyPatch, code: int, disabled: str, advice: str) -> None:
    """Where the kernel refuses one, the advice names who said so."""
    host.write("proc/sys/kernel/io_uring_disabled", disabled)
    monkeypatch.setattr("pykvm.control.probe.lib", SimpleNamespace(pk_uring_probe=lambda: -code))
    check = host.check("io_uring")
    assert (check.state, check.data) == (NOTE, False)
    assert advice in check.advice
    monkeypatch.setattr("pykvm.control.probe.lib", SimpleNamespace(pk_uring_probe=lambda: 0))
    assert host.check("io_uring").state == OK


def test_tun(host: Host) -> None:
    """An absent tun names the module; one that can be opened is fine."""
    assert "modprobe tun" in host.check("tun").advice
    assert host.write("dev/net/tun", "").check("tun").state == OK


@pytest.mark.parametrize(("text", "state"), [("99.50 1 1", NOTE), ("0.00 0 0", OK), ("", OK), ("x", OK)])
def test_load(host: Host, text: str, state: str) -> None:
    """A busy host is named, because it spoils the measurements."""
    assert host.write("proc/loadavg", text).check("load").state == state


def test_usable_follows_the_checks() -> None:
    """Notes do not make a host unusable, one failure does."""
    report = HostReport()
    report.checks = [Check("a", "b", OK, "c"), Check("a", "d", NOTE, "e", advice="f")]
    assert report.usable
    report.checks.append(Check("a", "g", FAIL, "h"))
    assert not report.usable
    assert report.as_dict()["usable"] is False


def test_capability_advice() -> None:
    """A capability that is there needs no advice; a missing one and one unknown to the header differ."""
    assert Capability("IRQFD", 1).advice == ""
    assert Capability("NESTED_STATE", 0).advice == REMEDIES["NESTED_STATE"]
    assert Capability("IRQFD", 0).advice
    assert "kernel headers" in Capability("GUEST_MEMFD", None).advice
    assert Capability("IRQCHIP", 1).needed
    assert not Capability("IRQFD", 1).needed


def test_capability_tables_agree() -> None:
    """What machines require is listed with a purpose, and remedies are for listed ones."""
    assert set(PURPOSES) >= NEEDED
    assert set(REMEDIES) <= set(PURPOSES)
