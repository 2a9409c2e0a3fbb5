"""The gdb server against peers that are no gdb: hostile, absent, too many; and how it starts and ends."""

from __future__ import annotations

import os
import random
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import command
import guests
import pytest
from realmode import BASE, HLT, SPIN, machine, out_al

from pykvm import ConfigError, Device, Machine, Outcome
from pykvm.debug.gdbstub.listen import parse_address
from pykvm.debug.gdbstub.rsp import encode
from pykvm.debug.gdbstub.server import GdbServer

SECONDS = 60


class Peer:
    """A client that speaks the protocol by hand."""

    def __init__(self, server: GdbServer) -> None:
        if server.path:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(server.path)
        else:
            host, _, port = server.address.rpartition(":")
            self.socket = socket.create_connection((host, int(port)))
        self.socket.settimeout(SECONDS)

    def send(self, data: bytes) -> None:
        """Raw bytes."""
        self.socket.sendall(data)

    def receive(self) -> bytes:
        """The next packet's payload, acknowledgements left out; b"" at the end of the stream."""
        data = b""
        while not (data.startswith(b"$") and data[-3:-2] == b"#"):
            byte = self.socket.recv(1)
            if not byte:
                return b""
            if data or byte == b"$":
                data += byte
        return data[1:-3]

    def ask(self, payload: bytes) -> bytes:
        """The reply to a packet."""
        self.send(encode(payload))
        return self.receive()


@pytest.fixture
def vm() -> Iterator[Machine]:
    """A guest that counts in AX and spins for ever."""
    with machine(b"\x40" + SPIN[:1] + b"\xfd") as vm:  # 1: inc %ax; jmp 1b
        yield vm


@pytest.fixture
def server(vm: Machine) -> GdbServer:
    """Its server, the guest running."""
    server = vm.gdb_server()
    vm.start()
    return server


@pytest.fixture
def peer(server: GdbServer) -> Iterator[Peer]:
    """A connected client: the guest is stopped."""
    peer = Peer(server)
    assert peer.ask(b"?").startswith(b"T05thread:1;")
    yield peer
    peer.socket.close()


def moves(vm: Machine) -> bool:
    """Whether the guest runs."""
    return any(vcpu.running for vcpu in vm.vcpus)


MALFORMED = [
    "p",
    "p-",
    "p-1",
    "pfff",
    "p1_0",
    "P",
    "P1",
    "P1=zz",
    "P1=00",
    "G",
    "G00",
    "m",
    "m0",
    "m,1",
    "m0,",
    "m0,fffffffffff",
    "m0,1,2",
    "mzz,1",
    "M0,2:00",
    "M0,1:0",
    "M0,1:zz",
    "X0,5:a",
    "H",
    "Hx1",
    "Hg",
    "Hg99",
    "Hg-2",
    "T",
    "T0",
    "T99",
    "Tz",
    "z9,0,1",
    "Z0",
    "Z0,0",
    "Z9,0,1",
    "Z2,3,0",
    "Z0,ffffffffffffffffff,1",
    "Z1,0,1,1",
    "vCont;",
    "vCont;x",
    "vCont;c:99",
    "vCont;s:zz",
    "vCont;r",
    "vCont;r1:1",
    "vCont;rx,y:1",
    "c1000",
    "s1000",
    "qXfer",
    "qXfer:",
    "qXfer:features",
    "qXfer:features:read:target.xml",
    "qXfer:features:read:target.xml:zz,1",
    "qXfer:features:read:nothing:0,10",
    "qXfer:memory-map:read::0,10",
    "qRcmd,6",
    "qRcmd,zz",
    "qThreadExtraInfo",
    "qThreadExtraInfo,99",
    "Qqemu.PhyMemMode",
    "Qqemu.PhyMemMode:7",
    "QStartNoAckMode0",
    "vMustReplyEmpty",
    "vNothing;1",
    "qNothing",
    "QNothing",
    "!",
    "_",
    "0",
    "~",
    "vFile:open:61,0,0",
    "jGetLoadedDynamicLibrariesInfos:",
]


@pytest.mark.parametrize("payload", MALFORMED)
def test_malformed_packets_get_an_answer(peer: Peer, payload: str) -> None:
    """Nonsense is answered by an error or by "unknown", and the session goes on."""
    answer = peer.ask(payload.encode())
    assert answer == b"" or answer.startswith(b"E"), answer
    assert peer.ask(b"qC") == b"QC1"


def test_random_packets(vm: Machine, peer: Peer) -> None:
    """Random bytes in packets' clothes neither end the session nor hang it."""
    source = random.Random(5)
    letters = b"?gGpPmMXHTzZqQv0123456789abcdef,;:=-}"
    for _ in range(500):
        peer.send(encode(bytes(source.choices(letters, k=source.randrange(20)))))
    peer.send(encode(b"qfThreadInfo"))
    while peer.receive() != b"m1":
        pass
    peer.ask(b"D")
    vm.stop()


