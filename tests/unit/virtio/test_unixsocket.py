"""Listening Unix sockets: stale files, living listeners, foreign files, and what is left at the end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from driver import StillIo

from pykvm.errors import ConfigError
from pykvm.virtio.unixsocket import Listener


def test_connection_and_end(tmp_path: Path) -> None:
    """A client reaches `on_accept`; `close` removes the file."""
    path = tmp_path / "socket"
    io = StillIo("test", print)
    clients: list[socket.socket] = []
    listener = Listener(str(path), "test")
    listener.start(io, clients.append)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        io.run()
        assert len(clients) == 1 and not clients[0].getblocking()
        clients[0].close()
    listener.close()
    listener.close()
    assert not path.exists()


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    """The socket of a process that was killed is no obstacle."""
    path = tmp_path / "socket"
    code = f"import socket, os; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert path.exists()
    Listener(str(path), "test").close()
    assert not path.exists()


def test_living_socket_is_left_alone(tmp_path: Path) -> None:
    """Where somebody listens, we do not, and his socket stays."""
    path = str(tmp_path / "socket")
    first = Listener(path, "test")
    with pytest.raises(ConfigError, match="another process listens"):
        Listener(path, "test")
    assert os.path.exists(path)
    first.close()


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    """A regular file, or a symbolic link, is refused and stays as it is."""
    path = tmp_path / "file"
    path.write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(ConfigError, match="no socket"):
            Listener(str(name), "test")
    assert path.read_text() == "mine"


def test_a_file_that_is_no_longer_ours_stays(tmp_path: Path) -> None:
    """If somebody replaced our socket, `close` does not remove his."""
    path = tmp_path / "socket"
    listener = Listener(str(path), "test")
    path.unlink()
    path.write_text("somebody's")
    listener.close()
    assert path.read_text() == "somebody's"


@pytest.mark.parametrize("path", ["/nonexistent/directory/socket", "/tmp/" + "x" * 108])
def test_impossible_paths(path: str) -> None:
    """One clear line, and no exception of socket's own."""
    with pytest.raises(ConfigError, match=r"^test: "):
        Listener(path, "test")
