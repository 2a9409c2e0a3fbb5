"""Networks with Debian's kernel: DHCP and a forwarded port through passt, TCP transfers through passt and taps.

PYKVM_NET_MIB says how much each transfer moves (default 4; 100 takes minutes on an emulated CPU).
"""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import socket
import subprocess
import threading
import urllib.request
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pykvm import BootConfig, Outcome, Pc
from pykvm.virtio.net import Net
from pykvm.virtio.passt import Passt
from pykvm.virtio.tap import Tap
from pykvm.virtio.vhost_net import VhostNet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = int(os.environ.get("PYKVM_NET_MIB", "4"))
SECONDS = 100 + 4 * MIB  # for one expectation; the lab's CPU is emulated and may share its machine
GATEWAY, TAP_HOST, TAP_GUEST = "192.168.77.1", "10.77.0.1", "10.77.0.2"
VHOST_HOST, VHOST_GUEST = "10.79.0.1", "10.79.0.2"
WEB, UPLOAD = 8000, 9000  # ports of the lab, at its lo and at the tap
FORWARDED, END = 18080, 19001  # ports of the lab that lead to 8080 and 9001 of the guest

ETH_P_ALL, ETHERNET_MTU = 3, 1500

DHCP_SCRIPT = b"""#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router" dev "$interface"
"""
JOB = f"""#!/bin/sh
set -e
transfer() {{
    wget -q -O /tmp/data http://$1:{WEB}/data
    echo "job: got $(sha256sum </tmp/data) from $1"
    nc $1 {UPLOAD} </tmp/data >/dev/null
}}
ip link set lo up
ip link set eth0 up
udhcpc -i eth0 -n -q -s /bin/dhcp
echo "job: $(ip -4 addr show eth0 | grep inet)"
echo "job: $(ip link show eth0 | grep mtu)"
transfer {GATEWAY}
ip addr add {TAP_GUEST}/24 dev eth1
ip link set eth1 up
transfer {TAP_HOST}
ip addr add {VHOST_GUEST}/24 dev eth2
ip link set eth2 up
transfer {VHOST_HOST}
mkdir /www
echo "the guest's page" >/www/page
httpd -p 8080 -h /www
echo "job: serving"
nc -l -p 9001 </dev/null
"""