def test_half_a_line(vm: Machine, server: GdbServer) -> None:
    """A client that stops in the middle of a packet and goes costs nothing; the next one is served."""
    first = Peer(server)
    first.send(b"$m0,")
    first.socket.close()
    second = Peer(server)
    assert second.ask(b"qC") == b"QC1"
    assert second.ask(b"D") == b"OK"
    assert moves(vm)


def test_a_gigantic_line(peer: Peer) -> None:
    """Sixteen MiB without an end are swallowed; then the packet is refused and the session goes on."""
    peer.send(b"$")
    for _ in range(256):
        peer.send(b"a" * 65536)
    peer.send(b"#00")
    while peer.socket.recv(1) != b"-":
        pass
    assert peer.ask(b"qC") == b"QC1"


def test_two_clients(vm: Machine, server: GdbServer, peer: Peer) -> None:
    """The second client is turned away, the first one is not disturbed; after it has gone another may come."""
    assert Peer(server).receive() == b""
    assert peer.ask(b"qC") == b"QC1"
    assert peer.ask(b"D") == b"OK"
    assert peer.receive() == b""
    again = Peer(server)
    assert again.ask(b"qC") == b"QC1"


def test_a_client_that_never_reads(vm: Machine, server: GdbServer) -> None:
    """What it does not read is bounded, and neither the guest nor the machine's end waits for it."""
    peer = Peer(server)
    peer.ask(b"QStartNoAckMode")
    peer.socket.setblocking(False)
    sent = 0
    try:
        while sent < 64 << 20:
            sent += peer.socket.send(encode(b"g") * 1000)
    except BlockingIOError:
        pass
    assert len(server._unread) < 1 << 20
    vm.stop()
    vm.close()
    assert not server._thread.is_alive()


def test_packets_while_the_guest_runs(vm: Machine, peer: Peer) -> None:
    """While the guest runs, what needs it stopped is refused; an interrupt stops it."""
    peer.send(encode(b"vCont;c"))
    assert peer.ask(b"g") == b"E10"
    assert peer.ask(b"m0,10") == b"E10"
    assert peer.ask(b"vCont;s:1") == b"E10"
    assert peer.ask(b"qRcmd,68656c70") == b"E16"
    assert peer.ask(b"qC") == b"QC1"
    peer.send(b"\x03")
    assert peer.receive().startswith(b"T02thread:1;")
    assert not moves(vm)
    peer.send(b"\x03\x03")  # already stopped: nothing
    assert peer.ask(b"qC") == b"QC1"


def test_a_client_that_vanishes(vm: Machine, server: GdbServer, peer: Peer) -> None:
    """Its breakpoints go with it; a stopped guest stays stopped for the next client, who sees the guest's bytes."""
    code = vm.memory.read(BASE, 4)
    assert peer.ask(b"Z0,%x,1" % (BASE + 1)) == b"OK"
    assert vm.memory.read(BASE, 4) != code
    peer.socket.close()
    again = Peer(server)
    assert again.ask(b"qC") == b"QC1"
    assert vm.memory.read(BASE, 4) == code
    assert not moves(vm)
    assert again.ask(b"D") == b"OK"
    assert moves(vm)


def test_breakpoints_are_hidden_and_idempotent(vm: Machine, peer: Peer) -> None:
    """Reads show no breakpoint, writes go under it, a second Z or z of the same changes nothing."""
    code = vm.memory.read(BASE, 3)
    for _ in range(2):
        assert peer.ask(b"Z0,%x,1" % BASE) == b"OK"
    assert peer.ask(b"m%x,3" % BASE) == code.hex().encode()
    assert peer.ask(b"M%x,1:41" % BASE) == b"OK"  # inc %cx instead of inc %ax
    assert peer.ask(b"m%x,1" % BASE) == b"41"
    assert vm.memory[BASE] != 0x41
    peer.send(encode(b"vCont;c"))
    assert b"swbreak:;" in peer.receive()
    for _ in range(2):
        assert peer.ask(b"z0,%x,1" % BASE) == b"OK"
    assert vm.memory.read(BASE, 3) == b"\x41" + code[1:]


