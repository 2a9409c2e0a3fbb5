"""What the numbers of fatal exits mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.debug.decode import (
    ExitFacts,
    decode,
    describe_entry_failure,
    describe_hardware_exit,
    instruction_bytes,
)
from pykvm.debug.host import detect_backend


def emulation_data(code: bytes, *extra: int) -> list[int]:
    """internal.data of an emulation failure with instruction bytes, as KVM lays it out."""
    raw = bytes([len(code)]) + code.ljust(15, b"\x90")
    return [1, int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little"), *extra]


def test_instruction_bytes_need_their_flag() -> None:
    """The bytes count only when the flag says that they are there, and at most 15 of them."""
    data = emulation_data(b"\xf3\x0f\xb8\xc0")
    assert instruction_bytes(data) == b"\xf3\x0f\xb8\xc0"
    assert instruction_bytes([0, *data[1:]]) == b""
    assert instruction_bytes(data[:2]) == b""
    assert len(instruction_bytes([1, 0xFF, 0])) == 15


@pytest.mark.parametrize(
    ("suberror", "name"),
    [
        (1, "KVM_INTERNAL_ERROR_EMULATION"),
        (2, "KVM_INTERNAL_ERROR_SIMUL_EX"),
        (3, "KVM_INTERNAL_ERROR_DELIVERY_EV"),
        (4, "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON"),
        (99, "unknown"),
    ],
)
def test_suberrors_are_named(suberror: int, name: str) -> None:
    """Every suberror of the header has its name, others say that they are unknown."""
    reason = decode(ExitFacts("INTERNAL_ERROR", suberror=suberror, data=[0x30]))
    assert reason.name == "KVM_EXIT_INTERNAL_ERROR"
    assert f"suberror {suberror} ({name})" in reason.details
    assert reason.emulation is (suberror == 1)


def test_emulation_debug_words() -> None:
    """Words after the instruction are shown; the first is the hardware's exit reason where that has a meaning."""
    facts = ExitFacts("INTERNAL_ERROR", suberror=1, data=emulation_data(b"\x0f\x0b", 48, 0x181))
    assert "hardware exit 48 (EPT violation)" in decode(facts, backend="vmx").details
    assert decode(facts, backend="pvm").details[1:] == ["debug data 0x30 0x181"]


def test_delivery_error_names_event_and_exit() -> None:
    """Suberror 3 tells which event was on its way and what interrupted it."""
    facts = ExitFacts("INTERNAL_ERROR", suberror=3, data=[0x80000B0E, 48, 0x181])
    details = "\n".join(decode(facts, backend="vmx").details)
    assert "exception #PF page fault" in details
    assert "48 (EPT violation)" in details
    external = ExitFacts("INTERNAL_ERROR", suberror=3, data=[0x80000020, 0x400])
    details = "\n".join(decode(external, backend="svm").details)
    assert "external interrupt 32" in details
    assert "nested page fault" in details


@pytest.mark.parametrize(
    ("code", "backend", "text"),
    [
        (0x80000021, "vmx", "VMX exit reason 33, VM-entry failure: invalid guest state"),
        (0x80000022, "vmx", "VMX exit reason 34, VM-entry failure: MSR loading"),
        (0x80000029, "vmx", "VMX exit reason 41, VM-entry failure: machine check"),
        (0x80000021, "", "VMX exit reason 33, VM-entry failure: invalid guest state"),
        (7, "vmx", "VM-instruction error 7, VM entry with invalid control fields"),
        (0xFFFFFFFF, "svm", "invalid VMCB: VMRUN found the guest's state inconsistent"),
        (0xFFFFFFFFFFFFFFFF, "svm", "invalid VMCB: VMRUN found the guest's state inconsistent"),
        (0x7F, "svm", "SVM exit code 0x7f (shutdown (triple fault))"),
        (0x1234, "", "code 0x1234"),
    ],
)
def test_entry_failures(code: int, backend: str, text: str) -> None:
    """FAIL_ENTRY's hardware reason in words, for both vendors."""
    assert describe_entry_failure(code, backend) == text
    facts = ExitFacts("FAIL_ENTRY", hardware_reason=code, cpu=3)
    assert decode(facts, backend=backend).details == [f"hardware reason {code:#x} on host CPU 3: {text}"]


