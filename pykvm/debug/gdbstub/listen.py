"""The listening socket of `--gdb WHERE`. Layer: debug."""

from __future__ import annotations

import os
import socket
import stat

from pykvm.errors import ConfigError


def listen(where: str) -> tuple[socket.socket, str, str]:
    """(socket, what to give gdb, path to remove at the end or "") of [HOST:]PORT or unix:PATH. Raises ConfigError."""
    try:
        if where.startswith("unix:"):
            path = where.removeprefix("unix:")
            return _listen_unix(path), path, path
        host, port = parse_address(where)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2)
    except OSError as error:
        raise ConfigError("gdb", f"cannot listen at {where}: {error.strerror or error}") from error
    port = listener.getsockname()[1]
    return listener, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", ""


def _listen_unix(path: str) -> socket.socket:
    if not path:
        raise ConfigError("gdb", "unix: needs a path")
    if is_stale(path):
        os.unlink(path)
    elif os.path.lexists(path):
        raise ConfigError("gdb", f"{path} exists already: remove it, or take another path")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        mask = os.umask(0o177)  # whoever may connect can do anything to the guest
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(2)
    except BaseException:
        listener.close()
        raise
    return listener


def parse_address(text: str) -> tuple[str, int]:
    """[HOST:]PORT; the host is this machine alone unless it is named. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    if not colon or (host == "" and text.startswith(":")):
        host = "127.0.0.1"
    host = host.removeprefix("[").removesuffix("]")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError("gdb", f"{text!r} is no address: write PORT, HOST:PORT or unix:PATH")
    return host, int(port)


def is_stale(path: str) -> bool:
    """Whether `path` is the socket of a server that has died."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
