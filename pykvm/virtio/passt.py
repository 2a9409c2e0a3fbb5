"""A network for machines of users without privileges: passt as the backend of a network device. Layer: virtio.

passt (https://passt.top, Debian package passt) makes the guest's frames sockets of the host and answers DHCP. They pass
over a stream socket, each after its length as a 32-bit big-endian number: the convention of QEMU's -netdev stream.

The process lives as long as the socket: passt ends when pykvm's end is closed, by `close` or by the kernel when pykvm
is killed. (PR_SET_PDEATHSIG would not do: passt changes its credentials, which clears it.)
"""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess

from pykvm import log
from pykvm.errors import ConfigError, SnapshotError
from pykvm.virtio.netbackend import IOV_MAX, MAX_FRAME, MIN_FRAME, BackendGone, NetBackend

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "passt"
LENGTH = struct.Struct("!I")
MTU = 65520  # what passt can do: large frames are the cheaper ones, and nobody on a wire sees them
STREAM_SIZE = 256 << 10
START_S = 10.0
STOP_S = 1.0
MOMENT_S = 0.2


class StreamBackend(NetBackend):
    """Frames over a connected stream socket, each after its length."""

    name = "stream"

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.fd = connection.fileno()
        self._stream = bytearray(STREAM_SIZE)
        self._view = memoryview(self._stream)
        self._start = self._end = 0  # of what was received and not handed out
        self._tail = b""  # of a frame that the socket took a part of

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """The next frame of the stream; what does not fit into `buffers` is cut off."""
        while (frame := self._next_frame()) is None:
            if not self._read_more():
                return 0
        done = 0
        for buffer in buffers:
            part = min(len(buffer), len(frame) - done)
            buffer[:part] = frame[done : done + part]
            done += part
            if done == len(frame):
                break
        return len(frame)

    def _next_frame(self) -> memoryview | None:
        """The frame at the start of the stream if it is there as a whole."""
        waiting = self._end - self._start
        if waiting < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._stream, self._start)
        if not MIN_FRAME <= length <= MAX_FRAME:
            raise BackendGone(f"{self.name} sent a frame of {length} bytes")
        if waiting < LENGTH.size + length:
            return None
        at = self._start + LENGTH.size
        self._start = at + length
        return self._view[at : at + length]

    def _read_more(self) -> bool:
        """Receive what is there; False if nothing is."""
        if self._start:  # there is room for the largest frame behind what is left, once that is at the front
            left = self._end - self._start
            self._stream[:left] = self._stream[self._start : self._end]
            self._start, self._end = 0, left
        try:
            got = self.socket.recv_into(self._view[self._end :])
        except BlockingIOError:
            return False
        except OSError as error:
            raise BackendGone(f"{self.name}: {error.strerror}") from None
        if not got:
            raise BackendGone(self._why_gone())
        self._end += got
        return True

    def _why_gone(self) -> str:
        return f"{self.name} closed the connection"

    def send(self, buffers: Sequence[memoryview | bytes]) -> bool:
        """One frame; the rest of one that the socket took in part goes first."""
        if not self.flush():
            return False
        size = sum(map(len, buffers))
        pieces: list[memoryview | bytes] = [LENGTH.pack(size), *buffers]
        if len(pieces) > IOV_MAX:
            pieces = [b"".join(pieces)]
        sent = self._send(pieces)
        if 0 < sent < LENGTH.size + size:
            self._tail, self.has_rest = b"".join(pieces)[sent:], True
        return sent > 0

    def flush(self) -> bool:
        """Whether nothing is left of the last frame."""
        if self._tail:
            self._tail = self._tail[self._send([self._tail]) :]
            self.has_rest = bool(self._tail)
        return not self._tail

    def _send(self, pieces: Sequence[memoryview | bytes]) -> int:
        try:
            return self.socket.sendmsg(pieces, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise BackendGone(f"{self.name}: {error.strerror}") from None

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
        self.fd = -1


class Passt(StreamBackend):
    """The user-mode network: a passt process of this backend's own.

    hostfwd  ports of the host that lead to the guest, as QEMU writes them: "tcp::2222-:22", "tcp:127.0.0.1:8080-:80",
             "udp::5353-:53"; "tcp:2222:22" for short
    options  more options for passt (see its manual page)

    The guest gets the host's address by DHCP, and reaches the host itself at the gateway's. Started by root, passt runs
    as nobody. Raises ConfigError.
    """

    name = PROGRAM
    mtu = MTU

    def __init__(self, hostfwd: Sequence[str] = (), *, options: Sequence[str] = ()) -> None:
        self._hostfwd, self._options = list(hostfwd), list(options)
        forwards = [Forward(text) for text in hostfwd]
        for forward in forwards:
            forward.check_free()
        words = [word for forward in forwards for word in forward.passt_words()]
        ours, theirs = socket.socketpair()
        super().__init__(ours)
        try:
            with theirs:
                self._start_process(theirs.fileno(), [*words, *options])
        except BaseException:
            ours.close()
            raise

    def recipe(self) -> tuple[str, dict[str, object]]:
        """The forwarded ports. A file shall not say with which options a program is run."""
        if self._options:
            raise SnapshotError("net: a file cannot hold passt's options: unplug it before, and give it another after")
        return "user", {"hostfwd": self._hostfwd}

    def _start_process(self, fd: int, words: Sequence[str]) -> None:
        ready, ready_end = os.pipe()
        said, said_end = os.pipe()
        os.fchmod(ready_end, 0o622)  # passt is nobody by the time that it opens its PID file
        os.set_blocking(said_end, False)  # what nobody reads must not hold it up
        command = [
            PROGRAM,
            "--foreground",
            "--stderr",
            "--quiet",
            "--fd",
            str(fd),
            "--pid",
            f"/dev/fd/{ready_end}",
            *words,
        ]
        self._said = said
        try:
            self.process = subprocess.Popen(
                command,
                pass_fds=(fd, ready_end),
                stdin=subprocess.DEVNULL,
                stdout=said_end,
                stderr=said_end,
                process_group=0,  # a Ctrl-C is for pykvm, which then ends it
            )
        except OSError as error:
            os.close(said)
            if isinstance(error, FileNotFoundError):
                raise ConfigError("net", "user needs passt, which is not installed: apt-get install passt") from None
            raise ConfigError("net", f"cannot run {PROGRAM}: {error.strerror}") from None
        finally:
            os.close(ready_end)
            os.close(said_end)
            if not hasattr(self, "process"):
                os.close(ready)
        os.set_blocking(said, False)
        try:
            self._wait_ready(ready)
        except BaseException:
            self._stop_process()
            raise
        finally:
            os.close(ready)

    def _wait_ready(self, ready: int) -> None:
        """passt writes its PID file when it listens and has a network; at its end the pipe ends."""
        if select.select([ready], [], [], START_S)[0]:
            if os.read(ready, 64):
                log.debug("passt is up", pid=self.process.pid)
                return
            self.process.wait(STOP_S)
        raise ConfigError("net", f"passt did not start: {self._last_words() or 'it says nothing'}")

    def _last_words(self) -> str:
        """The last line that passt printed which is about its end."""
        try:
            text = os.read(self._said, 65536).decode(errors="replace")
        except BlockingIOError:
            return ""
        noise = ("Failed to send", "Don't run as root")
        return "; ".join(line for line in text.splitlines() if line.strip() and not line.startswith(noise))

    def _why_gone(self) -> str:
        try:
            status = self.process.wait(MOMENT_S)
        except subprocess.TimeoutExpired:
            return "passt closed the connection"
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        words = self._last_words()
        return f"passt {how}: {words}" if words else f"passt {how}"

    def _stop_process(self) -> None:
        self.socket.close()
        try:
            self.process.wait(STOP_S)  # it ends by itself
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._said)

    def close(self) -> None:
        """End passt."""
        if self.fd >= 0:
            self.fd = -1
            self._stop_process()


