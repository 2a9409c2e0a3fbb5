"""What each packet of one letter does. Layer: debug.

A handler gets the session and what follows the letter; it returns the reply, or None when there is none (yet). It may
raise ValueError, IndexError and PykvmError: the session answers them with an error packet.

Source: GDB manual, appendix E, "Packets".
"""

from __future__ import annotations

from pykvm.debug.gdbstub.control import CONTINUE, STEP
from pykvm.debug.gdbstub.rsp import MAX_PACKET, unescape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.debug.gdbstub.session import Session

    Handler = Callable[[Session, bytes], bytes | None]

EIO, EFAULT, EINVAL, EBUSY, EOPNOTSUPP = b"E05", b"E0e", b"E16", b"E10", b"E5f"
OK, UNKNOWN = b"OK", b""
PAGE_SIZE = 4096
MAX_MEMORY = MAX_PACKET // 2 - 16  # bytes in one m or M packet


def number(text: bytes) -> int:
    """A hexadecimal number without sign, prefix or underscore. Raises ValueError."""
    if not text or len(text) > 16 or not all(digit in b"0123456789abcdefABCDEF" for digit in text):
        raise ValueError(f"no number: {text[:20]!r}")
    return int(text, 16)


def _range(text: bytes, limit: int) -> tuple[int, int]:
    address, _, length = text.partition(b",")
    if number(length) > limit:
        raise ValueError("too long")
    return number(address), number(length)


def on_why(session: Session, rest: bytes) -> bytes:
    """? : why it is stopped."""
    session.need_stopped()
    return session.stop_reply()


def on_read_all(session: Session, rest: bytes) -> bytes:
    """g : all registers."""
    return session.layout.read(session.current).hex().encode()


def on_write_all(session: Session, rest: bytes) -> bytes:
    """G : all registers."""
    session.layout.write(session.current, bytes.fromhex(rest.decode("ascii")))
    return OK


def on_read_one(session: Session, rest: bytes) -> bytes:
    """p N : one register."""
    return session.layout.read(session.current, [number(rest)]).hex().encode()


def on_write_one(session: Session, rest: bytes) -> bytes:
    """P N=VALUE."""
    register, _, value = rest.partition(b"=")
    session.layout.write(session.current, bytes.fromhex(value.decode("ascii")), number(register))
    return OK


def on_read_memory(session: Session, rest: bytes) -> bytes:
    """m ADDRESS,LENGTH."""
    address, length = _range(rest, MAX_MEMORY)
    return session.read_memory(address, length).hex().encode()


def on_write_memory(session: Session, rest: bytes) -> bytes:
    """M ADDRESS,LENGTH:HEX."""
    where, _, digits = rest.partition(b":")
    address, length = _range(where, MAX_MEMORY)
    data = bytes.fromhex(digits.decode("ascii"))
    if len(data) != length:
        raise ValueError("wrong length")
    session.write_memory(address, data)
    return OK


def on_write_binary(session: Session, rest: bytes) -> bytes:
    """X ADDRESS,LENGTH:BINARY."""
    where, _, escaped = rest.partition(b":")
    address, length = _range(where, MAX_PACKET)
    data = unescape(escaped)
    if len(data) != length:
        raise ValueError("wrong length")
    session.write_memory(address, data)
    return OK


def on_thread(session: Session, rest: bytes) -> bytes:
    """H OP THREAD : which thread later packets are about; 0 any, -1 all."""
    operation, thread = rest[:1], rest[1:]
    vcpu = None if thread in (b"0", b"-1") else session.vcpu(number(thread))
    if operation == b"g":
        session.current = vcpu or session.current
    elif operation == b"c":
        session.resumed = vcpu.index if vcpu is not None else None
    else:
        return UNKNOWN
    return OK


def on_alive(session: Session, rest: bytes) -> bytes:
    """T THREAD : whether there is such a thread."""
    session.vcpu(number(rest))
    return OK


def _resume_hc(session: Session, action: range | None) -> bytes | None:
    chosen = [session.resumed] if session.resumed is not None else range(len(session.machine.vcpus))
    return session.resume(dict.fromkeys(chosen, action))


def on_continue(session: Session, rest: bytes) -> bytes | None:
    """c : go on; with an address, or C with a signal, it would be something that no vCPU has."""
    return EINVAL if rest else _resume_hc(session, CONTINUE)


def on_step(session: Session, rest: bytes) -> bytes | None:
    """s : one instruction of the current thread."""
    if rest:
        return EINVAL
    index = session.resumed if session.resumed is not None else session.current.index
    return session.resume({index: STEP})


def _point(rest: bytes) -> tuple[int, int, int]:
    kind, address, length = rest.split(b";")[0].split(b",")
    numbers = number(kind), number(address), number(length)
    if not 0 <= numbers[0] <= 4 or numbers[2] > PAGE_SIZE:
        raise ValueError("no such breakpoint")
    return numbers


def on_insert(session: Session, rest: bytes) -> bytes:
    """Z TYPE,ADDRESS,KIND : a breakpoint or watchpoint."""
    session.control.insert(*_point(rest), session.current)
    return OK


def on_remove(session: Session, rest: bytes) -> bytes:
    """z TYPE,ADDRESS,KIND."""
    session.control.remove(*_point(rest))
    return OK


def on_detach(session: Session, rest: bytes) -> bytes:
    """D : gdb goes, the guest goes on."""
    session.finished = True
    session.control.detach(resume=True)
    return OK


def on_kill(session: Session, rest: bytes) -> bytes | None:
    """k : end the machine; there is no reply."""
    kill(session)
    return None


def kill(session: Session) -> None:
    session.finished = True
    session.control.crash = None
    session.control.detach(resume=False)
    session.machine.stop_soon()


HANDLERS: dict[bytes, Handler] = {
    b"?": on_why,
    b"g": on_read_all,
    b"G": on_write_all,
    b"p": on_read_one,
    b"P": on_write_one,
    b"m": on_read_memory,
    b"M": on_write_memory,
    b"X": on_write_binary,
    b"H": on_thread,
    b"T": on_alive,
    b"c": on_continue,
    b"s": on_step,
    b"Z": on_insert,
    b"z": on_remove,
    b"D": on_detach,
    b"k": on_kill,
}
