"""What a machine is made of, checked. Layer: below core. All validation of options happens here and only here."""

from __future__ import annotations

from pykvm.errors import ConfigError
from pykvm.x86.layout import GIB, KIB, MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Literal

    from pykvm.x86.cpuid import CpuidEntry

    IrqchipKind = Literal["kernel", "split", "none"]

IRQCHIPS = ("kernel", "split", "none")
MODES = ("real", "protected", "long")
MAX_CPUS = 64  # what the MP table's place under the EBDA holds; KVM itself goes further
MIN_MEMORY = 64 * KIB
MAX_MEMORY = 1 << 40

_UNITS = {"": MIB, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}


def parse_size(text: str | int, option: str = "size") -> int:
    """Bytes in "512M", "2G", "64K", "4096b"; a bare number in a string is MiB, as in QEMU's -m; an int is bytes.

    Raises ConfigError.
    """
    if isinstance(text, int):
        return text
    number, unit = text.strip().lower(), ""
    for suffix in ("ib", "b"):
        if number.endswith(suffix) and number[: -len(suffix)].endswith(("k", "m", "g", "t")):
            number = number[: -len(suffix)]
    if number and number[-1] in _UNITS:
        number, unit = number[:-1], number[-1]
    try:
        value = int(number) if number.isascii() and number.isdigit() else float(number)
        size = int(value * _UNITS[unit])
    except (ValueError, OverflowError):
        raise ConfigError(option, f"{text!r} is no size: write 512M, 2G or 64K") from None
    if size <= 0:
        raise ConfigError(option, f"{text!r} is not positive")
    return size


def parse_float(text: str) -> float:
    """The number that `text` is, NaN for none: it lies in no range that a caller checks."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def parse_seconds(text: str) -> float:
    """A time-out in seconds. Raises ConfigError."""
    value = parse_float(text)
    if not 0 <= value < 1e9:
        raise ConfigError("timeout", f"{text!r} is no number of seconds")
    return value


def parse_int(text: str, option: str) -> int:
    """A number in decimal, 0x hexadecimal or 0o octal. Raises ConfigError."""
    try:
        return int(text, 0)
    except ValueError:
        raise ConfigError(option, f"{text!r} is no number: write 4096 or 0x1000") from None


class MachineConfig:
    """Options of `Machine`, validated. Immutable by convention.

    memory          RAM in bytes ("512M", ...); rounded up to a page; 0 for none (the user adds slots)
    cpus            vCPUs, 1 to MAX_CPUS
    irqchip         "kernel", "split" or "none" (see core.irq); more than one vCPU needs an irqchip
    pit             the in-kernel PIT (with irqchip "kernel")
    memfd           back RAM with memfds instead of anonymous memory (to share it with other processes)
    hugepages       transparent huge pages for anonymous memory, hugetlbfs pages for memfd
    cpu_features    "+name,-name": CPUID features forced or masked
    c_actions       let C answer hot console accesses (the guest sees no difference)
    stats           count exits by port and address, and time inside and outside the guest
    halt_detection  end with HALTED when all vCPUs halted with interrupts off
    firmware        the guest brings its own firmware: MTRRs are left as after RESET
    cpuid           called as cpuid(entries, vcpu_index) with the list of x86.cpuid.CpuidEntry that the vCPU would get;
                    changes it in place, for entries that no feature name covers
    """

    __slots__ = (
        "c_actions", "cpu_features", "cpuid", "cpus", "firmware", "halt_detection", "hugepages", "irqchip", "memfd",
        "memory", "pit", "shared", "stats",
    )  # fmt: skip

    def __init__(
        self,
        *,
        memory: str | int = "64M",
        cpus: int = 1,
        irqchip: str = "kernel",
        pit: bool = True,
        memfd: bool = False,
        hugepages: bool = False,
        cpu_features: str = "",
        c_actions: bool = True,
        stats: bool = False,
        halt_detection: bool = True,
        firmware: bool = False,
        cpuid: Callable[[list[CpuidEntry], int], object] | None = None,
    ) -> None:
        self.memory = _check_memory(parse_size(memory, "memory"), hugepages and memfd)
        self.cpus = _check_cpus(cpus, irqchip)
        self.irqchip = irqchip
        self.pit = pit and irqchip == "kernel"
        self.memfd = memfd
        self.hugepages = hugepages
        self.shared = False  # set by the board: other processes map guest memory
        self.cpu_features = cpu_features
        self.c_actions = c_actions
        self.stats = stats
        self.halt_detection = halt_detection
        self.firmware = firmware
        self.cpuid = cpuid


def _check_memory(size: int, hugetlb: bool) -> int:
    if size == 0:
        return 0
    if not MIN_MEMORY <= size <= MAX_MEMORY:
        raise ConfigError("memory", f"{size} bytes is not between 64K and 1T")
    page = 2 * MIB if hugetlb else 4 * KIB
    return (size + page - 1) // page * page


def _check_cpus(cpus: int, irqchip: str) -> int:
    if irqchip not in IRQCHIPS:
        raise ConfigError("irqchip", f"{irqchip!r} is none of {', '.join(IRQCHIPS)}")
    if not 1 <= cpus <= MAX_CPUS:
        raise ConfigError("cpus", f"{cpus} is not between 1 and {MAX_CPUS}")
    if cpus > 1 and irqchip == "none":
        raise ConfigError(
            "cpus", "more than one vCPU needs --irqchip kernel or split: SIPI goes through the local APIC"
        )
    return cpus


class BootConfig:
    """What a PC boots. Paths are opened when the machine is made.

    kernel      flat image, ELF, multiboot, bzImage, vmlinux: the loader looks at its first bytes
    bios        firmware image, mapped under 4 GiB; with it `kernel` is only offered to the firmware by fw_cfg
    cmdline     kernel command line
    initrd      initial RAM disk, or the first multiboot module
    modules     (path, command line) of multiboot modules
    mode        "real", "protected" or "long": takes the kernel as a flat image
    entry, load_addr   of a flat image
    unpack      unpack a bzImage on the host and boot its payload
    """

    __slots__ = ("bios", "cmdline", "entry", "initrd", "kernel", "load_addr", "mode", "modules", "unpack")

    def __init__(
        self,
        kernel: str | None = None,
        *,
        bios: str | None = None,
        cmdline: str = "",
        initrd: str | None = None,
        modules: Sequence[tuple[str, str]] = (),
        mode: str | None = None,
        entry: int | None = None,
        load_addr: int | None = None,
        unpack: bool = True,
    ) -> None:
        if kernel is None and bios is None:
            raise ConfigError("kernel", "name a kernel image, or a firmware with --bios")
        if mode is not None and mode not in MODES:
            raise ConfigError("mode", f"{mode!r} is none of {', '.join(MODES)}")
        if load_addr is not None and mode is None:
            raise ConfigError("load-addr", "only a flat image can be placed: give --mode real, protected or long")
        if bios is not None and (mode is not None or modules):
            raise ConfigError("bios", "--mode and --module are for kernels that pykvm boots itself")
        self.kernel = kernel
        self.bios = bios
        self.cmdline = cmdline
        self.initrd = initrd
        self.modules = tuple(modules)
        self.mode = mode
        self.entry = entry
        self.load_addr = load_addr
        self.unpack = unpack
