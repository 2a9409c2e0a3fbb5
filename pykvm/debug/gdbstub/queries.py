"""Queries and packets that have a name: q..., Q..., v... . Layer: debug.

As packets.py: a handler gets the session and what follows the name and its separator.

Source: GDB manual, appendix E, "General Query Packets"; Qqemu.PhyMemMode: QEMU's documentation, "GDB usage".
"""

from __future__ import annotations

from pykvm._native import lib
from pykvm.debug.gdbstub.control import CONTINUE, STEP
from pykvm.debug.gdbstub.monitor import run_command
from pykvm.debug.gdbstub.packets import EINVAL, OK, UNKNOWN, kill, number
from pykvm.debug.gdbstub.rsp import MAX_PACKET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.vcpu import Vcpu
    from pykvm.debug.gdbstub.packets import Handler
    from pykvm.debug.gdbstub.session import Session

FEATURES = (
    f"PacketSize={MAX_PACKET:x};QStartNoAckMode+;qXfer:features:read+;swbreak+;hwbreak+;vContSupported+;multiprocess-"
)


def on_supported(session: Session, rest: bytes) -> bytes:
    """qSupported."""
    return FEATURES.encode()


def on_no_acks(session: Session, rest: bytes) -> bytes:
    """QStartNoAckMode."""
    session.acks = False
    return OK


def on_xfer(session: Session, rest: bytes) -> bytes:
    """qXfer:features:read:target.xml:OFFSET,LENGTH."""
    kind, operation, name, where = rest.split(b":")
    if (kind, operation) != (b"features", b"read"):
        return UNKNOWN
    if name != b"target.xml":
        return b"E00"
    offset, length = map(number, where.split(b","))
    document = session.layout.xml().encode()
    piece = document[offset : offset + min(length, MAX_PACKET // 2)]
    return (b"m" if offset + len(piece) < len(document) else b"l") + piece


def on_threads(session: Session, rest: bytes) -> bytes:
    """qfThreadInfo: every vCPU."""
    return b"m" + b",".join(b"%x" % (vcpu.index + 1) for vcpu in session.machine.vcpus)


def on_more_threads(session: Session, rest: bytes) -> bytes:
    """qsThreadInfo: that was all."""
    return b"l"


def on_thread_info(session: Session, rest: bytes) -> bytes:
    """qThreadExtraInfo,THREAD."""
    vcpu = session.vcpu(number(rest))
    text = f"vCPU {vcpu.index}" if session.running else describe(vcpu)
    return text.encode().hex().encode()


def describe(vcpu: Vcpu) -> str:
    """What `info threads` says of it."""
    states = {
        lib.KVM_MP_STATE_HALTED: "halted",
        lib.KVM_MP_STATE_UNINITIALIZED: "waits for INIT",
        lib.KVM_MP_STATE_INIT_RECEIVED: "waits for SIPI",
    }
    state = states.get(vcpu.fd.get_mp_state(), "runs")
    return f"vCPU {vcpu.index}, ring {vcpu.sregs.ss.dpl}, {state}"


def on_current(session: Session, rest: bytes) -> bytes:
    """qC."""
    return b"QC%x" % (session.current.index + 1)


def on_attached(session: Session, rest: bytes) -> bytes:
    """qAttached: the machine was there before gdb, which therefore detaches when it quits."""
    return b"1"


def on_set_physical(session: Session, rest: bytes) -> bytes:
    """Qqemu.PhyMemMode:1 makes addresses physical, 0 linear again."""
    if rest not in (b"0", b"1"):
        return EINVAL
    session.physical = rest == b"1"
    return OK


def on_get_physical(session: Session, rest: bytes) -> bytes:
    """qqemu.PhyMemMode."""
    return b"1" if session.physical else b"0"


def on_monitor(session: Session, rest: bytes) -> bytes:
    """qRcmd,HEX: gdb's `monitor`."""
    session.need_stopped()
    text = run_command(session, bytes.fromhex(rest.decode("ascii")).decode("utf-8", "replace"))
    lines = text.encode()
    step = MAX_PACKET // 2 - 16
    for at in range(0, len(lines), step):
        session.reply(b"O" + lines[at : at + step].hex().encode())
    return OK


def on_vcont_query(session: Session, rest: bytes) -> bytes:
    """vCont?: the actions that it takes."""
    return b"vCont;c;C;s;S;r"


def on_vcont(session: Session, rest: bytes) -> bytes | None:
    """vCont;ACTION[:THREAD]... : the leftmost action that names a thread, or names none, is that thread's."""
    actions: dict[int, range | None] = {}
    for part in rest.split(b";"):
        action, _, thread = part.partition(b":")
        letter = action[:1]
        if letter not in (b"c", b"C", b"s", b"S", b"r"):
            return EINVAL
        kind = CONTINUE if letter in (b"c", b"C") else STEP
        if letter == b"r":
            start, end = map(number, action[1:].split(b","))
            kind = range(start, end)
        if thread in (b"", b"-1", b"0"):
            chosen = [vcpu.index for vcpu in session.machine.vcpus]
        else:
            chosen = [session.vcpu(number(thread)).index]
        for index in chosen:
            actions.setdefault(index, kind)
    return session.resume(actions)


def on_vkill(session: Session, rest: bytes) -> bytes:
    """vKill;PID."""
    kill(session)
    return OK


def on_empty(session: Session, rest: bytes) -> bytes:
    """vMustReplyEmpty."""
    return UNKNOWN


def on_symbol(session: Session, rest: bytes) -> bytes:
    """qSymbol: we ask for none."""
    return OK


NAMED: dict[bytes, Handler] = {
    b"qSupported": on_supported,
    b"QStartNoAckMode": on_no_acks,
    b"qXfer": on_xfer,
    b"qfThreadInfo": on_threads,
    b"qsThreadInfo": on_more_threads,
    b"qThreadExtraInfo": on_thread_info,
    b"qC": on_current,
    b"qAttached": on_attached,
    b"Qqemu.PhyMemMode": on_set_physical,
    b"qqemu.PhyMemMode": on_get_physical,
    b"qRcmd": on_monitor,
    b"qSymbol": on_symbol,
    b"vCont?": on_vcont_query,
    b"vCont": on_vcont,
    b"vKill": on_vkill,
    b"vMustReplyEmpty": on_empty,
}
