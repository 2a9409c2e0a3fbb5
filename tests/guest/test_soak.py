"""All devices of one guest at work at the same time, for a while: no error, and nothing that grows.

PYKVM_SOAK_SECONDS says for how long (default 20; a few minutes are a real soak).
"""

from __future__ import annotations

import os
import re
import shutil
import socketserver
import subprocess
import threading
from pathlib import Path

import pytest

from pykvm import BootConfig, Outcome, Pc
from pykvm.virtio.balloon import Balloon
from pykvm.virtio.blk import Disk
from pykvm.virtio.console import Console, ConsolePort
from pykvm.virtio.net import Net
from pykvm.virtio.rng import Rng
from pykvm.virtio.share import Share
from pykvm.virtio.tap import Tap
from pykvm.virtio.vsock import Vsock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS = int(os.environ.get("PYKVM_SOAK_SECONDS", "20"))
PATIENCE_S = 120 + 3 * SECONDS
HOST, GUEST = "10.78.0.1", "10.78.0.2"
ECHO_PORT, VSOCK_PORT = 7007, 5005
MEMORY, BALLOON = 768 << 20, 256 << 20
PHASES = 7  # in which the balloon comes and goes, of an eighth of the time each
WORKERS = ("disk", "net", "console", "rng", "vsock", "share", "memory")
MODULES = (
    "virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_balloon",
    "vmw_vsock_virtio_transport", "virtiofs",
)  # fmt: skip
SETUP = f"""#!/bin/sh
set -e
booted=$(dmesg | wc -l)
ip link set lo up
ip addr add {GUEST}/24 dev eth0
ip link set eth0 up
mkdir -p /disk /share /tmp
mount -t ext4 /dev/vda /disk
mount -t virtiofs soak /share
mount -t tmpfs -o size=96m tmpfs /tmp
for name in {" ".join(WORKERS)}; do worker $name & done
echo 0 >/proc/sys/kernel/hung_task_timeout_secs 2>/dev/null || true
wait
umount /share
umount /disk
! dmesg | tail -n +$booted | grep -E 'I/O error|EXT4-fs error|virtio.*(error|broken)|Call Trace|oom-kill'
echo "soak: kernel content"
"""
WORKER = f"""#!/bin/sh
# worker NAME: rounds of one kind of work until the time is up; says how many it did and how many failed
piece() {{ dd if=/dev/urandom of=/tmp/$1 bs=64k count=$2 2>/dev/null; sha256sum </tmp/$1; }}
same() {{ [ "$(cat)" = "$1" ]; }}
disk() {{
    sum=$(piece disk 16); cp /tmp/disk /disk/$rounds; sync; echo 1 >/proc/sys/vm/drop_caches
    sha256sum </disk/$rounds | same "$sum" && {{ [ $rounds -lt 4 ] || rm /disk/$((rounds - 4)); }}
}}
net() {{ sum=$(piece net 8); nc {HOST} {ECHO_PORT} </tmp/net | sha256sum | same "$sum"; }}
console() {{ echo "line $rounds" >/dev/$port; }}
rng() {{ [ $(dd if=/dev/hwrng bs=256 count=4 iflag=fullblock 2>/dev/null | wc -c) = 1024 ]; }}
vsock() {{ sum=$(piece vsock 8); vsockcat connect {VSOCK_PORT} </tmp/vsock | sha256sum | same "$sum"; }}
share() {{
    sum=$(piece share 8); cp /tmp/share /share/file-$rounds; sha256sum </share/file-$rounds | same "$sum"
    same=$?; rm /share/file-$rounds; return $same
}}
memory() {{ dd if=/dev/zero of=/tmp/fill bs=1M count=24 2>/dev/null; rm /tmp/fill; sleep 1; }}
rounds=0 failed=0
port=$(grep -lx soak /sys/class/virtio-ports/*/name | cut -d/ -f5) # no udev here names it
end=$(($(date +%s) + {SECONDS}))
while [ $(date +%s) -lt $end ]; do
    $1 || failed=$((failed + 1))
    rounds=$((rounds + 1))
    [ $rounds != 1 ] || echo "soak: $1 began" # what comes up with the first round is there now
done
echo "soak: $1 rounds=$rounds failed=$failed"
"""


