"""The I/O thread: readers, writers, and both on one file descriptor."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from pykvm.core.iothread import IoThread

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def io() -> Iterator[IoThread]:
    """A thread, whose callbacks raise nothing."""
    errors: list[BaseException] = []
    thread = IoThread("test", errors.append)
    yield thread
    thread.close()
    assert errors == []


def test_reader_and_writer_of_one_socket(io: IoThread) -> None:
    """Each hears of its own event, and one may be removed while the other stays."""
    ours, theirs = socket.socketpair()
    readable, writable = threading.Event(), threading.Event()

    def on_writable() -> None:
        io.remove_writer(ours.fileno())
        writable.set()

    def on_readable() -> None:
        ours.recv(100)
        readable.set()

    with ours, theirs:
        io.add_reader(ours.fileno(), on_readable)
        io.add_writer(ours.fileno(), on_writable)
        assert writable.wait(10)
        assert not readable.is_set()
        theirs.send(b"x")
        assert readable.wait(10)
        io.remove_reader(ours.fileno())


def test_writer_waits_for_room(io: IoThread) -> None:
    """A full pipe calls its writer when somebody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    size = os.write(writer, b"x" * (1 << 20))
    room = threading.Event()
    io.add_writer(writer, lambda: (io.remove_writer(writer), room.set()))
    assert not room.wait(0.05)
    os.read(reader, size)
    assert room.wait(10)
    os.close(reader)
    os.close(writer)


def test_hang_up_reaches_the_reader(io: IoThread) -> None:
    """The other end's closing is an event for a reader, as end of file."""
    ours, theirs = socket.socketpair()
    ended = threading.Event()

    def on_readable() -> None:
        if not ours.recv(10):
            io.remove_reader(ours.fileno())
            ended.set()

    io.add_reader(ours.fileno(), on_readable)
    theirs.close()
    assert ended.wait(10)
    ours.close()


def test_what_epoll_refuses_is_forgotten(io: IoThread) -> None:
    """A regular file cannot be watched: PermissionError, and nothing stays behind."""
    with open(__file__, "rb") as file:
        for _ in range(2):
            with pytest.raises(PermissionError):
                io.add_reader(file.fileno(), lambda: None)
        io.remove_reader(file.fileno())


def test_an_idle_reader_waits_for_the_start(io: IoThread) -> None:
    """It costs no thread; once there is one, it hears of what came before."""
    heard = threading.Event()
    fd = os.eventfd(1)

    def on_event() -> None:
        os.eventfd_read(fd)
        heard.set()

    io.add_reader(fd, on_event, idle=True)
    assert not io.started
    io.start()
    assert io.started
    assert heard.wait(5)
    io.remove_reader(fd)
    os.close(fd)
