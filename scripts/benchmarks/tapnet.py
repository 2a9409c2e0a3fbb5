"""A network namespace with one tap interface, in which a benchmark's candidates run one after the other."""

from __future__ import annotations

import ctypes
import os
import subprocess
from contextlib import contextmanager

from benchmarks.measure import BenchError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

TAP, HOST_ADDRESS, GUEST_ADDRESS = "bench0", "10.77.0.1", "10.77.0.2"
HOST_MAC, GUEST_MAC = "02:00:00:00:00:01", "52:54:00:12:34:56"
CLONE_NEWNET = 0x40000000  # <linux/sched.h>; os.unshare came with Python 3.12
COMMANDS = (
    "ip link set lo up",
    f"ip tuntap add mode tap name {TAP} vnet_hdr",
    f"ip link set {TAP} address {HOST_MAC}",
    f"ip addr add {HOST_ADDRESS}/24 dev {TAP}",
    f"ip link set {TAP} up",
    f"ip neigh replace {GUEST_ADDRESS} lladdr {GUEST_MAC} dev {TAP}",  # the small guest answers no ARP
)


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        error = ctypes.get_errno()
        raise BenchError(f"cannot make a network namespace ({name}: {os.strerror(error)}): it needs root")


@contextmanager
def tap_network() -> Iterator[None]:
    """This process and its children are in a network of their own, of a tap that no other has. Needs root."""
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("unshare", CLONE_NEWNET)
        try:
            with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as stream:
                stream.write("1")  # no router solicitations between the measured frames
            for command in COMMANDS:
                done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
                if done.returncode:
                    raise BenchError(f"{command}: {done.stderr.strip()}")
            yield
        finally:
            _call("setns", before, CLONE_NEWNET)
    except FileNotFoundError as error:
        raise BenchError(f"{error.filename} is missing") from None
    finally:
        os.close(before)
