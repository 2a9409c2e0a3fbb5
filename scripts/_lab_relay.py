"""The streams between the caller of scripts/lab and the guest's virtio-serial ports.

Port 1 carries the status lines described in _lab_init; 2, 3 and 4 are stdout, stderr and stdin. Bytes pass
through this process instead of QEMU opening the caller's files itself: QEMU could open neither sockets nor a
file at the caller's offset.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DRAIN_SECONDS = 10  # for output still in QEMU's hands when the command has ended


class Relay:
    """One lab run's streams: `open`, start QEMU, `start`, `wait` for the status lines, `drain`."""

    def __init__(self) -> None:
        self.qemu_fds: list[int] = []
        self.ready_at: float | None = None
        self._status = -1
        self._copiers: list[threading.Thread] = []
        self._received = {1: 0, 2: 0}  # bytes that went to the caller's stdout and stderr
        self._arrival = threading.Condition()

    def open(self, tty: bool) -> list[str]:
        """Make the pipes; returns the QEMU options that join them to the guest's ports."""
        options: list[str] = []
        self._status = self._port(options, 1)
        if tty:
            return [
                *options,
                "-chardev",
                "stdio,id=tty,mux=on,signal=off",
                "-device",
                "virtconsole,chardev=tty,nr=0",
            ]
        for number, target in ((2, 1), (3, 2)):
            self._copier(self._copy_out, self._port(options, number), target)
        ours, theirs = socket.socketpair()
        self.qemu_fds.append(theirs.detach())
        options += [
            "-chardev",
            f"socket,id=in,fd={self.qemu_fds[-1]}",
            "-device",
            "virtserialport,chardev=in,nr=4",
        ]
        self._copier(self._copy_in, ours)
        return options

    def _port(self, options: list[str], number: int) -> int:
        """One port from the guest to us: adds its QEMU options, returns our end."""
        reader, writer = os.pipe()
        self.qemu_fds.append(writer)
        options += ["-chardev", f"file,id=port{number},path=/dev/fd/{writer},append=on"]
        options += ["-device", f"virtserialport,chardev=port{number},nr={number}"]
        return reader

    def _copier(self, copy: Callable[..., None], *arguments: object) -> None:
        self._copiers.append(threading.Thread(target=copy, args=arguments, daemon=True))

    def _copy_out(self, source: int, target: int) -> None:
        while data := os.read(source, 65536):
            view = memoryview(data)
            while view:
                try:
                    view = view[os.write(target, view) :]
                except OSError:  # the caller's reader has gone: the command must not notice more than a shell's would
                    break
            with self._arrival:
                self._received[target] += len(data)
                self._arrival.notify()

    def _copy_in(self, target: socket.socket) -> None:
        self._stdin = target  # stays open: QEMU drops what it has not read yet when the peer closes
        with contextlib.suppress(OSError):  # stdin is closed, or QEMU has ended
            while not os.isatty(0) and (data := os.read(0, 65536)):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def start(self) -> None:
        """After QEMU has started: carry bytes, and let QEMU's death be visible as the end of the pipes."""
        for fd in self.qemu_fds:
            os.close(fd)
        for copier in self._copiers:
            copier.start()

    def wait(self, timeout: float) -> str | None:
        """The next line of the status port: "" when QEMU has ended, None after `timeout` seconds."""
        line = b""
        deadline = time.monotonic() + timeout
        while not line.endswith(b"\n"):
            if not select.select([self._status], [], [], max(deadline - time.monotonic(), 0))[0]:
                return None
            byte = os.read(self._status, 1)
            if not byte:
                return ""
            line += byte
        return line.decode()

    def drain(self, out_bytes: int, err_bytes: int) -> None:
        """Wait until the last byte of the command's output has been handed to the caller."""
        with self._arrival:
            self._arrival.wait_for(
                lambda: self._received[1] >= out_bytes and self._received[2] >= err_bytes, DRAIN_SECONDS
            )
