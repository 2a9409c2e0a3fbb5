"""A listening Unix socket at a path: stale files are replaced, living ones are not, and ours goes at the end.

Layer: virtio.
"""

from __future__ import annotations

import os
import socket
import stat

from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.iothread import IoThread

BACKLOG = 16
PATH_MAX = 107  # sun_path without its NUL


class Listener:
    """Listens at `path` and hands each connection (a non-blocking socket) to `on_accept`, on the I/O thread.

    Raises ConfigError for a path that is in use, too long or impossible; `option` is named in it.
    """

    def __init__(self, path: str, option: str) -> None:
        self.path = path
        if len(os.fsencode(path)) > PATH_MAX:
            raise ConfigError(option, f"{path}: a socket's path has at most {PATH_MAX} bytes")
        _remove_stale(path, option)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self.socket.bind(path)
            self.socket.listen(BACKLOG)
        except OSError as error:
            self.socket.close()
            raise ConfigError(option, f"{path}: {error.strerror}") from error
        self._inode = os.stat(path).st_ino
        self._io: IoThread | None = None

    def start(self, io: IoThread, on_accept: Callable[[socket.socket], None]) -> None:
        """Take connections from now on."""
        self._io = io
        self._on_accept = on_accept
        io.add_reader(self.socket.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:  # no file descriptors left: the client waits, and the thread does not spin
            assert self._io is not None
            self._io.remove_reader(self.socket.fileno())
            self._io.call_later(1.0, self._again)
            return
        connection.setblocking(False)
        self._on_accept(connection)

    def _again(self) -> None:
        if self._io is not None and self.socket.fileno() >= 0:
            self._io.add_reader(self.socket.fileno(), self._accept)

    def close(self) -> None:
        """Stop, and remove the file, if it is still ours."""
        if self.socket.fileno() < 0:
            return
        if self._io is not None:
            self._io.remove_reader(self.socket.fileno())
        self.socket.close()
        try:
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        except OSError:
            pass  # somebody was faster


def _remove_stale(path: str, option: str) -> None:
    """Remove the socket of a process that is gone; anything else at `path` is not ours to touch."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(option, f"{path} exists and is no socket")
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(option, f"{path}: {error.strerror}") from error
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass  # a full backlog (EAGAIN) or no permission: somebody is there
    raise ConfigError(option, f"{path}: another process listens there")