@pytest.fixture
def uplink() -> Iterator[None]:
    """A default route, which the lab has not, and without which passt sees no network to show to the guest."""
    if not os.path.exists("/dev/net/tun"):
        pytest.fail("the lab has no /dev/net/tun: scripts/lab --module tun", pytrace=False)
    if not os.path.exists("/dev/vhost-net"):
        pytest.fail("the lab has no /dev/vhost-net: scripts/lab --module vhost_net", pytrace=False)
    if not shutil.which("passt"):
        pytest.fail("passt is not installed: scripts/setup --lab", pytrace=False)
    for words in (
        "link set lo up",
        "tuntap add mode tap name uplink0",
        "addr add 192.168.77.2/24 dev uplink0",
        "link set uplink0 up",
        f"route add default via {GATEWAY}",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    yield
    subprocess.run(["ip", "link", "del", "uplink0"], check=True)


@pytest.fixture
def data(tmp_path: Path) -> Iterator[bytes]:
    """Random bytes, no two MiB the same, which a web server on port WEB serves as /data."""
    block = os.urandom((1 << 20) - 4)  # making them all takes long on an emulated CPU
    content = b"".join(number.to_bytes(4, "big") + block for number in range(MIB))
    (tmp_path / "data").write_bytes(content)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("", WEB), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield content
        server.shutdown()
        thread.join()


class Uploads:
    """A server that takes one connection after the other to its end; `hashes` of what came."""

    def __init__(self, count: int) -> None:
        self.hashes: list[str] = []
        self._listener = socket.create_server(("", UPLOAD))
        self._listener.settimeout(SECONDS)
        self._thread = threading.Thread(target=self._serve, args=(count,), daemon=True)
        self._thread.start()

    def _serve(self, count: int) -> None:
        for _ in range(count):
            connection, _ = self._listener.accept()
            digest = hashlib.sha256()
            with connection:
                connection.settimeout(SECONDS)
                connection.sendall(b"\n")  # passt of March 2023 (Debian 12) resets after 24 s who was never answered
                while piece := connection.recv(1 << 20):
                    digest.update(piece)
            self.hashes.append(digest.hexdigest())

    def close(self) -> None:
        """Wait for the last one."""
        self._thread.join(SECONDS)
        self._listener.close()


class LongFrames:
    """Watches an interface of the lab for frames that are longer than any on a wire; `seen` has the directions."""

    def __init__(self, ifname: str) -> None:
        self.seen: set[str] = set()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.bind((ifname, ETH_P_ALL))
        self._socket.settimeout(SECONDS)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        start = bytearray(64)
        with self._socket, suppress(TimeoutError):
            while len(self.seen) < 2:
                length, address = self._socket.recvfrom_into(start, len(start), socket.MSG_TRUNC)
                if length > 2 * ETHERNET_MTU:
                    self.seen.add("to the guest" if address[2] == socket.PACKET_OUTGOING else "from the guest")


def ended_by_connecting(pc: Pc) -> Outcome | None:
    """Connect to END until the guest has ended: passt drops a connection that comes before the guest listens."""
    for _ in range(SECONDS):
        with suppress(ConnectionError):
            socket.create_connection(("127.0.0.1", END), timeout=SECONDS).close()
        outcome = pc.wait(1)
        if outcome is not None:
            return outcome
    return None


@pytest.mark.timeout(2 * SECONDS)
def test_networks(uplink: None, data: bytes, guest_kernel: Path, initrd_with: Callable[..., Path]) -> None:
    """DHCP gives an address; TCP both ways is intact, by passt, a tap and a tap with vhost-net; http comes in."""
    digest = hashlib.sha256(data).hexdigest()
    user = Net(Passt([f"tcp:127.0.0.1:{FORWARDED}-:8080", f"tcp:127.0.0.1:{END}-:9001"], options=["-4"]))
    taps = {TAP_HOST: Tap(), VHOST_HOST: Tap()}
    wired, vhost = Net(taps[TAP_HOST]), VhostNet(taps[VHOST_HOST])
    for address, tap in taps.items():
        subprocess.run(["ip", "addr", "add", f"{address}/24", "dev", tap.ifname], check=True)
    initrd = initrd_with("virtio_mmio", "virtio_net", files={"bin/job": JOB.encode(), "bin/dhcp": DHCP_SCRIPT})
    boot = BootConfig(str(guest_kernel), initrd=str(initrd), cmdline="console=ttyS0 quiet pykvm.run=job")
    uploads, long_frames = Uploads(3), LongFrames(taps[TAP_HOST].ifname)
    with Pc(boot, memory=f"{384 + 2 * MIB}M", devices=[user, wired, vhost]) as pc:
        pc.start()
        pc.console.expect(r"job: .*inet 192\.168\.77\.2/24", timeout=SECONDS)
        pc.console.expect(r"job: .*mtu 65520", timeout=SECONDS)
        for address in (GATEWAY, TAP_HOST, VHOST_HOST):
            pc.console.expect(f"job: got {digest}  - from {address}", timeout=SECONDS)
        pc.console.expect("job: serving", timeout=SECONDS)
        with urllib.request.urlopen(f"http://127.0.0.1:{FORWARDED}/page", timeout=SECONDS) as page:
            assert page.read() == b"the guest's page\n"
        assert ended_by_connecting(pc) == Outcome.POWER_OFF, pc.console.text[-2000:]
        assert "pykvm-initramfs: status 0" in pc.console.text
    uploads.close()
    assert uploads.hashes == [digest] * 3
    assert long_frames.seen == {"to the guest", "from the guest"}  # segments passed unfinished
    assert wired.dropped == user.dropped == {"rx": 0, "tx": 0}
