"""What a running machine tells `pykvm top`: a Unix socket that answers each connection with one JSON document.

Layer: control. `pykvm start` makes it when a run has lasted a moment, off the start-up's path; it costs nothing while
nobody asks. The socket is DIRECTORY/PID.sock, in a directory that only its owner can enter.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from typing import TYPE_CHECKING

from pykvm import log
from pykvm.kvm.exits import reason_name

if TYPE_CHECKING:
    from pykvm.board import Pc

BACKLOG = 8
MAX_ANSWER = 1 << 20
ASK_S = 0.5  # for one machine's answer


def directory() -> str:
    """Where this user's machines have their sockets."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return os.path.join(runtime, "pykvm") if os.path.isdir(runtime) else f"/tmp/pykvm-{os.getuid()}"


def _is_ours(path: str) -> bool:
    """Whether nobody else can have put something into the directory (it may be in /tmp)."""
    found = os.lstat(path)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def serve(pc: Pc) -> bool:
    """Answer for `pc` until it is closed; whether that is possible. A machine runs as well without."""
    path = os.path.join(directory(), f"{os.getpid()}.sock")
    try:
        os.makedirs(directory(), mode=0o700, exist_ok=True)
        if not _is_ours(directory()):
            log.debug("no status socket: its directory is not ours alone", path=directory())
            return False
        if os.path.lexists(path):
            os.unlink(path)  # of a process that was killed and had our number
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            listener.bind(path)
            listener.listen(BACKLOG)
            _Server(pc, listener, path)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        log.debug("no status socket", path=path, reason=error.strerror)
        return False
    return True


class _Server:
    def __init__(self, pc: Pc, listener: socket.socket, path: str) -> None:
        self._pc = pc
        self._listener = listener
        self._path = path
        self._started = time.monotonic()
        pc.io.add_reader(listener.fileno(), self._answer)
        pc.on_close.append(self._close)

    def _answer(self) -> None:
        """One document for one connection; a client that does not read waits for nobody."""
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        with client:
            client.setblocking(False)
            try:
                client.send(json.dumps(describe(self._pc, time.monotonic() - self._started)).encode())
            except OSError:
                pass

    def _close(self) -> None:
        self._pc.io.remove_reader(self._listener.fileno())
        self._listener.close()
        try:
            os.unlink(self._path)
        except OSError:
            pass


def describe(pc: Pc, uptime_s: float) -> dict[str, object]:
    """Counters since the start; a reader makes rates of two of them."""
    boot = pc.boot_config
    return {
        "kernel": (boot.kernel or boot.bios) if boot is not None else None,
        "uptime_s": uptime_s,
        "memory": sum(slot.size for slot in pc.memory.slots),
        "vcpus": [
            {
                "thread": vcpu.thread_id,
                "running": vcpu.running,
                "exits": {reason_name(reason): count for reason, count in vcpu.exit_counts().items()},
            }
            for vcpu in pc.vcpus
        ],
        "disks": [found for each in pc.virtio if (found := _counters(each.device, "requests"))],
        "nets": [found for each in pc.virtio if (found := _counters(each.device, "bytes"))],
    }


def _counters(device: object, name: str) -> dict[str, int]:
    found = getattr(device, name, None)
    return {str(key): int(value) for key, value in found.items()} if isinstance(found, dict) else {}


def ask(pid: int) -> dict[str, object] | None:
    """What the machine of process `pid` says; None if it is no pykvm of this user's, or does not answer."""
    path = os.path.join(directory(), f"{pid}.sock")
    try:
        if not _is_ours(directory()):
            return None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
            client.settimeout(ASK_S)
            client.connect(path)
            answer = b""
            while (part := client.recv(1 << 16)) and len(answer) <= MAX_ANSWER:
                answer += part
        found = json.loads(answer)
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def tidy() -> None:
    """Remove the sockets of processes that are gone."""
    try:
        names = os.listdir(directory()) if _is_ours(directory()) else []
    except OSError:
        return
    for name in names:
        pid = name.removesuffix(".sock")
        if pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            try:
                os.unlink(os.path.join(directory(), name))
            except OSError:
                pass
