"""TCP over a tap: iperf3 in Debian's kernel, inside the lab, under pykvm and under QEMU."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path

from _lab_kernel import Cpio, Modules, read_module

from benchmarks import peers, tapnet
from benchmarks.linux import find_kernel
from benchmarks.measure import BenchError, Candidate, able, alternate, spawn
from benchmarks.report import Aim, Comparison

TYPE_CHECKING = False
if TYPE_CHECKING:
    from benchmarks.peers import Setup

ROUNDS = 3
SECONDS = 4  # of each direction
MEMORY_MIB = 256
TIMEOUT_S = 200
OURS, QEMU = "pykvm", "QEMU microvm"
VHOST, OVER_VHOST = "/dev/vhost-net", ", vhost"  # the device, and who uses it
APPEND = "console=ttyS0 quiet pykvm.run=job"
DIRECTIONS = {"to the host": "", "to the guest": "-R"}
JOB = "\n".join(
    [
        "#!/bin/sh",
        f"ip addr add {tapnet.GUEST_ADDRESS}/24 dev eth0",
        "ip link set eth0 up",
        *(
            f'echo "iperf {name}: $(iperf3 -c {tapnet.HOST_ADDRESS} -t {SECONDS} -i 0 -f m {option} | grep receiver)"'
            for name, option in DIRECTIONS.items()
        ),
        "",
    ]
)
NOTES = (
    f"iperf3 in the guest, one TCP stream for {SECONDS} s each way, its server at the other end of the tap; figures "
    "are of the receiver. Each boots the same Debian kernel and initramfs anew, one vCPU.",
    "Both offer checksum and segmentation offload and mergeable buffers. QEMU: virtio-net-device without vhost, "
    f"served by its main loop; with vhost, where there is {VHOST} (scripts/lab --module vhost_net), the host's kernel "
    "serves both alike.",
)


def libraries(program: str) -> list[str]:
    """The program's shared libraries and its loader."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
    return re.findall(r"(/\S+) \(0x", done.stdout)


def make_initrd(target: Path) -> str:
    """The initramfs of images/ with iperf3, the drivers, and the job."""
    program, kept = shutil.which("iperf3"), os.environ.get("PYKVM_GUEST_MODULES")
    if program is None or kept is None:
        raise BenchError("iperf: needs iperf3 (scripts/setup --lab) and the lab: scripts/lab scripts/bench iperf")
    modules = Modules(Path(kept)).order("virtio_mmio", "virtio_net")
    files = {f"modules/{n:02}-{path.name.removesuffix('.xz')}": read_module(path) for n, path in enumerate(modules)}
    files |= {"bin/job": JOB.encode(), "bin/iperf3": Path(program).read_bytes()}
    files |= {path[1:]: Path(path).read_bytes() for path in libraries(program)}
    more = Cpio()
    for folder in sorted({parent.as_posix() for name in files for parent in Path(name).parents[:-1]}):
        more.add(folder, stat.S_IFDIR | 0o755)
    for name, data in files.items():
        more.add(name, stat.S_IFREG | 0o755, data)
    base = Path(peers.guest("initramfs.cpio.gz")).read_bytes()
    target.write_bytes(base + bytes(-len(base) % 4) + more.finish())
    return str(target)


def candidates(setup: Setup, kernel: str) -> list[Candidate]:
    """Who takes part, in the order of a round."""
    initrd = make_initrd(setup.folder / "iperf.cpio.gz")
    prints = "pykvm-initramfs: status 0"
    found = []
    for name, mine, theirs in (("", "", "off"), (OVER_VHOST, ",vhost", "on"))[: 1 + os.path.exists(VHOST)]:
        net = f"tap,ifname={tapnet.TAP},mac={tapnet.GUEST_MAC}{mine}"
        ours = [*setup.pykvm, "start", "--mem", f"{MEMORY_MIB}M", "--net", net]
        ours += ["--initrd", initrd, "--append", APPEND, kernel]
        qemu = peers.qemu(
            *("-global", "virtio-mmio.force-legacy=false"),
            *("-netdev", f"tap,id=n,ifname={tapnet.TAP},script=no,downscript=no,vhost={theirs}"),
            *("-device", f"virtio-net-device,netdev=n,mac={tapnet.GUEST_MAC}"),
            *("-kernel", kernel, "-initrd", initrd, "-append", APPEND),
            memory_mib=MEMORY_MIB,
        )
        found.append(Candidate(OURS + name, ours, 0, prints, setup.environment))
        found.append(Candidate(QEMU + name, qemu, 0, prints))
    return found


def measure(candidate: Candidate) -> dict[str, float]:
    """Mbit/s each way."""
    run = spawn(candidate, timeout_s=TIMEOUT_S)
    found = {}
    for name in DIRECTIONS:
        line = re.search(rf"iperf {name}: .* ([\d.]+) Mbits/sec", run.output)
        if line is None:
            raise BenchError(f"{candidate.name}: no figure {name!r}; it said ...{run.output[-600:]!r}")
        found[name] = float(line[1])
    return found


def run(setup: Setup) -> Comparison:
    """Measure it."""
    rounds = setup.rounds or ROUNDS
    with tapnet.tap_network():
        server = subprocess.Popen(
            ["iperf3", "-s", "-B", tapnet.HOST_ADDRESS], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            time.sleep(1)
            # no trial, which would take as long as a round
            good, skipped = able(candidates(setup, find_kernel()), lambda candidate: None)
            series = alternate(good, rounds, measure, setup.say)
        finally:
            server.kill()
            server.wait()
    aims = []
    for kind in ("", OVER_VHOST):
        ours, theirs = OURS + kind, QEMU + kind
        if ours in series and theirs in series:
            for name in DIRECTIONS:
                aims.append(Aim(f"{name}: {ours} / {theirs}, aim 1.00", series[ours][name].over(series[theirs][name])))
    return Comparison(
        name="iperf",
        title="TCP over a tap between Debian's kernel and the host",
        rounds=rounds,
        candidates=good,
        units=dict.fromkeys(DIRECTIONS, "Mbit/s"),
        series=series,
        references=(QEMU,),
        aims=aims,
        skipped=skipped,
        notes=NOTES,
    )
