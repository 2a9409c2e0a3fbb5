"""Linux in snapshots, in the lab: booted once and forked for each test, saved and restored under load."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from time import monotonic, sleep

import pexpect
import pytest
from qcow2 import qcow2

from pykvm import BootConfig, Machine, Outcome, Pc
from pykvm.virtio.balloon import Balloon
from pykvm.virtio.blk import Disk
from pykvm.virtio.imagedisk import ImageDisk
from pykvm.virtio.net import Net
from pykvm.virtio.share import Share
from pykvm.virtio.tap import Tap
from pykvm.virtio.vsock import Vsock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MARKER, PROMPT = "pykvm-initramfs: up", "# "
SECONDS = 120.0  # for one expectation; the lab's CPU is emulated and may share its machine
FORKS = 20
IMAGE = b"blank\n".ljust(16 << 20, b"\0")
TAP = "pykvm-snap"
DISK = "/dev/vda"
TROUBLE = "soft lockup|rcu.*stall|BUG:|Call Trace|I/O error"

HOST, GUEST, WEB = "10.77.0.1", "10.77.0.2", 8000
MAC = "52:54:00:12:34:56"
PING = f"until ping -c 1 -W 3 {HOST} >/dev/null; do :; done"
NETWORK = f"ip addr add {GUEST}/24 dev eth0; ip link set eth0 up"

# What a test does in its fork: look at what the disk and a file in memory have, write both, and look again. It is all
# built into the shell, and known to it before: a new process takes long on an emulated CPU, and so does each byte that
# comes or goes by the serial console.
# Linux writes a block device back, and forgets what it knows of it, when nobody has it open any more.
READ = f"read -r disk <{DISK}; read -r memory </tmp/mine"
TEST = f"""{READ}; before="$disk $memory"; echo $1 >/tmp/mine; echo $1 >{DISK}; {READ};
read -r uptime idle </proc/uptime; echo "said=$before $disk $memory $uptime" """.replace("\n", " ")

# fio writes blocks and verifies them all the time; beside it a file comes over the network again and again.
JOB = """[verify]
filename=/dev/vda
size=4m
rw=randwrite
bs=16k
iodepth=8
direct=1
ioengine=libaio
thread=1
verify=crc32c
verify_backlog=64
verify_fatal=1
time_based
runtime=10000
"""
LOAD = f"""#!/bin/sh
want="$1  -"
{NETWORK}
(LD_LIBRARY_PATH=/lib HOME=/tmp fio /job.fio >/tmp/fio.out 2>&1; echo "fio ended with $?") &
until set -- $(cat /sys/block/vda/stat); [ $5 -gt 100 ]; do sleep 0.2; done # writes: the first are verified by then
i=0
while :; do
    i=$((i+1))
    [ "$(wget -q -O - http://{HOST}:{WEB}/data | md5sum)" = "$want" ] || echo "DAMAGED"
    echo "round=$i uptime=$(cut -d' ' -f1 /proc/uptime);"
    ! read -r -t 1 word || break
done
killall -INT fio
wait
grep -E "err=|verify:" /tmp/fio.out
poweroff -f
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """16 MiB: a line, and zeroes."""
    path = tmp_path / "disk.img"
    path.write_bytes(IMAGE)
    return path


def boot_to_shell(machine: Machine) -> None:
    """Boot to a shell that does not echo what it is told."""
    machine.console.expect(MARKER, SECONDS)
    machine.console.expect(PROMPT, SECONDS)
    machine.console.sendline('stty -echo; echo quiet=$((1+1)); while read -r line; do eval "$line"; done')
    machine.console.expect("quiet=2", SECONDS)


def shell(machine: Machine, command: str) -> str:
    """Run a command in the guest's shell; what it printed."""
    machine.console.sendline(f"{command}; echo end=$?")
    machine.console.expect(r"end=\d+", SECONDS)
    return machine.console.before.replace("\r", "").replace("\0", "")


def kernel_trouble(machine: Machine) -> str:
    """What the guest's kernel complained of; not empty even on the emulated CPU alone."""
    return shell(machine, f"dmesg | grep -E '{TROUBLE}'").strip()


