"""Networks in snapshots: what the driver has set, frames on their way, and what a copy is plugged into."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from netpeer import PLAIN, FakeTap, Stuck, frame
from test_net import MAC, Bench
from test_saved import moved
from test_saved_devices import absurd

from pykvm._native import lib
from pykvm.control.recipes import Ends, make_devices
from pykvm.core.iothread import Timer
from pykvm.errors import ConfigError, SnapshotError, UsageError
from pykvm.virtio.net import RX, TX, Net
from pykvm.virtio.netbackend import net_bits
from pykvm.virtio.passt import Passt

if TYPE_CHECKING:
    from collections.abc import Callable

    from driver import Driver

    from pykvm.core.state import State
    from pykvm.virtio.device import VirtioDevice

    Drive = Callable[[VirtioDevice], Driver]

STATUS = lib.VIRTIO_MMIO_CONFIG + 6
RING, CONFIG = 1, 2


@pytest.fixture(autouse=True, params=["C", "Python"])
def mover(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds whoever moves the frames."""
    monkeypatch.setattr(FakeTap, "by_c", request.param == "C")


def copy_of(bench: Bench, tap: FakeTap | None = None) -> tuple[Driver, Net, list[Timer]]:
    """A copy of the machine, plugged into `tap` before its state is restored, and the timers that it sets."""
    twin, timers = bench.net.twin(), []

    def call_later(delay_s: float, callback: Callable[[], object]) -> Timer:
        timers.append(Timer(delay_s, callback))
        return timers[-1]

    state = bench.driver.transport.save()
    other = moved(bench.driver, twin, state)
    other.io.call_later = call_later  # type: ignore[method-assign]
    if tap is not None:
        twin.plug(tap)
        other.transport.restore(state)
        other.io.run()
    return other, twin, timers


def link_of(driver: Driver) -> int:
    """The link status that the guest reads."""
    return driver.read(STATUS, 2) & lib.VIRTIO_NET_S_LINK_UP


def config_interrupt(driver: Driver) -> bool:
    """Whether the guest is told to look at the configuration, since it was asked last."""
    pending = driver.read(lib.VIRTIO_MMIO_INTERRUPT_STATUS)
    driver.write(lib.VIRTIO_MMIO_INTERRUPT_ACK, pending)
    return bool(pending & CONFIG)


def test_a_copy_is_unplugged(drive: Drive) -> None:
    """It has the address, its link is down, which the guest hears, and what it sends goes nowhere."""
    bench = Bench(drive)
    bench.send(PLAIN, frame(60))
    other, twin, _ = copy_of(bench)
    assert config_interrupt(other) and link_of(other) == 0
    assert other.read(lib.VIRTIO_MMIO_CONFIG, 4) == int.from_bytes(bytes.fromhex(MAC.replace(":", ""))[:4], "little")
    other.queues[TX].used()
    other.queues[TX].add([PLAIN, frame(60)])
    other.queues[TX].kick()
    assert len(other.queues[TX].used()) == 1 and twin.dropped["tx"] == 1
    assert bench.tap.sent() == []
    other.close()


def test_a_copy_is_plugged_in(drive: Drive) -> None:
    """The link is down until the guest has looked, then comes up; frames pass at once, both ways, from where it was."""
    bench = Bench(drive)
    bench.offer(2048)
    bench.offer(2048)
    bench.arrive(PLAIN + frame(60))
    assert len(bench.rx.used()) == 1
    tap = FakeTap()
    other, _, timers = copy_of(bench, tap)
    assert config_interrupt(other)
    assert not timers and link_of(other) == 0 and link_of(other) == 0
    (timer,) = timers
    timer.callback()
    assert config_interrupt(other) and link_of(other) == 1 and len(timers) == 1
    tap.peer.send(PLAIN + frame(70))
    other.io.run()
    assert [written for _, written in other.queues[RX].used()] == [12 + 70]
    other.queues[TX].add([PLAIN, frame(80)])
    other.queues[TX].kick()
    assert tap.sent() == [PLAIN + frame(80)]
    other.close()


def test_the_same_machine_keeps_its_network(drive: Drive) -> None:
    """Put back to an earlier snapshot, it is plugged in as it was: nothing is said about the link."""
    bench = Bench(drive)
    state = bench.driver.transport.save()
    config_interrupt(bench.driver)
    bench.driver.transport.restore(state)
    assert not config_interrupt(bench.driver) and link_of(bench.driver) == 1
    assert bench.send(PLAIN, frame(60)) == [PLAIN + frame(60)]
    bench.net.link = False
    bench.driver.transport.restore(state)
    assert config_interrupt(bench.driver) and link_of(bench.driver) == 0


