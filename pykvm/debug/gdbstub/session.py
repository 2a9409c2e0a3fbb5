"""One gdb connection: what each packet does. Layer: debug.

Runs on the server's thread. Whatever the peer sends, the answer is a reply, an empty one for what is unknown, or an
error packet; nothing it sends raises.

Source: GDB manual, appendix E, sections "Packets", "Stop Reply Packets", "General Query Packets".
"""

from __future__ import annotations

from pykvm import log
from pykvm.debug.gdbstub.control import SIGINT, SIGTRAP, Stop
from pykvm.debug.gdbstub.packets import EBUSY, EFAULT, EINVAL, EIO, EOPNOTSUPP, HANDLERS, PAGE_SIZE, UNKNOWN
from pykvm.debug.gdbstub.queries import NAMED
from pykvm.debug.gdbstub.rsp import ACK, BAD, BREAK, NAK, Framer, encode
from pykvm.debug.gdbstub.target import Layout
from pykvm.errors import DebugUnsupported, GuestAddressError, PykvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pykvm.core.outcome import Outcome
    from pykvm.core.vcpu import Vcpu
    from pykvm.debug.gdbstub.control import Control

WHILE_RUNNING = (b"q", b"Q", b"v", b"H", b"T", b"D", b"k")  # what does not need stopped vCPUs
MAX_NOTES = 8


