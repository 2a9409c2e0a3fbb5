"""vhost-net: what the kernel is told, without a kernel that has it; Linux uses it in tests/guest."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
from driver import EVENT_IDX, RAM, Driver
from netpeer import FakeTap

from pykvm._native import ffi, lib
from pykvm.cli.devices import make_devices
from pykvm.core.actions import ActionTable
from pykvm.errors import ConfigError, SnapshotError, UsageError
from pykvm.virtio import vhost_net
from pykvm.virtio.net import RX, TX
from pykvm.virtio.vhost_net import RING_FEATURES, VhostNet

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.virtio.device import VirtioDevice

    Drive = Callable[[VirtioDevice], Driver]

RING_BIT, CONFIG_BIT = lib.VIRTIO_MMIO_INT_VRING, lib.VIRTIO_MMIO_INT_CONFIG


class Kernel:
    """Stands in for /dev/vhost-net: remembers the calls, and gives what a real one would."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.features = RING_FEATURES | 1 << 24
        self.refuses = ""
        self.next_avail = 0

    def call(self, name: str, argument: object) -> None:
        """In the place of VhostNet._call."""
        if name == self.refuses:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        if name == "GET_FEATURES":
            argument[0] = self.features  # type: ignore[index]
        elif name == "GET_VRING_BASE":
            argument.num = self.next_avail  # type: ignore[attr-defined]
        elif name == "SET_FEATURES":
            self.calls.append((name, argument[0]))  # type: ignore[index]
        elif name != "SET_OWNER":
            fields = ffi.typeof(argument).item.fields
            self.calls.append((name, *(getattr(argument, field) for field, _ in fields if field != "regions")))

    def take(self, *names: str) -> list[tuple[object, ...]]:
        """The calls of these names since the last time."""
        found = [call for call in self.calls if call[0] in names]
        self.calls.clear()
        return found


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel with vhost-net."""
    kernel = Kernel()
    monkeypatch.setattr(vhost_net, "DEVICE", os.devnull)
    monkeypatch.setattr(VhostNet, "_call", kernel.call)
    return kernel


def test_hands_memory_and_queues_over(kernel: Kernel, drive: Drive) -> None:
    """At DRIVER_OK the kernel gets the features, the slots, and of each queue of frames its rings and descriptors."""
    tap = FakeTap()
    driver = drive(VhostNet(tap))
    driver.memory.add(RAM, 4096, name="rom", readonly=True)
    rx, tx, _ = driver.start(driver.features())
    start, transport = driver.memory.slots[0].hva, driver.transport
    expected: list[tuple[object, ...]] = [("SET_FEATURES", RING_FEATURES), ("SET_MEM_TABLE", 1, 0)]
    for index, queue in ((RX, rx), (TX, tx)):
        rings = (start + queue.desc, start + queue.used_ring, start + queue.avail)
        expected += [
            ("SET_VRING_NUM", index, 64),
            ("SET_VRING_BASE", index, 0),
            ("SET_VRING_ADDR", index, 0, *rings, 0),
            ("SET_VRING_CALL", index, transport.call),
            ("SET_VRING_ERR", index, transport.device._error_event),  # type: ignore[attr-defined]
            ("SET_VRING_KICK", index, transport.kicks[index]),
            ("NET_SET_BACKEND", index, tap.fd),
        ]
    assert kernel.calls == expected
    for index in (RX, TX):  # and nobody here takes their notifications
        assert os.eventfd_read(transport.kicks[index]) == 1


def test_what_is_not_negotiated_the_kernel_does_not_use(kernel: Kernel, drive: Drive) -> None:
    """Only what the driver took."""
    drive(VhostNet(FakeTap())).start(0)
    assert kernel.take("SET_FEATURES") == [("SET_FEATURES", RING_FEATURES & ~EVENT_IDX & 1 << 32)]


def test_interrupts_of_the_kernel_and_of_pykvm(kernel: Kernel, drive: Drive) -> None:
    """InterruptStatus always shows a used buffer, as the kernel sets no bit; a change of the configuration ends."""
    net = VhostNet(FakeTap())
    driver = drive(net)
    driver.start()
    assert driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) == RING_BIT
    net.set_link(False)
    assert driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) == RING_BIT | CONFIG_BIT
    driver.write(lib.VIRTIO_MMIO_INTERRUPT_ACK, RING_BIT | CONFIG_BIT)
    assert driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS) == RING_BIT
    actions = ActionTable()
    driver.transport.answer_in_c(actions)  # C keeps the bit as well
    assert [entry.value for entry in actions._entries] == [0, RING_BIT]


def test_the_control_queue_is_served_here(kernel: Kernel, drive: Drive) -> None:
    """A command is answered as without vhost."""
    tap = FakeTap()
    driver = drive(VhostNet(tap))
    *_, control = driver.start()
    command = bytes((lib.VIRTIO_NET_CTRL_RX, lib.VIRTIO_NET_CTRL_RX_PROMISC, 0))
    (answer,) = control.add([command], [1])
    control.kick()
    assert control.used() == [(0, 1)] and driver.memory.read_u8(answer) == lib.VIRTIO_NET_OK
    assert tap.settings[-1][0] == "filter"  # type: ignore[index]


def test_the_link_can_be_pulled(kernel: Kernel, drive: Drive) -> None:
    """Without a link the kernel has no tap; it goes on at the entry where it was."""
    tap = FakeTap()
    net = VhostNet(tap)
    drive(net).start()
    kernel.calls.clear()
    kernel.next_avail = 7
    net.set_link(False)
    assert kernel.take("NET_SET_BACKEND") == [("NET_SET_BACKEND", RX, -1), ("NET_SET_BACKEND", TX, -1)]
    net.set_link(True)
    assert kernel.take("SET_VRING_BASE") == [("SET_VRING_BASE", RX, 7), ("SET_VRING_BASE", TX, 7)]


def test_a_reset_takes_the_queues_back(kernel: Kernel, drive: Drive) -> None:
    """After a reset the kernel has no tap, and a new driver starts at the first entry."""
    driver = drive(VhostNet(FakeTap()))
    driver.start()
    kernel.calls.clear()
    kernel.next_avail = 7
    driver.write(lib.VIRTIO_MMIO_STATUS, 0)
    assert kernel.take("NET_SET_BACKEND") == [("NET_SET_BACKEND", RX, -1), ("NET_SET_BACKEND", TX, -1)]
    driver.start()
    assert kernel.take("SET_VRING_BASE") == [("SET_VRING_BASE", RX, 0), ("SET_VRING_BASE", TX, 0)]


def test_a_broken_ring_stops_the_device(kernel: Kernel, drive: Drive) -> None:
    """What the kernel reports through its eventfd is NEEDS_RESET, and the kernel lets go."""
    net = VhostNet(FakeTap())
    driver = drive(net)
    driver.start()
    kernel.calls.clear()
    os.eventfd_write(net._error_event, 1)
    driver.io.run()
    assert driver.needs_reset
    assert len(kernel.take("NET_SET_BACKEND")) == 2


def test_a_kernel_that_refuses_stops_the_device(kernel: Kernel, drive: Drive) -> None:
    """An error of an ioctl at DRIVER_OK is NEEDS_RESET, too."""
    driver = drive(VhostNet(FakeTap()))
    kernel.refuses = "SET_VRING_ADDR"
    driver.start()
    assert driver.needs_reset


def test_stays_with_its_tap(kernel: Kernel, drive: Drive) -> None:
    """It can neither be plugged into something else, nor be taken along in a snapshot."""
    net = VhostNet(FakeTap())
    driver = drive(net)
    driver.start()
    other = FakeTap()
    with pytest.raises(ConfigError, match="stays with its tap"):
        net.plug(other)
    assert other.fd == -1
    for refused in (net.twin, net.recipe, driver.transport.save):
        with pytest.raises(SnapshotError, match="net tap fake0"):
            refused()


def test_says_what_is_missing(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """No device node, a kernel that cannot do enough, and a tap without headers; nothing is left open."""
    tap = FakeTap(has_header=False)
    with pytest.raises(ConfigError, match="no virtio header"):
        VhostNet(tap)
    kernel.features = 0
    with pytest.raises(ConfigError, match="lacks features"):
        VhostNet(FakeTap())
    monkeypatch.setattr(vhost_net, "DEVICE", "/nowhere/vhost-net")
    with pytest.raises(ConfigError, match="modprobe vhost_net"):
        VhostNet(FakeTap())
    assert tap.fd == -1


def test_the_option(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """--net tap,vhost makes one; with a rate limit, or for another network, it is refused."""
    taps: list[FakeTap] = []

    def make(*arguments: object, **options: object) -> FakeTap:
        taps.append(FakeTap())
        return taps[-1]

    monkeypatch.setattr("pykvm.virtio.tap.Tap", make)
    (net,) = make_devices({"net": ["tap,vhost,mac=52:54:00:12:34:56"]})
    assert isinstance(net, VhostNet) and net.mac == bytes.fromhex("525400123456")
    net.close()
    with pytest.raises(UsageError, match="rate limit"):
        make_devices({"net": ["tap,vhost,rate=1M"]})
    assert [tap.fd for tap in taps] == [-1]
    with pytest.raises(UsageError, match="vhost"):
        make_devices({"net": ["user,vhost"]})
