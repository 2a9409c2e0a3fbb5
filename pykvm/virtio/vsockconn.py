"""One connection of a vsock device: a Unix socket of the host, and the guest's end of the stream. Layer: virtio.

Source: virtio 1.2, 5.10.6.3 (buffer space management), 5.10.6.5 (stream sockets, SHUTDOWN and RST). Runs on the I/O
thread, under the transport's lock.
"""

from __future__ import annotations

import socket

from pykvm._native import ffi, lib
from pykvm.virtio.chain import slices

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.core.iothread import Timer
    from pykvm.virtio.chain import Chain
    from pykvm.virtio.vsock import Vsock

HEADER_SIZE = ffi.sizeof("struct virtio_vsock_hdr")
BUFFER = 256 << 10  # bytes of the guest that wait for a program of the host: our buf_alloc
CHUNK = 64 << 10  # bytes of one packet to the guest
TURN = 16  # packets of one connection before another one's turn
GREETING_BYTES = 32  # of "CONNECT 4294967295\n", with some slack
PATIENCE_S = 10.0  # for a client to say CONNECT, and for a guest to answer

SEND, RCV = lib.VIRTIO_VSOCK_SHUTDOWN_SEND, lib.VIRTIO_VSOCK_SHUTDOWN_RCV
MASK = 0xFFFFFFFF  # the counters of 5.10.6.3 have 32 bits


