"""A tap interface of the host as the backend of a network device. Layer: virtio.

Source: Linux Documentation/networking/tuntap.rst, <linux/if_tun.h>. The kernel puts a virtio_net_hdr in front of each
frame (IFF_VNET_HDR), so that checksums and segments pass between host and guest unfinished.
"""

from __future__ import annotations

import errno
import os
import struct

from pykvm._native import ffi, lib
from pykvm.errors import ConfigError
from pykvm.virtio.netbackend import IOV_MAX, BackendGone, NetBackend, net_bits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

NAME_SIZE = lib.PK_IFNAME_SIZE
FREE_NAME = "pykvm%d"  # the kernel puts in the first number that is free

# VIRTIO_NET_F_* -> TUN_F_*: what the guest takes from the host
GUEST_OFFLOADS = (
    ("GUEST_CSUM", "CSUM"),
    ("GUEST_TSO4", "TSO4"),
    ("GUEST_TSO6", "TSO6"),
    ("GUEST_ECN", "TSO_ECN"),
    ("GUEST_UFO", "UFO"),
    ("GUEST_USO4", "USO4"),
    ("GUEST_USO6", "USO6"),
)
ADVICE = {
    errno.EPERM: "it needs root (CAP_NET_ADMIN), or a tap made for this user: ip tuntap add NAME mode tap user USER",
    errno.EACCES: "it needs root, or read and write permission of /dev/net/tun",
    errno.EBUSY: "another program has it open",
    errno.EINVAL: "it is no tap interface, or the name is none that an interface can have",
    errno.ENOENT: "this kernel has no /dev/net/tun: modprobe tun",
    errno.ENODEV: "this kernel has no driver for it: modprobe tun",
}