@pytest.mark.parametrize(
    ("code", "backend", "text"),
    [
        (0, "vmx", "0 (exception or NMI)"),
        (12, "vmx", "12 (HLT)"),
        (55, "vmx", "55 (XSETBV)"),
        (75, "vmx", "75 (notify)"),
        (35, "vmx", "35 (unknown)"),
        (0x80000021, "vmx", "33 (VM-entry failure: invalid guest state) (VM entry failed)"),
        (0x10, "svm", "0x10 (write of CR0)"),
        (0x27, "svm", "0x27 (read of DR7)"),
        (0x4E, "svm", "0x4e (exception #PF page fault)"),
        (0x7C, "svm", "0x7c (MSR access)"),
        (0x999, "svm", "0x999 (unknown)"),
        (0x43, "pvm", "0x43"),
    ],
)
def test_hardware_exits(code: int, backend: str, text: str) -> None:
    """Exit reasons of VT-x and exit codes of AMD-V, spot checks over the whole tables."""
    assert describe_hardware_exit(code, backend) == text


@pytest.mark.parametrize(
    ("facts", "name", "words"),
    [
        (ExitFacts("SHUTDOWN"), "KVM_EXIT_SHUTDOWN", "triple fault"),
        (ExitFacts("UNKNOWN", hardware_reason=0x9C), "KVM_EXIT_UNKNOWN", "0x9c"),
        (ExitFacts("EXCEPTION", vector=13, error_code=8), "KVM_EXIT_EXCEPTION", "protection, error code 0x8"),
        (
            ExitFacts("MEMORY_FAULT", gpa=0x1000, size=0x2000, flags=8),
            "KVM_EXIT_MEMORY_FAULT",
            "[0x1000, 0x3000) (a private page)",
        ),
        (ExitFacts("SYSTEM_EVENT", event=3), "KVM_EXIT_SYSTEM_EVENT", "crash"),
        (ExitFacts("NOTIFY"), "KVM_EXIT_NOTIFY", "cannot continue"),
        (ExitFacts("reason 39"), "exit reason 39", "cannot continue"),
    ],
)  # fmt: skip
def test_other_reasons(facts: ExitFacts, name: str, words: str) -> None:
    """Each reason has its name and its own facts."""
    reason = decode(facts)
    assert reason.name == name
    assert words in "\n".join([reason.title, *reason.details])


@given(
    st.builds(
        ExitFacts,
        st.sampled_from(["INTERNAL_ERROR", "FAIL_ENTRY", "UNKNOWN", "EXCEPTION", "MEMORY_FAULT", "SYSTEM_EVENT", "X"]),
        suberror=st.integers(0, 2**32 - 1) | st.integers(0, 5),
        data=st.lists(st.integers(0, 2**64 - 1), max_size=20),
        hardware_reason=st.integers(0, 2**64 - 1),
        vector=st.integers(0, 2**32 - 1),
        gpa=st.integers(0, 2**64 - 1),
        size=st.integers(0, 2**64 - 1),
        event=st.integers(0, 2**32 - 1),
    ),
    st.sampled_from(["", "vmx", "svm", "pvm", "other"]),
)  # fmt: skip
def test_every_exit_decodes(facts: ExitFacts, backend: str) -> None:
    """Whatever kvm_run holds, there is a title and only one-line details."""
    reason = decode(facts, backend=backend)
    assert reason.title
    assert all(line and "\n" not in line for line in reason.details)
    assert len(reason.instruction) <= 15


@pytest.mark.parametrize(
    ("files", "name", "interpreted"),
    [
        ({"kvm_intel/parameters/unrestricted_guest": "Y\n"}, "vmx", ""),
        ({"kvm_intel/parameters/unrestricted_guest": "N\n"}, "vmx", "real mode"),
        ({"kvm_amd/parameters/npt": "Y\n"}, "svm", ""),
        ({"kvm_pvm/parameters/force": "N\n"}, "pvm", "ring 0"),
        ({"kvm/parameters/halt_poll_ns": "0\n"}, "other", ""),
        ({}, "", ""),
    ],
)
def test_backend_detection(tmp_path: object, files: dict[str, str], name: str, interpreted: str) -> None:
    """The backend is the module that sysfs shows, and says what KVM interprets there."""
    from pathlib import Path

    root = Path(str(tmp_path))
    for path, text in files.items():
        file = root / "module" / path
        file.parent.mkdir(parents=True)
        file.write_text(text)
    backend = detect_backend(str(root))
    assert (backend.name, backend.interpreted) == (name, interpreted)