class _Socket:
    """What both kinds have: a socket on the I/O thread, watched as needed, until `close`."""

    def __init__(self, device: Vsock, sock: socket.socket) -> None:
        self.device = device
        self.sock = sock
        self.closed = False
        self._fd = sock.fileno()
        self._reading = self._writing = False
        self._timer: Timer | None = None

    def watch(self, *, reading: bool | None = None, writing: bool | None = None) -> None:
        """Start or stop to hear of readability and room."""
        io = self.device.io
        if reading is not None and reading is not self._reading:
            self._reading = reading
            if reading:
                io.add_reader(self._fd, lambda: self._locked(self.on_readable))
            else:
                io.remove_reader(self._fd)
        if writing is not None and writing is not self._writing:
            self._writing = writing
            if writing:
                io.add_writer(self._fd, lambda: self._locked(self.on_writable))
            else:
                io.remove_writer(self._fd)

    def expire(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call `callback` then, unless `calm` or `close` comes first."""
        self._timer = self.device.io.call_later(seconds, lambda: self._locked(callback))

    def calm(self) -> None:
        """Forget what `expire` said."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _locked(self, callback: Callable[[], None]) -> None:
        transport = self.device.transport
        with transport.lock:
            if not self.closed:
                transport.guarded(callback)

    def on_readable(self) -> None:
        """The socket has bytes, or has ended."""

    def on_writable(self) -> None:
        """The socket has room again, or is broken."""

    def release(self) -> None:
        """Let go of the socket without closing it."""
        self.calm()
        self.watch(reading=False, writing=False)
        self.closed = True

    def close(self) -> None:
        """Hang up."""
        if not self.closed:
            self.release()
            self.sock.close()


class Greeting(_Socket):
    """A client of the listening socket that has not said yet which port it wants."""

    def __init__(self, device: Vsock, sock: socket.socket) -> None:
        super().__init__(device, sock)
        self._line = b""
        self.watch(reading=True)
        self.expire(PATIENCE_S, self.close)

    def on_readable(self) -> None:
        """Take the line `CONNECT port`, and no byte after it, which the guest is to have."""
        try:
            seen = self.sock.recv(GREETING_BYTES, socket.MSG_PEEK)
            line, newline, _ = seen.partition(b"\n")
            if newline:
                self.sock.recv(len(line) + 1)
            elif seen and len(seen) < GREETING_BYTES:
                # the rest of the line is on its way; take this part, or epoll would report it all the time
                self._line += self.sock.recv(len(seen))
                if len(self._line) < GREETING_BYTES:
                    return
        except BlockingIOError:
            return
        except OSError:
            newline = b""
        port = _port_of(self._line + line) if newline else None
        if port is None:
            self.close()
            return
        self.release()
        self.device.greetings.discard(self)
        self.device.call_guest(self.sock, port)

    def close(self) -> None:
        """Hang up."""
        super().close()
        self.device.greetings.discard(self)


def _port_of(line: bytes) -> int | None:
    word, _, digits = line.partition(b" ")
    digits = digits.rstrip(b"\r")
    if word != b"CONNECT" or not digits.isdigit() or len(digits) > 10 or int(digits) > MASK:
        return None
    return int(digits)


class Connection(_Socket):
    """A stream between `sock` and the guest; `key` is (host port, guest port)."""

    def __init__(self, device: Vsock, key: tuple[int, int], sock: socket.socket) -> None:
        super().__init__(device, sock)
        self.key = key
        self.calling = False  # waits for the guest's RESPONSE
        self._pending = bytearray()  # from the guest, for the socket
        self._forwarded = self._told = 0  # our fwd_cnt, and what the guest knows of it
        self._sent = 0  # bytes for the guest: its fwd_cnt follows
        self._guest_buffer = self._guest_forwarded = 0
        self._asked_for_credit = False
        self._update_queued = False
        self._ended = 0  # SEND, RCV: directions that the guest has shut down
        self._read_all = False  # the socket has ended

    # -- beginning ----------------------------------------------------------------------------------------------

    def call(self) -> None:
        """Wait for the guest to answer a REQUEST."""
        self.calling = True
        self.expire(PATIENCE_S, self.abort)

    def on_response(self) -> None:
        """The guest has accepted."""
        if not self.calling:
            self.abort()
            return
        self.calling = False
        self.calm()
        try:
            self.sock.send(b"OK %d\n" % self.key[0], socket.MSG_NOSIGNAL)
        except OSError:
            self.abort()
            return
        self.begin()

    def begin(self) -> None:
        """Both sides are there."""
        self.watch(reading=True)

    # -- ending -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Forget the connection."""
        super().close()
        self.device.forget(self)

    def abort(self) -> None:
        """Forget it, and tell the guest."""
        if not self.closed:
            self.close()
            self.device.send(self.key, lib.VIRTIO_VSOCK_OP_RST)

    def on_shutdown(self, flags: int) -> None:
        """The guest sends (SEND) or receives (RCV) no more; after both the answer is RST (5.10.6.5)."""
        self._ended |= flags & (SEND | RCV)
        if self._ended & RCV and not self._read_all:
            self._read_all = True
            self.watch(reading=False)
            try:
                self.sock.shutdown(socket.SHUT_RD)  # who writes there is told
            except OSError:
                pass  # it has gone already
        self._finish()

    def _finish(self) -> None:
        """When what the guest sent is out, pass its end on."""
        if self._pending or not self._ended & SEND:
            return
        if self._ended & RCV:
            self.abort()
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.abort()

    # -- from the guest to the host -----------------------------------------------------------------------------

    def on_data(self, chain: Chain, length: int) -> None:
        """A packet with `length` bytes of payload, all inside the chain."""
        if self.calling or self._ended & SEND or len(self._pending) + length > BUFFER:
            self.abort()  # no connection yet, none any more, or more than the credit allows
            return
        sent = 0
        if not self._pending:
            try:
                sent = self.sock.sendmsg(slices(chain.readable, HEADER_SIZE, length), (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                pass
            except OSError:
                self.abort()  # the program of the host has gone
                return
        if sent < length:
            self._pending += chain.read(length - sent, HEADER_SIZE + sent)
            self.watch(writing=True)
        self._forward(sent)

    def on_writable(self) -> None:
        """Pass on what waits."""
        try:
            sent = self.sock.send(self._pending, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            self.abort()
            return
        del self._pending[:sent]
        if not self._pending:
            self.watch(writing=False)
        self._forward(sent)
        self._finish()

    def _forward(self, count: int) -> None:
        self._forwarded = (self._forwarded + count) & MASK
        if (self._forwarded - self._told) & MASK >= BUFFER // 4:
            self.send_credit()

    def send_credit(self) -> None:
        """Tell the guest how much was passed on; one such packet waits at most."""
        if not self._update_queued:
            self._update_queued = True
            self.device.send(self.key, lib.VIRTIO_VSOCK_OP_CREDIT_UPDATE)

    def tell_forwarded(self) -> int:
        """fwd_cnt for a header that goes out now."""
        self._told = self._forwarded
        self._update_queued = False
        return self._told

    # -- from the host to the guest -----------------------------------------------------------------------------

    def update_credit(self, buf_alloc: int, fwd_cnt: int) -> None:
        """What every packet of the guest says about its buffer; nonsense in it harms only the guest."""
        self._guest_buffer, self._guest_forwarded = buf_alloc, fwd_cnt
        if self._asked_for_credit and self._credit() > 0:
            self._asked_for_credit = False
            self.read_on()

    def _credit(self) -> int:
        return self._guest_buffer - ((self._sent - self._guest_forwarded) & MASK)

    def read_on(self) -> None:
        """The guest has room again."""
        if not (self.closed or self._read_all or self.calling or self._asked_for_credit):
            self.watch(reading=True)

    def on_readable(self) -> None:
        """Fill the guest's buffers from the socket, within its credit."""
        for _ in range(TURN):
            if self.closed or not self._reading or not self._read_once():
                break
        self.device.transport.interrupt(self.device.queues[0])

    def _read_once(self) -> bool:
        credit = self._credit()
        if credit <= 0:
            self.watch(reading=False)
            self._asked_for_credit = True
            self.device.send(self.key, lib.VIRTIO_VSOCK_OP_CREDIT_REQUEST)
            return False
        chain = self.device.take_buffer()
        if chain is None:
            self.watch(reading=False)
            self.device.stall(self)
            return False
        queue = self.device.queues[0]
        size = min(credit, chain.writable_size - HEADER_SIZE, CHUNK)
        try:
            count = self.sock.recvmsg_into(slices(chain.writable, HEADER_SIZE, size))[0]
        except BlockingIOError:
            queue.unpop()
            return False
        except OSError:
            queue.unpop()
            self.abort()
            return False
        if not count:
            queue.unpop()
            self._end_of_file()
            return False
        self._sent = (self._sent + count) & MASK
        chain.write(self.device.header(self.key, lib.VIRTIO_VSOCK_OP_RW, count))
        queue.push(chain, HEADER_SIZE + count)
        return True

    def _end_of_file(self) -> None:
        """The program of the host sends no more; it may still read."""
        self._read_all = True
        self.watch(reading=False)
        self.device.send(self.key, lib.VIRTIO_VSOCK_OP_SHUTDOWN, SEND)