class Tap(NetBackend):
    """A tap interface: made by pykvm (and gone with it), an existing one by its name, or an open fd of one.

    ifname  a new or existing interface; None takes a free name. `ifname` says which it is.
    fd      a file descriptor of a tap, for programs that may not open one; it is pykvm's from now on
    mtu     the MTU that a new interface gets

    An interface without a virtio header (fd only) works, without offloads. Raises ConfigError.
    """

    def __init__(self, ifname: str | None = None, *, fd: int | None = None, mtu: int = 0) -> None:
        if ifname is not None and fd is not None:
            raise ConfigError("tap", "give either ifname= or fd=")
        self.fd = -1
        self._recipe = None if fd is not None else {"ifname": ifname or "", "mtu": mtu}
        try:
            if fd is not None:
                self._adopt(fd)
            else:
                self._open(FREE_NAME if ifname is None else ifname, mtu)
            self.name = f"tap {self.ifname}"
            self.is_plain = self.has_header
            self.mtu = max(0, lib.pk_if_mtu(self.ifname.encode()))
            if self.has_header:
                self._check(lib.pk_tap_use_header(self.fd), "header")
                self.offloads = self._probe_offloads()
        except BaseException:
            self.close()
            raise

    def _open(self, ifname: str, mtu: int) -> None:
        name = ifname.encode()
        if not 0 < len(name) < NAME_SIZE:
            raise ConfigError("tap", f"ifname {ifname!r} is not 1 to {NAME_SIZE - 1} characters")
        existed = os.path.exists(f"/sys/class/net/{ifname}")
        buffer = ffi.new("char[]", name.ljust(NAME_SIZE, b"\0"))
        self.ifname = ifname
        self.fd = self._check(lib.pk_tap_open(buffer), "open")
        self.ifname = ffi.string(buffer, NAME_SIZE).decode()
        self.has_header = True
        if not existed:
            self._check(lib.pk_if_up(self.ifname.encode(), mtu), f"switch on with MTU {mtu}" if mtu else "switch on")

    def _adopt(self, fd: int) -> None:
        buffer, flags = ffi.new("char[]", NAME_SIZE), ffi.new("uint32_t *")
        if lib.pk_tap_query(fd, buffer, flags):
            raise ConfigError("tap", f"fd {fd} is no tap interface (or not open)")
        self.fd = fd
        self.ifname = ffi.string(buffer, NAME_SIZE).decode()
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)
        if not flags[0] & lib.IFF_TAP or not flags[0] & lib.IFF_NO_PI:
            raise ConfigError("tap", f"fd {fd} ({self.ifname}) must be a tap opened with IFF_TAP and IFF_NO_PI")
        self.has_header = bool(flags[0] & lib.IFF_VNET_HDR)

    def _check(self, result: int, step: str) -> int:
        if result >= 0:
            return result
        advice = ADVICE.get(-result)
        what = f"cannot {step} interface {self.ifname}: {os.strerror(-result)}"
        raise ConfigError("tap", f"{what}: {advice}" if advice else what)

    def _probe_offloads(self) -> int:
        """Which offloads the kernel's tap can do: it refuses those that it does not know."""
        features = 0
        for guest, flag in GUEST_OFFLOADS:
            bit = getattr(lib, f"TUN_F_{flag}", 0)
            if bit and not lib.pk_ioctl_value(self.fd, lib.TUNSETOFFLOAD, bit | lib.TUN_F_CSUM | _needs(flag)):
                features |= net_bits(guest)
                # from guest to host there is nothing to switch on: what it can give it takes
                features |= net_bits("CSUM" if guest == "GUEST_CSUM" else guest.replace("GUEST", "HOST"))
        if features & net_bits("HOST_USO4"):
            features |= net_bits("HOST_USO")
        lib.pk_ioctl_value(self.fd, lib.TUNSETOFFLOAD, 0)
        return features

    # -- frames -------------------------------------------------------------------------------------------------

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """One frame by one readv, straight into the guest's buffers."""
        try:
            if got := os.readv(self.fd, buffers):
                return got
            raise BackendGone(f"{self.name} was closed")
        except BlockingIOError:
            return 0
        except OSError as error:
            raise BackendGone(f"{self.name}: {error.strerror}") from None

    def send(self, buffers: Sequence[memoryview | bytes]) -> bool:
        """One frame by one writev, straight from the guest's buffers."""
        try:
            os.writev(self.fd, buffers if len(buffers) <= IOV_MAX else [b"".join(buffers)])
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EBADFD:  # the interface was deleted
                raise BackendGone(f"{self.name}: {error.strerror}") from None
            # EIO: the interface is switched off; EINVAL: a frame or header that the kernel does not like
        return True

    # -- settings -----------------------------------------------------------------------------------------------

    def set_offloads(self, features: int) -> None:
        """TUNSETOFFLOAD: without the checksum offload nothing else is possible."""
        mask = 0
        if self.has_header and features & net_bits("GUEST_CSUM"):
            for guest, flag in GUEST_OFFLOADS:
                if features & net_bits(guest):
                    mask |= getattr(lib, f"TUN_F_{flag}")
        lib.pk_ioctl_value(self.fd, lib.TUNSETOFFLOAD, mask)

    def set_filter(self, addresses: Sequence[bytes] | None, *, all_multicast: bool = False) -> None:
        """TUNSETTXFILTER: the kernel then queues no other frames."""
        wanted = addresses or ()
        flags = lib.TUN_FLT_ALLMULTI if all_multicast else 0
        table = struct.pack("=HH", flags, len(wanted)) + b"".join(wanted)  # struct tun_filter
        lib.pk_ioctl(self.fd, lib.TUNSETTXFILTER, ffi.new("char[]", table))

    def set_link(self, up: bool) -> None:
        """TUNSETCARRIER: the host's end shows NO-CARRIER, and queues nothing."""
        lib.pk_ioctl(self.fd, lib.TUNSETCARRIER, ffi.new("int *", int(up)))

    def recipe(self) -> tuple[str, dict[str, object]] | None:
        """An interface of the same name, or with any free one if it had no special one; nothing for an fd."""
        return None if self._recipe is None else ("tap", {**self._recipe})

    def close(self) -> None:
        """Close the fd: an interface that pykvm made vanishes, a persistent one is as before."""
        if self.fd >= 0:
            self.set_filter(None)
            lib.pk_ioctl_value(self.fd, lib.TUNSETOFFLOAD, 0)
            os.close(self.fd)
            self.fd = -1


def _needs(flag: str) -> int:
    """What the kernel wants beside a flag: ECN some TSO, and each of the USO ones the other."""
    if flag == "TSO_ECN":
        return lib.TUN_F_TSO4
    if flag.startswith("USO"):
        return int(getattr(lib, "TUN_F_USO4", 0)) | int(getattr(lib, "TUN_F_USO6", 0))
    return 0