@pytest.mark.parametrize(("kind", "word"), [(2, "watch"), (3, "rwatch"), (4, "awatch")])
def test_a_watchpoint_is_reported(kind: int, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gdb hears which watchpoint was hit and where; its pieces come and go together."""

    class Pretended:
        exception, pc, dr6, dr7 = 1, BASE, 0xFFFF0FF2, 0x400

    class Trigger(Device):
        def write(self, offset: int, size: int, value: int) -> Outcome | None:
            return vm.debugger.on_debug(vm.vcpus[0], Pretended)

    with machine(out_al(0x40) + HLT) as vm:
        monkeypatch.setattr(vm.debugger.support, "watchpoints", True)
        vm.attach(Trigger(), ports=range(0x40, 0x41))
        peer = Peer(vm.gdb_server(wait=True))
        vm.start()
        assert peer.ask(b"Z%d,10804,c" % kind) == b"OK"  # 4 and 8 bytes
        assert sum(slot is not None for slot in vm.debugger.slots) == 2
        assert peer.ask(b"Z%d,20000,14" % kind) == b"E5f"  # three more are too many: none is set
        assert sum(slot is not None for slot in vm.debugger.slots) == 2
        peer.send(encode(b"vCont;c"))
        assert peer.receive() == b"O" + b"pykvm: all four hardware breakpoints are in use: remove one\n".hex().encode()
        assert f"thread:1;{word}:10804;".encode() in peer.receive()
        assert peer.ask(b"z%d,10804,c" % kind) == b"OK"
        assert vm.debugger.slots == [None] * 4
        peer.send(encode(b"vCont;c"))
        assert peer.receive() == b"W00"


def test_steps_within_a_range(vm: Machine, peer: Peer) -> None:
    """vCont;r steps while the program counter is in the range, and can be interrupted where it never leaves."""
    vm.vcpus[0].regs.update(rip=0, rax=0)
    peer.send(encode(b"vCont;r%x,%x:1" % (BASE, BASE + 1)))  # inc %ax is in it, jmp is not
    assert peer.receive().startswith(b"T05thread:1;")
    assert (vm.vcpus[0].regs.rip, vm.vcpus[0].regs.rax) == (1, 1)
    peer.send(encode(b"vCont;r%x,%x:1" % (BASE, BASE + 3)))
    sleep(0.05)
    peer.send(b"\x03")
    assert peer.receive().startswith(b"T02")
    assert vm.vcpus[0].regs.rax > 1
    assert peer.ask(b"Z0,%x,1" % BASE) == b"OK"
    vm.vcpus[0].regs.rip = 1
    peer.send(encode(b"vCont;r%x,%x:1" % (BASE + 1, BASE + 3)))
    assert peer.receive().startswith(b"T05thread:1;")
    assert vm.vcpus[0].regs.rip == 0


def test_reads_stop_at_the_end_of_memory(peer: Peer) -> None:
    """A read across the end gives what there is, one outside is an error; a write across it changes nothing."""
    assert peer.ask(b"mffffe,10") == b"0000"
    assert peer.ask(b"m100000,10") == b"E0e"
    assert peer.ask(b"Mffffe,4:01020304") == b"E0e"
    assert peer.ask(b"mffffe,2") == b"0000"
    assert peer.ask(b"Xffffe,2:}a") == b"OK"
    assert peer.ask(b"mffffe,2") == b"7d61"


def test_the_end_of_the_machine_is_told(vm: Machine, peer: Peer) -> None:
    """A running guest that is stopped from elsewhere ends gdb's session as an exit; so does closing."""
    peer.send(encode(b"vCont;c"))
    vm.stop()
    assert peer.receive() == b"W00"
    assert peer.receive() == b""


def test_closing_with_a_client_attached(vm: Machine, server: GdbServer, peer: Peer) -> None:
    """close() ends the session and the thread, also while gdb has the guest stopped."""
    vm.close()
    assert peer.receive() in (b"X0f", b"W00")
    assert not server._thread.is_alive()


def test_nothing_runs_before_gdb_says_so() -> None:
    """With wait, a started guest executes nothing until a client lets it; a timeout still works."""
    with machine(HLT) as vm:
        server = vm.gdb_server(wait=True)
        assert vm.run(0.2).kind == "TIMEOUT"
        assert vm.vcpus[0].regs.rip == 0
        vm.start()
        peer = Peer(server)
        assert peer.ask(b"?").startswith(b"T05")
        peer.send(encode(b"vCont;c"))
        assert peer.receive() == b"W00"
        assert vm.wait(SECONDS) == Outcome.HALTED


def test_a_step_before_the_start() -> None:
    """A step that gdb asks for before start() is done when the machine is started."""
    with machine(b"\x90\x90" + HLT) as vm:
        peer = Peer(vm.gdb_server(wait=True))
        assert peer.ask(b"?").startswith(b"T05")
        peer.send(encode(b"vCont;s:1"))
        sleep(0.05)
        vm.start()
        assert peer.receive().startswith(b"T05thread:1;")
        assert vm.vcpus[0].regs.rip == 1


def test_a_step_that_cannot_end_is_interrupted() -> None:
    """A processor that waits for its SIPI executes nothing: the step of it ends by an interrupt, and all goes on."""
    with guests.pc("smp.elf", "cpus=2", cpus=2) as vm:
        server = vm.gdb_server(wait=True, arch="64")
        vm.start()
        peer = Peer(server)
        assert peer.ask(b"Hg2") == b"OK"
        peer.send(encode(b"vCont;s:2"))
        while not vm.vcpus[1].running:
            sleep(0.01)
        assert not vm.vcpus[0].running
        peer.send(b"\x03")
        assert peer.receive().startswith(b"T02")
        assert not moves(vm)
        peer.send(encode(b"vCont;c"))
        assert peer.receive() == b"W01"
        assert guests.text(vm).endswith("smp: 2 of 2 cpus\n")


def test_unix_socket(tmp_path: Path) -> None:
    """A socket of the user's alone, removed at the end; a dead server's is replaced, any other file is not."""
    path = tmp_path / "gdb"
    with machine(HLT) as vm:
        server = vm.gdb_server(f"unix:{path}")
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert Peer(server).ask(b"qC") == b"QC1"
        with machine(HLT) as other, pytest.raises(ConfigError, match="exists already"):
            other.gdb_server(f"unix:{path}")
    assert not path.exists()
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with machine(HLT) as vm:
        assert Peer(vm.gdb_server(f"unix:{path}")).ask(b"qC") == b"QC1"
    path.write_text("precious")
    with machine(HLT) as vm, pytest.raises(ConfigError, match="exists already"):
        vm.gdb_server(f"unix:{path}")
    assert path.read_text() == "precious"


def test_one_server_for_a_machine(vm: Machine, server: GdbServer, peer: Peer) -> None:
    """A second server is refused; closing the first one sends its client away, lets the guest go on and makes room."""
    with pytest.raises(ConfigError, match="a gdb server already"):
        vm.gdb_server()
    assert not moves(vm)
    server.close()
    assert peer.receive() == b"X0f"
    assert moves(vm)
    assert Peer(vm.gdb_server()).ask(b"qC") == b"QC1"


def test_addresses() -> None:
    """[HOST:]PORT, IPv6 in brackets; without a host only this machine can connect."""
    assert parse_address("1234") == ("127.0.0.1", 1234)
    assert parse_address(":0") == ("127.0.0.1", 0)
    assert parse_address("0.0.0.0:1") == ("0.0.0.0", 1)
    assert parse_address("[::1]:65535") == ("::1", 65535)
    for bad in ("", "x", "1:2:", "65536", "-1", "host:", "²"):
        with pytest.raises(ConfigError, match="write PORT"):
            parse_address(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gdb-wait"], "--gdb-wait and --gdb-arch need --gdb WHERE"),
        (["--gdb", "here"], "gdb: 'here' is no address"),
        (["--gdb", "unix:"], "gdb: unix: needs a path"),
        (["--gdb", "unix:/nowhere/x"], "gdb: cannot listen at unix:/nowhere/x: No such file or directory"),
        (["--gdb", "0", "--gdb-arch", "8"], "gdb-arch: '8' is none of auto, 16, 32, 64"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, images: Path) -> None:
    """Wrong --gdb options are one clear line and status 2."""
    done = command.start(*arguments, images / "hello.bin")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_command_line(images: Path, tmp_path: Path) -> None:
    """`pykvm start --gdb unix:PATH --gdb-wait` waits for the client, then runs to the guest's end and tidies up."""
    path = tmp_path / "gdb"
    process = command.spawn("--gdb", f"unix:{path}", "--gdb-wait", images / "hello.bin")
    assert process.stderr is not None
    assert process.stderr.readline() == f"pykvm: gdb: target remote {path}\n".encode()
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.sendall(encode(b"D"))
    output, _ = process.communicate(timeout=command.SECONDS)
    assert (process.returncode, output) == (0, b"Hello from real mode\r\n")
    assert not path.exists()
    client.close()


def test_a_signal_ends_a_held_guest(images: Path, tmp_path: Path) -> None:
    """SIGTERM ends pykvm while gdb has the guest stopped, with the usual status."""
    path = tmp_path / "gdb"
    process = command.spawn("--gdb", f"unix:{path}", "--gdb-wait", images / "hello.bin")
    assert process.stderr is not None
    process.stderr.readline()
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.sendall(encode(b"?"))
    client.recv(100)
    process.terminate()
    output, _ = process.communicate(timeout=command.SECONDS)
    assert (process.returncode, output) == (128 + 15, b"")
    assert not path.exists()
    client.close()
