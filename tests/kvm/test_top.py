"""`pykvm top` beside real machines."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import command
import guests
import pexpect
import pytest

from pykvm.control import status


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Status sockets of this test alone."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.host
def test_a_running_machine_is_seen(runtime: Path) -> None:
    """Its vCPUs, exits by reason, memory and kernel; after its end neither it nor its socket is left."""
    machine = command.spawn("--cpus", "2", "--mem", "32M", "--serial", "none", guests.IMAGES / "endings.elf",
                            "--append", "ending=spin-user")  # fmt: skip
    path = runtime / "pykvm" / f"{machine.pid}.sock"
    try:
        guests_wait(path)
        done = command.run("top", "--json", "--interval", "0.3")
        assert done.returncode == 0, done.stderr
        found = {each["pid"]: each for each in json.loads(done.stdout)["machines"]}[machine.pid]
        assert (found["pykvm"], found["vcpus"]) == (True, 2)
        assert found["memory"] >= 32 << 20 and found["rss"] > 0
        assert found["kernel"].endswith("endings.elf")
        assert "IO" in found["exits_per_s"]
        assert found["guest_cpus"] + found["outside_cpus"] > 0
        done = command.run("top", "--interval", "0.1")
        assert str(machine.pid) in done.stdout and "endings.elf" in done.stdout
    finally:
        os.killpg(machine.pid, signal.SIGTERM)
        machine.communicate(timeout=command.SECONDS)
    assert not path.exists()


def guests_wait(path: Path) -> None:
    """Until a socket is there."""
    from time import monotonic, sleep

    end = monotonic() + command.SECONDS
    while not path.exists():
        assert monotonic() < end
        sleep(0.02)


def test_what_a_machine_says_of_itself(runtime: Path) -> None:
    """The exits are those that its vCPUs counted; clients that do not read or hang up do not disturb it."""
    with guests.pc("endings.elf", "ending=spin", cpus=2) as machine:
        assert status.serve(machine)
        machine.start()
        path = str(runtime / "pykvm" / f"{os.getpid()}.sock")
        rude = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for each in rude:
            each.connect(path)
        rude[0].close()
        guests.Talk(machine).wait_for("ending: spin")
        told: dict[str, Any] | None = status.ask(os.getpid())
        machine.stop()
        assert told is not None
        assert [set(each) for each in told["vcpus"]] == [{"thread", "running", "exits"}] * 2
        assert 0 < told["vcpus"][0]["exits"]["IO"] <= sum(machine.vcpus[0].exit_counts().values())
        for each in rude[1:]:
            each.close()
    assert not os.path.exists(path)


def test_a_machine_without_a_place_for_its_socket(runtime: Path) -> None:
    """A file where the directory should be: no socket, no error."""
    (runtime / "pykvm").write_text("")
    with guests.pc("endings.elf") as machine:
        assert not status.serve(machine)


@pytest.mark.host
def test_the_live_view_leaves_the_terminal_as_it_was(runtime: Path) -> None:
    """On a terminal it refreshes until Ctrl-C or a signal, and then leaves the other screen."""
    for end in ("\x03", signal.SIGTERM):
        view = pexpect.spawn(command.COMMAND[0], [*command.COMMAND[1:], "top", "--interval", "0.1"],
                             env=command.environment(), timeout=command.SECONDS, dimensions=(24, 150))  # fmt: skip
        view.expect_exact("\x1b[?1049h")
        view.expect("CPU guest")
        if isinstance(end, str):
            view.send(end)
        else:
            view.kill(end)
        view.expect_exact("\x1b[?1049l")
        view.expect(pexpect.EOF)
        view.close()
        assert view.exitstatus == (0 if isinstance(end, str) else 128 + end)