class Session:
    """The protocol's state for one connection. `send` takes the bytes that go to gdb; `finished` ends it."""

    def __init__(self, control: Control, layout: Layout, send: Callable[[bytes], object]) -> None:
        self.control = control
        self.machine = control.machine
        self.layout = layout
        self.finished = False
        self.running = False
        self.physical = False
        self.arch = ""  # for the next connection, if the user asked for another
        self.current = self.machine.vcpus[0]  # what g, m and the like are about
        self.resumed: int | None = None  # the thread of Hc, for c and s; None: all
        self._send = send
        self.busy = False
        self._framer = Framer()
        self._items: Iterator[str | bytes] = iter(())
        self.acks = True
        self._notes: list[str] = []
        self._last = b""  # the last packet, should gdb ask for it again
        self._last_stop = Stop(self.current, SIGTRAP)

    # -- the wire -----------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Bytes from gdb, for `advance` to work on; not before it has done with those before."""
        self._items = self._framer.feed(data)
        self.busy = True

    def advance(self) -> None:
        """Do one thing of what has come; `busy` says whether there may be more."""
        item = next(self._items, None)
        if item is None:
            self.busy = False
        elif item is BREAK:
            self._interrupt()
        elif item is NAK:
            self._send(self._last)
        elif item is BAD:
            if self.acks:
                self._send(b"-")
        elif item is not ACK and isinstance(item, bytes):
            self._packet(item)

    def reply(self, payload: bytes) -> None:
        """Send a packet."""
        self._last = encode(payload)
        self._send(self._last)

    def _packet(self, payload: bytes) -> None:
        if self.acks:
            self._send(b"+")
        answer = self._answer(payload)
        if answer is not None:
            self.reply(answer)

    def _answer(self, payload: bytes) -> bytes | None:
        """The reply; None when there is none, or none yet."""
        if self.running and not payload.startswith(WHILE_RUNNING):
            return EBUSY
        try:
            return self._dispatch(payload)
        except Exception as problem:  # whatever it is: the guest and the other users of the machine go on
            return self._refuse(payload, problem)

    def _refuse(self, payload: bytes, problem: Exception) -> bytes:
        """The error packet for what a handler raised."""
        if isinstance(problem, GuestAddressError):
            return EFAULT
        if isinstance(problem, PykvmError):
            self.tell(str(problem))
            return EOPNOTSUPP if isinstance(problem, DebugUnsupported) else EIO
        if isinstance(problem, (ValueError, IndexError)):
            return EINVAL
        log.error("gdb request failed unexpectedly", packet=repr(payload[:64]), error=repr(problem))  # a bug of ours
        return EIO

    def tell(self, text: str) -> None:
        """Show the user a line. gdb takes such packets only while it waits for a stop, so it goes with the next one."""
        self._notes = [*self._notes, text][-MAX_NOTES:]

    def _flush_notes(self) -> None:
        for text in self._notes:
            self.reply(b"O" + f"pykvm: {text}\n".encode().hex().encode())
        self._notes = []

    def _dispatch(self, payload: bytes) -> bytes | None:
        handler = HANDLERS.get(payload[:1])
        if handler is not None:
            return handler(self, payload[1:])
        end = next((at for at, byte in enumerate(payload[:64]) if byte in b":;,"), len(payload))
        named = NAMED.get(payload[:end])
        return UNKNOWN if named is None else named(self, payload[end + 1 :])

    # -- stopping -----------------------------------------------------------------------------------------------

    def woken(self) -> None:
        """A vCPU has stopped, or the run has ended: tell gdb, if it waits for that."""
        if not self.running:
            return
        outcome = self.machine.outcome
        if outcome is not None and not self.machine.running:
            self._ended(outcome)
        elif self.control.stops:
            self.control.stop()
            self._stopped(self.control.stops.popleft())

    def _interrupt(self) -> None:
        if self.running:
            self.control.stop()
            self.woken()  # something else may just have stopped it
            if self.running:
                self._stopped(Stop(self.current, SIGINT))

    def _stopped(self, stop: Stop) -> None:
        self.running = False
        self.current = stop.vcpu
        self._last_stop = stop
        if self.control.crash is not None:
            self.tell(f"{self.control.crash.kind}: {self.control.crash.detail}; going on ends the machine")
        self._flush_notes()
        self.reply(self.stop_reply())

    def stop_reply(self) -> bytes:
        stop, numbers = self._last_stop, self.layout.numbers
        names = ("rip", "rsp", "rbp") if self.layout.bits == 64 else ("eip", "esp", "ebp")
        text = f"T{stop.signal:02x}thread:{stop.vcpu.index + 1:x};{stop.reason}"
        for name in names:
            text += f"{numbers[name]:x}:{self.layout.read(stop.vcpu, [numbers[name]]).hex()};"
        return text.encode()

    def _ended(self, outcome: Outcome) -> None:
        self.running = False
        self._flush_notes()
        self.reply(b"W%02x" % (outcome.exit_status & 0xFF))
        self.finished = True

    def closing(self) -> None:
        """The machine is being closed."""
        if not self.finished:
            outcome = self.machine.outcome
            self.reply(b"X0f" if outcome is None else b"W%02x" % (outcome.exit_status & 0xFF))
            self.finished = True

    def resume(self, actions: dict[int, range | None]) -> bytes | None:
        """Go on: no reply now, a stop reply later; or at once an error."""
        if self.running:
            return EBUSY
        try:
            self.control.resume(actions)
        except DebugUnsupported as problem:
            self.tell(str(problem))
            self._flush_notes()  # gdb is waiting for a stop and shows them
            return EOPNOTSUPP
        self.running = True
        self.woken()
        return None

    def vcpu(self, thread: int) -> Vcpu:
        """The vCPU of a gdb thread id. Raises IndexError."""
        if not 0 < thread <= len(self.machine.vcpus):
            raise IndexError(thread)
        return self.machine.vcpus[thread - 1]

    def need_stopped(self) -> None:
        """Raises ValueError while the guest runs."""
        if self.running:
            raise ValueError("the guest runs")

    # -- memory -------------------------------------------------------------------------------------------------

    def read_memory(self, address: int, length: int) -> bytes:
        """As much of it as there is, without our breakpoints. Raises GuestAddressError when nothing is."""
        out = b""
        while len(out) < length:
            part = min(length - len(out), PAGE_SIZE - (address + len(out)) % PAGE_SIZE)
            try:
                out += self.control.debugger.traps.read(self._gpa(address + len(out), part), part)
            except GuestAddressError:
                if not out:
                    raise
                break
        return out

    def write_memory(self, address: int, data: bytes) -> None:
        """All of it, or nothing and GuestAddressError."""
        pieces, done = [], 0
        while done < len(data):
            part = min(len(data) - done, PAGE_SIZE - (address + done) % PAGE_SIZE)
            gpa = self._gpa(address + done, part)
            self.control.debugger.traps.read(gpa, part)
            pieces.append((gpa, data[done : done + part]))
            done += part
        for gpa, piece in pieces:
            self.control.debugger.traps.write(gpa, piece)

    def _gpa(self, address: int, length: int) -> int:
        if self.physical:
            return address
        found = self.control.debugger.translate(self.current, address)
        if found.gpa is None:
            raise GuestAddressError(address, length, found.reason)
        return found.gpa