@pytest.mark.timeout(280)
def test_one_fork_for_each_test(
    guest_kernel: Path, initrd_with: Callable[..., Path], image: Path, record_property: Callable[[str, object], None]
) -> None:
    """Debian boots once; each of many forks writes to its memory and disk, and sees nothing of any other."""
    initrd = initrd_with("virtio_mmio", "virtio_blk", "virtio_net")
    boot = BootConfig(str(guest_kernel), initrd=str(initrd), cmdline="console=ttyS0 quiet")
    begin = monotonic()
    devices = [Disk(image, overlay=True), Net(Tap(TAP), mac=MAC)]
    subprocess.run(["ip", "addr", "add", f"{HOST}/24", "dev", TAP], check=True)
    with Pc(boot, memory="256M", cpus=2, memfd=True, devices=devices) as vm:
        boot_to_shell(vm)
        shell(vm, f"{NETWORK}; {PING}")
        assert "2" in shell(vm, "nproc")
        before = float(shell(vm, "cut -d' ' -f1 /proc/uptime"))
        shell(vm, f"echo empty >/tmp/mine; check() {{ {TEST}; }}")
        trouble = kernel_trouble(vm)
        booted = monotonic() - begin
        snapshot = vm.snapshot()
        for number in range(FORKS):
            with vm.fork(snapshot) as child:
                text = f"test-{number}-test"
                found = shell(child, f"check {text}")
                said = re.search(r"said=blank empty (\S+) (\S+) (\S+)$", found, re.MULTILINE)
                assert said is not None and (said[1], said[2]) == (text, text), found
                assert before <= float(said[3]) < before + SECONDS
        record_property("boot_s", booted)
        record_property("all_s", monotonic() - begin)
        print(f"dmesg: {trouble!r}")
        print(f"boot {booted:.1f} s; with {FORKS} forks {monotonic() - begin:.1f} s")
        with vm.fork(snapshot) as child:
            assert kernel_trouble(child) == trouble
            shell(child, wait_for_link(0))
            plug_in(child)
        vm.restore(snapshot)
        assert "test-" not in shell(vm, f"{READ}; echo $disk $memory")
        shell(vm, PING)
        vm.console.sendline("poweroff -f")
        assert vm.run(SECONDS) == Outcome.POWER_OFF
    assert image.read_bytes() == IMAGE


def wait_for_link(state: int) -> str:
    """A command that waits until the guest sees its network's link up (1) or down (0)."""
    return f"until [ $(cat /sys/class/net/eth0/carrier) = {state} ]; do sleep 0.1; done"


def plug_in(child: Pc) -> None:
    """Give a fork a network of its own: the guest's link comes up, and it reaches the host by it."""
    tap = Tap()
    subprocess.run(["ip", "addr", "del", f"{HOST}/24", "dev", TAP], check=True)
    subprocess.run(["ip", "addr", "add", f"{HOST}/24", "dev", tap.ifname], check=True)
    child.find(Net)[0].plug(tap)
    shell(child, wait_for_link(1))
    shell(child, PING)
    subprocess.run(["ip", "addr", "del", f"{HOST}/24", "dev", tap.ifname], check=True)
    subprocess.run(["ip", "addr", "add", f"{HOST}/24", "dev", TAP], check=True)


def fio_files() -> dict[str, bytes]:
    """fio and what it is linked with, for an initramfs."""
    fio = shutil.which("fio")
    if fio is None:
        pytest.fail("fio is not installed: scripts/setup --lab", pytrace=False)
    files = {"bin/fio": Path(fio).read_bytes(), "job.fio": JOB.encode()}
    linked = subprocess.run(["ldd", fio], capture_output=True, text=True, check=True).stdout
    for path in map(Path, re.findall(r"(/\S+) \(0x", linked)):
        files[f"lib64/{path.name}" if path.name.startswith("ld-linux") else f"lib/{path.name}"] = path.read_bytes()
    return files