class Echo(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Sends back what comes, over TCP or a Unix socket."""

    daemon_threads = True
    allow_reuse_address = True


class EchoHandler(socketserver.BaseRequestHandler):
    """One connection."""

    def handle(self) -> None:
        """Until the other side has ended."""
        while data := self.request.recv(65536):
            self.request.sendall(data)


class UnixEcho(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """The end of what the guest says to a vsock port."""

    daemon_threads = True


@pytest.fixture
def echoes(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """echoes() starts the servers, once the tap has its address."""
    servers: list[socketserver.BaseServer] = []

    def start() -> None:
        servers.append(Echo((HOST, ECHO_PORT), EchoHandler))
        servers.append(UnixEcho(str(tmp_path / f"vsock_{VSOCK_PORT}"), EchoHandler))
        for server in servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def holdings() -> dict[str, int]:
    """What this process holds, without connections that come and go, and without the guest's memory (shared)."""
    fds = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert anonymous is not None
    return {
        "fds": sum(not name.startswith("socket:") for name in fds),
        "threads": sum("process_request" not in thread.name for thread in threading.enumerate()),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "heap KiB": int(anonymous[1]),
    }


@pytest.mark.timeout(2 * PATIENCE_S)
def test_soak(
    guest_kernel: Path, initrd_with: Callable[..., Path], images: Path, tmp_path: Path, echoes: Callable[[], None]
) -> None:
    """Disk, network, console, rng, balloon, vsock and a shared folder under load at once: no error, and no leak."""
    if not os.path.exists("/dev/net/tun") or not shutil.which("mke2fs"):
        pytest.fail("needs /dev/net/tun (scripts/lab --module tun) and mke2fs", pytrace=False)
    disk, folder = tmp_path / "disk.img", tmp_path / "shared"
    folder.mkdir()
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", disk], check=True)
    lines: list[bytes] = []
    port = ConsolePort("soak", sink=lambda data: lines.append(bytes(data)))
    balloon, tap = Balloon(), Tap()
    subprocess.run(["ip", "addr", "add", f"{HOST}/24", "dev", tap.ifname], check=True)
    echoes()
    devices = [
        Disk(str(disk)), Net(tap), Console([port]), Rng(), balloon, Vsock(3, str(tmp_path / "vsock")),
        Share(str(folder), tag="soak"),
    ]  # fmt: skip
    files = {"bin/setup": SETUP.encode(), "bin/worker": WORKER.encode()}
    initrd = initrd_with(*MODULES, files=files | {"bin/vsockcat": (images / "vsockcat").read_bytes()})
    boot = BootConfig(str(guest_kernel), initrd=str(initrd), cmdline="console=ttyS0 quiet pykvm.run=setup")
    with Pc(boot, memory=f"{MEMORY >> 20}M", cpus=2, devices=devices) as pc:
        pc.start()
        for _ in WORKERS:
            pc.console.expect(r"soak: \w+ began", timeout=PATIENCE_S)
        before = holdings()
        held = []
        for phase in range(PHASES):
            balloon.set_target(0 if phase % 2 else BALLOON)
            if pc.wait(SECONDS / (PHASES + 1)) is not None:
                break  # a machine this fast has done its rounds
            held.append(balloon.actual)
        after = holdings()
        outcome = pc.wait(PATIENCE_S)
        assert outcome == Outcome.POWER_OFF, (outcome, outcome and outcome.report, pc.console.text[-3000:])
        said = pc.console.text
        faults = {each.name: each.faults for each in pc.virtio if each.faults}
    done = dict(re.findall(r"soak: (\w+) rounds=(\d+) failed=0\b", said))
    assert set(done) == set(WORKERS), said[-3000:]
    assert "soak: kernel content" in said and "status 0" in said, said[-3000:]
    assert not faults
    assert b"".join(lines).count(b"line") == int(done["console"])
    print("soak:", done, {key: (before[key], after[key]) for key in before}, [size >> 20 for size in held])
    assert any(held) or len(held) < PHASES, held  # an emulated CPU takes a second for a MiB
    grown = {key: after[key] - before[key] for key in before}
    assert grown["fds"] <= 0 and grown["threads"] <= 0 and grown["mappings"] <= 16 and grown["heap KiB"] <= 8192, (
        before,
        after,
    )
    checked = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert list(folder.iterdir()) == []
