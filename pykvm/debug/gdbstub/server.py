"""The listening socket, its thread, and one gdb at a time. Layer: debug.

A second client is turned away. What the peer does not read waits in a bounded buffer: until it does, nothing more of it
is read. The vCPUs never wait for this thread.
"""

from __future__ import annotations

import os
import select
import socket
import threading

from pykvm import log
from pykvm._native import lib
from pykvm.debug.gdbstub.control import Control
from pykvm.debug.gdbstub.listen import listen
from pykvm.debug.gdbstub.session import Session
from pykvm.debug.gdbstub.target import Layout
from pykvm.errors import ConfigError, PykvmError
from pykvm.x86.segments import CR0_PE, EFER_LMA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.machine import Machine

CHUNK = 65536
MAX_UNREAD = 1 << 18  # bytes for a peer that does not read: with so many, nothing more is done for it
LAST_WORDS_S = 0.2  # for the last reply to leave
JOIN_S = 2.0


class GdbServer:
    """A gdb server for `machine`; made by Machine.gdb_server. `address` is what to give gdb's `target remote`."""

    def __init__(self, machine: Machine, where: str, *, arch: str = "auto") -> None:
        if arch not in ("auto", "16", "32", "64"):
            raise ConfigError("gdb-arch", f"{arch!r} is none of auto, 16, 32, 64")
        self.machine = machine
        self.arch = arch
        self._listener, self.address, self.path = listen(where)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()  # guards _wake_fd against its closing
        self._closing = False
        self._client: socket.socket | None = None
        self._session: Session | None = None
        self._unread = bytearray()
        try:
            self.control = Control(machine, self._wake)
        except BaseException:
            self._close_files()
            raise
        machine.on_close.append(self.close)
        self._thread = threading.Thread(target=self._main, name="pykvm-gdb", daemon=True)
        self._thread.start()

    # -- any thread ---------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or the machine's."""
        return self._closing

    def close(self) -> None:
        """Send a connected gdb away and end the thread; the machine goes on. Again without effect."""
        self._closing = True
        self._wake()
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_S)

    def _close_files(self) -> None:
        self._listener.close()
        if self.path:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass
        with self._lock:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                self._wake_fd = -1

    # -- the thread ---------------------------------------------------------------------------------------------

    def _main(self) -> None:
        lib.pk_thread_init()
        try:
            while not self._closing:
                self._wait()
            if self._session is not None:
                self._session.closing()
                self._drop(resume=False)
            if not self.machine.closed:
                self.machine.release()
        finally:
            self._close_files()

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        if self._client is not None:
            reading = select.POLLIN if self._session is not None and not self._session.busy else 0
            poll.register(self._client, reading | (select.POLLOUT if self._unread else 0))
        ready = dict(poll.poll())
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
            if self._session is not None and not self._closing:
                self._guarded(self._session.woken)
            if self._session is not None and self._session.finished:
                self._drop(resume=False)
        if self._client is not None and self._client.fileno() in ready:
            self._serve(ready[self._client.fileno()])
        if self._listener.fileno() in ready:
            self._accept()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # gone before we came to it, or too many files: a later one may be luckier
        if self._session is not None:
            self._serve(select.POLLIN)  # its end may have come meanwhile
        if self._session is not None:
            log.warning("a second gdb was turned away")
            client.close()
            return
        client.setblocking(False)
        if client.family != socket.AF_UNIX:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.control.attach()
            self._client, self._unread = client, bytearray()
            self._session = Session(self.control, self._layout(), self._send)
        except PykvmError as problem:
            log.warning("gdb cannot attach", why=str(problem))
            self.control.attached = False
            self._client = self._session = None
            client.close()

    def _serve(self, events: int) -> None:
        client, session = self._client, self._session
        assert client is not None and session is not None
        if self._unread:
            self._flush()
        if not session.busy and events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            try:
                data = client.recv(CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            session.feed(data)
            if not data:
                session.finished = True
                log.warning("gdb went away", guest="goes on" if session.running else "stays stopped for the next gdb")
        while session.busy and not session.finished and len(self._unread) < MAX_UNREAD and not self._closing:
            self._guarded(session.advance)
        if session.finished:
            self._drop(resume=False)

    def _guarded(self, step: Callable[[], object]) -> None:
        try:
            step()
        except PykvmError as problem:  # the machine cannot be stopped or resumed: a device's code hangs, or it closes
            log.warning("gdb session ended", why=str(problem))
            if self._session is not None:
                self._session.finished = True

    def _drop(self, *, resume: bool) -> None:
        client, session = self._client, self._session
        if client is None or session is None:
            return
        self.arch = session.arch or self.arch
        if self.control.attached:
            self.control.detach(resume=resume)
        client.settimeout(LAST_WORDS_S)
        try:
            client.sendall(self._unread)
        except OSError:
            pass
        client.close()
        self._client = self._session = None

    def _send(self, data: bytes) -> None:
        self._unread += data
        self._flush()

    def _flush(self) -> None:
        assert self._client is not None
        try:
            while self._unread:
                del self._unread[: self._client.send(self._unread)]
        except BlockingIOError:
            pass
        except OSError:
            self._unread.clear()  # it has gone: recv will say so

    def _layout(self) -> Layout:
        """The description for the mode that the guest is in, or is known to be for."""
        bits = guess_bits(self.machine) if self.arch == "auto" else int(self.arch)
        features = {entry[0]: entry for entry in self.machine.vcpus[0].fd.get_cpuid2() if entry[0] == 1}
        avx = bool(features and features[1][5] >> 28 & 1 and features[1][5] >> 26 & 1)
        return Layout(bits, avx=avx and bits != 16)


def guess_bits(machine: Machine) -> int:
    """64 in long mode, and for a 64-bit ELF kernel on its way there; else by the mode of vCPU 0."""
    sregs = machine.vcpus[0].sregs
    if sregs.efer & EFER_LMA or _is_elf64(getattr(getattr(machine, "boot_config", None), "kernel", None)):
        return 64
    return 32 if sregs.cr0 & CR0_PE else 16


def _is_elf64(path: str | None) -> bool:
    if path is None:
        return False
    try:
        with open(path, "rb") as file:
            return file.read(5) == b"\x7fELF\x02"
    except OSError:
        return False