@pytest.fixture
def data(tmp_path: Path) -> Iterator[str]:
    """The MD5 of a file that a web server serves to the guest, at an interface that outlives each pykvm."""
    content = os.urandom(512 << 10)
    (tmp_path / "data").write_bytes(content)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    for words in (f"tuntap add mode tap name {TAP}", f"addr add {HOST}/24 dev {TAP}", f"link set {TAP} up"):
        subprocess.run(["ip", *words.split()], check=True)
    with http.server.ThreadingHTTPServer(("", WEB), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield hashlib.md5(content).hexdigest()
        server.shutdown()
        thread.join()
    subprocess.run(["ip", "link", "del", TAP], check=True)


@pytest.mark.timeout(280)
def test_saved_and_restored_under_load(
    guest_kernel: Path, initrd_with: Callable[..., Path], image: Path, tmp_path: Path, data: str
) -> None:
    """Under fio with verification and transfers over the network a guest goes through a file, and from process to
    process, twice: not one error, no transfer that is damaged, no clock that jumps back."""
    initrd = initrd_with("virtio_mmio", "virtio_blk", "virtio_net", files={"load": LOAD.encode(), **fio_files()})
    saved = tmp_path / "vm.snap"
    words = ["start", "--mem", "512M", "--cpus", "2", "--disk", image, "--net", f"tap,ifname={TAP},mac={MAC}"]
    words += ["--initrd", initrd, "--append", "console=ttyS0 quiet", guest_kernel]
    uptimes = []
    for lap in range(3):
        console = spawn([words[0], "--save", saved, *words[1:]])
        try:
            if lap == 0:
                console.expect_exact(MARKER)
                console.expect_exact(PROMPT)
                console.sendline(f"stty -echo; sh /load {data}")
            for _ in range(3):
                console.expect(r"round=(\d+) uptime=([0-9.]+);|DAMAGED|fio ended.*\n")
                assert console.match.group(2), console.match.group(0)
                uptimes.append(float(console.match.group(2)))
            if lap < 2:
                sleep(0.3 + lap / 7)  # somewhere inside of a round
                console.send("\x01q")
                console.expect_exact("saved 512 MiB")
            else:
                console.sendline("enough")
                console.expect(r"verify: \(.*err= *(\d+)")
                assert console.match.group(1) == "0"
            console.expect(pexpect.EOF)
        finally:
            console.close(force=True)
        words = ["restore", saved]
    assert uptimes == sorted(uptimes) and uptimes[-1] < uptimes[0] + 3 * SECONDS


def spawn(words: Sequence[str | Path]) -> pexpect.spawn[str]:
    """Run `pykvm WORD...` on a terminal; what it prints is shown with a failing test."""
    command = ["-m", "pykvm", *map(str, words)]
    console = pexpect.spawn(sys.executable, command, timeout=SECONDS, encoding="utf-8", codec_errors="replace")
    console.logfile_read = sys.stdout
    return console


@pytest.mark.timeout(280)
def test_other_devices(guest_kernel: Path, initrd_with: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    """A fork, and the machine that is put back, go on with a share, a qcow2 disk, vsock and a balloon of Linux's."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "hello").write_text("hello from the host\n")
    devices = [
        Share(str(tmp_path / "data")),
        ImageDisk(str(qcow2(tmp_path / "disk.qcow2", 16 << 20)), "qcow2", readonly=True),
        Vsock(7, str(tmp_path / "vsock")),
        Balloon(),
    ]
    modules = ("virtio_mmio", "virtiofs", "virtio_blk", "virtio_balloon", "vmw_vsock_virtio_transport")
    initrd = initrd_with(*modules, files={"bin/vsockcat": (images / "vsockcat").read_bytes()})
    boot = BootConfig(str(guest_kernel), initrd=str(initrd), cmdline="console=ttyS0 quiet")
    with Pc(boot, memory="256M", devices=devices) as vm, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "vsock_6000"))
        server.listen()
        boot_to_shell(vm)
        assert "hello from" in shell(vm, "mkdir -p /mnt; mount -t virtiofs data /mnt; cat /mnt/hello")
        shell(vm, "(vsockcat echo 5000 >/tmp/log &); (sleep 1000 | vsockcat connect 6000 2>/tmp/err &)")
        server.settimeout(SECONDS)
        vm.start()
        peer, _ = server.accept()
        shell(vm, "until grep -q listening /tmp/log; do sleep 0.1; done")
        snapshot = vm.snapshot()
        with vm.fork(snapshot) as child:
            child.find(Vsock)[0].listen(str(tmp_path / "copy"))
            check_other_devices(child, tmp_path / "copy")
        assert "clean\nhello from" in shell(vm, "test -s /tmp/err || echo clean; cat /mnt/hello")
        vm.restore(snapshot)
        assert peer.recv(10) == b""
        check_other_devices(vm, tmp_path / "vsock")
        peer.close()


def check_other_devices(machine: Pc, path: Path) -> None:
    """Connections are gone and the share has to be mounted again; what listens, the disk and the balloon go on."""
    said = shell(machine, "until [ -s /tmp/err ]; do sleep 0.1; done; cat /tmp/err")
    assert "not connected" in said or "reset by peer" in said, said
    machine.start()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(path))
        client.sendall(b"CONNECT 5000\n")
        assert re.fullmatch(rb"OK \d+\n", client.recv(100))
        client.sendall(b"echo")
        assert client.recv(100) == b"echo"
    said = shell(machine, "echo 3 >/proc/sys/vm/drop_caches; cat /mnt/hello 2>&1")
    assert re.search("rror|Bad file descriptor|No such file", said), said
    assert "hello from" in shell(machine, "umount /mnt; mount -t virtiofs data /mnt; cat /mnt/hello")
    assert "256+0 records in" in shell(machine, "dd if=/dev/vda bs=64k of=/dev/null 2>&1")
    machine.start()
    machine.balloon.set_target(32 << 20)
    end = monotonic() + SECONDS
    while machine.balloon.actual != 32 << 20:
        assert monotonic() < end
        sleep(0.1)