class Forward:
    """One forwarded port, in QEMU's words: PROTOCOL:[ADDRESS]:PORT-[GUEST]:PORT, or PROTOCOL:PORT:PORT."""

    def __init__(self, text: str) -> None:
        try:
            self.protocol, rest = text.split(":", 1)
            if "-" in rest:
                host, guest = rest.split("-", 1)
                self.address, port = host.rsplit(":", 1)
                guest_address, guest_port = guest.rsplit(":", 1)
            else:
                port, guest_port = rest.split(":")
                self.address = guest_address = ""
            self.port, self.guest_port = int(port), int(guest_port)
        except ValueError:
            raise ConfigError("hostfwd", f"{text!r} is not like tcp::2222-:22 or tcp:127.0.0.1:2222-:22") from None
        if self.protocol not in ("tcp", "udp"):
            raise ConfigError("hostfwd", f"{text!r}: {self.protocol!r} is neither tcp nor udp")
        if not (0 < self.port < 1 << 16 and 0 < self.guest_port < 1 << 16):
            raise ConfigError("hostfwd", f"{text!r}: ports are 1 to 65535")
        if guest_address:
            raise ConfigError("hostfwd", f"{text!r}: passt has one guest: leave out its address {guest_address}")
        self.address = self.address.strip("[]")
        self.text = text

    def check_free(self) -> None:
        """Bind the port and let it go: passt is content with what it gets, and may get half of it."""
        kind = socket.SOCK_STREAM if self.protocol == "tcp" else socket.SOCK_DGRAM
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        with socket.socket(family, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.address, self.port))
            except (OSError, UnicodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "no address"
                raise ConfigError("hostfwd", f"{self.text}: cannot listen on port {self.port}: {why}") from None

    def passt_words(self) -> list[str]:
        """The options of passt for it."""
        where = f"{self.address}/" if self.address else ""
        return ["-t" if self.protocol == "tcp" else "-u", f"{where}{self.port}:{self.guest_port}"]