def test_what_the_driver_has_set(drive: Drive) -> None:
    """Filters and offloads reach the new backend; a command of the past is not given twice."""
    bench = Bench(drive)
    assert bench.command(b"\0\0", b"\0") == lib.VIRTIO_NET_OK  # not promiscuous
    peer = bytes.fromhex("0200deadbeef")
    assert bench.command(b"\1\0", b"\1\0\0\0" + peer, b"\0\0\0\0") == lib.VIRTIO_NET_OK
    wanted = net_bits("GUEST_CSUM")
    assert bench.command(b"\5\0", wanted.to_bytes(8, "little")) == lib.VIRTIO_NET_OK
    tap = FakeTap()
    other, twin, _ = copy_of(bench, tap)
    last = {each[0]: each[1:] for each in tap.settings}  # type: ignore[index]
    assert last["offloads"] == (wanted,)
    assert last["filter"] == ([twin.mac, b"\xff" * 6, peer], False)
    other.close()


def test_frames_that_wait_are_sent_by_the_copy_as_well(drive: Drive) -> None:
    """A backend that is full has them; each machine sends them once, in order, and gives their buffers back."""
    backend = Stuck()
    net = Net(backend, mac=MAC)
    driver = drive(net)
    _, tx, _ = driver.start()
    for size in (60, 61, 62):
        tx.add([PLAIN, frame(size)])
    tx.kick()
    state = driver.transport.save()
    assert tx.used() == []
    other = moved(driver, net.twin(), state)
    twin, tap = other.transport.device, FakeTap()
    assert isinstance(twin, Net)
    assert len(other.queues[TX].used()) == 3  # dropped: it is not plugged in
    twin.plug(tap)
    other.queues[TX].seen = 0
    other.transport.restore(state)
    other.io.run()
    assert [len(each) - 12 for each in tap.sent()] == [60, 61, 62]
    other.close()
    backend.full = False
    tx.driver = driver
    driver.io.run()
    assert len(tx.used()) == 3


def test_a_backend_that_lacks_offloads(drive: Drive) -> None:
    """A guest that may send unfinished checksums is not plugged into what cannot finish them; what it had stays."""
    bench = Bench(drive)
    plain = FakeTap(has_header=False)
    with pytest.raises(ConfigError, match="relies on offloads"):
        bench.net.plug(plain)
    assert plain.fd == -1
    assert bench.send(PLAIN, frame(60)) == [PLAIN + frame(60)]


def test_plugged_in_while_it_runs(drive: Drive) -> None:
    """Another network, and none: what was there is closed, and frames go where it is now."""
    bench = Bench(drive)
    tap = FakeTap()
    bench.net.plug(tap)
    assert bench.tap.fd == -1 and config_interrupt(bench.driver)
    bench.tap = tap
    assert bench.send(PLAIN, frame(60)) == [PLAIN + frame(60)]
    bench.net.plug(None)
    bench.tx.add([PLAIN, frame(60)])
    bench.tx.kick()
    assert tap.fd == -1 and bench.net.dropped["tx"] == 1 and link_of(bench.driver) == 0


def test_a_recipe(drive: Drive) -> None:
    """A file makes the device again with what it offered, unplugged where nobody can make its backend again."""
    bench = Bench(drive)
    bench.tap._recipe = None
    kind, options = bench.net.recipe()
    (net,) = make_devices([[kind, options]], "file", Ends())
    assert isinstance(net, Net)
    assert (net.mac, net.mtu, net.features, net.alive) == (bench.net.mac, 1500, bench.net.features, False)
    net.close()
    tap = FakeTap()
    (net,) = make_devices([[kind, options]], "file", Ends(net=[tap]))
    assert isinstance(net, Net) and net.backend is tap and net.alive and net.features == bench.net.features
    net.close()
    ends = Ends(net=[FakeTap(), extra := FakeTap()])
    with pytest.raises(UsageError, match="fewer networks"):
        make_devices([[kind, options]], "file", ends)
    ends.close()
    assert extra.fd == -1


def test_recipes_that_are_refused() -> None:
    """Unknown kinds, and options that are none, are one line; passt's own options do not go into a file."""
    options = {"mac": bytes(6), "mtu": 0, "link": True, "features": 0}
    for backend in (["socks", {}], ["tap", {"ifname": "x" * 99, "mtu": 0}], ["user", {"options": ["--pcap"]}], [1], 7):
        with pytest.raises(SnapshotError) as caught:
            make_devices([["net", {**options, "backend": backend}]], "file", Ends())
        assert "\n" not in str(caught.value)
    passt = Passt.__new__(Passt)
    passt._options = ["-4"]
    with pytest.raises(SnapshotError, match="passt's options"):
        passt.recipe()


def test_states_that_somebody_made_up(drive: Drive) -> None:
    """Any field of any wrong kind or size is refused in one line, or makes the device ask for a reset."""
    bench = Bench(drive)
    shape, state = bench.driver.transport.shape, bench.driver.transport.save()
    chance = random.Random(4)
    for _ in range(300):
        name = chance.choice(list(state))
        bad: State = {**state, name: absurd(chance, state[name])}
        try:
            shape.check("net", shape.version, bad)
            bench.driver.transport.restore(bad)
        except SnapshotError as error:
            assert "\n" not in str(error)
        bench.driver.io.run()
    bench.driver.transport.restore(state)
    assert bench.send(PLAIN, frame(60)) == [PLAIN + frame(60)]
