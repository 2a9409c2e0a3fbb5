"""The PC: the explicit list of what is built in and at which address. Layer: board.

`Pc` is a Machine with the legacy devices of a PC, ACPI and MP tables, and a boot image. Every device is one attach_*
step below; the addresses are in x86.layout.
"""

from __future__ import annotations

import os

from pykvm.boot.image import E820_RAM, E820_RESERVED, Boot, BootOptions, ImageFile, Module
from pykvm.config import BootConfig, MachineConfig
from pykvm.core.console import Console
from pykvm.core.device import ClosedOnFailure
from pykvm.core.fastuart import FastUart
from pykvm.core.machine import Machine
from pykvm.devices.acpi_pm import AcpiPm
from pykvm.devices.debugcon import DebugCon
from pykvm.devices.debugexit import DebugExit
from pykvm.devices.fw_cfg import FwCfg
from pykvm.devices.i8042 import I8042
from pykvm.devices.pci_host import PciHost
from pykvm.devices.ports import PostCode, SystemControlA, SystemControlB
from pykvm.devices.pvpanic import PvPanic
from pykvm.devices.rtc import Rtc
from pykvm.devices.serial import LSR, LSR_IDLE, THR, Serial
from pykvm.errors import ConfigError, MachineStateError
from pykvm.x86 import layout
from pykvm.x86.acpi import build_acpi, build_image
from pykvm.x86.mptable import build_mptable
from pykvm.x86.platform import Platform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeVar

    from pykvm.core.device import Device
    from pykvm.core.memimage import SlotImage
    from pykvm.core.spare import Spare
    from pykvm.kvm.system import Kvm
    from pykvm.virtio.balloon import Balloon
    from pykvm.virtio.device import VirtioDevice
    from pykvm.virtio.mmio import VirtioMmio

    D = TypeVar("D", bound=VirtioDevice)


KVM_PAGES = (layout.IDENTITY_MAP, 4 * layout.PAGE_SIZE, E820_RESERVED)  # the identity map and KVM's TSS


OPTION_ROMS = ("/usr/share/qemu/linuxboot_dma.bin", "/usr/share/seabios/linuxboot_dma.bin")


class _SerialSink:
    """The output of one serial port: to the machine's console, and to whoever is connected."""

    __slots__ = ("_console", "sink")

    def __init__(self, console: Console) -> None:
        self._console = console
        self.sink: Callable[[bytes], object] | None = None

    def write(self, data: bytes) -> None:
        self._console.write(data)
        if self.sink is not None:
            self.sink(data)


class Pc(Machine):
    """A PC, with its boot image loaded.

    >>> with Pc("hello.bin", memory="16M") as pc:
    ...     pc.run(timeout=5), pc.console.text
    (<Outcome HALTED>, 'Hello from real mode\\r\\n')

    boot          what to boot, or just the path of a kernel; None leaves memory empty and vCPU 0 at the reset vector
    serial_ports  how many of COM1 to COM4 exist; their output goes to `console`, see connect_serial
    debug_exit    isa-debug-exit at port 0xf4
    testdev       the PC test device that kernel test suites drive
    devices       virtio devices, each on a virtio-mmio transport of its own (see `virtio`)
    virtio_cmdline   announce them on the kernel's command line instead of by ACPI
    config, options, image, spare   as for Machine; with an image nothing is loaded

    Raises what Machine raises, and ImageError for a file that cannot be booted; the devices are closed then.
    """

    def __init__(
        self,
        boot: BootConfig | str | None = None,
        config: MachineConfig | None = None,
        *,
        serial_ports: int = 1,
        debug_exit: bool = True,
        testdev: bool = False,
        devices: Sequence[VirtioDevice] = (),
        virtio_cmdline: bool = False,
        kvm: Kvm | None = None,
        image: Sequence[SlotImage] = (),
        spare: Spare | None = None,
        **options: object,
    ) -> None:
        self._memory_devices = [device for device in devices if device.memory_size]
        with ClosedOnFailure(devices):
            if any(device.shared_memory for device in devices):
                config = config or MachineConfig(**options)  # type: ignore[arg-type]
                config.memfd = config.shared = True  # their back ends map guest memory
            super().__init__(config, kvm=kvm, image=image, spare=spare, **options)
        self._options = {
            "serial_ports": serial_ports,
            "debug_exit": bool(debug_exit),
            "testdev": bool(testdev),
            "virtio_cmdline": bool(virtio_cmdline),
        }
        self.boot_config = BootConfig(boot) if isinstance(boot, str) else boot
        self.boot: Boot | None = None
        self.firmware_log = Console()  # what SeaBIOS and OVMF say on port 0x402
        self.platform = Platform(
            range(self.config.cpus),
            ioapic=self.config.irqchip != "none",
            pic=self.config.irqchip == "kernel",
            serial=range(serial_ports),
            # the bridge exists, but a kernel that is told of it asks for every function behind it: 160 exits
            pci=self.boot_config is not None and self.boot_config.bios is not None,
            fw_cfg=True,
            pvpanic=True,
            virtio=0 if virtio_cmdline else len(devices),
        )
        self._virtio_cmdline = virtio_cmdline
        self.virtio: list[VirtioMmio] = []
        self.serial: list[Serial] = []
        self._serial_sinks: list[_SerialSink] = []
        try:
            self._attach_interrupts()
            self._attach_serial(serial_ports)
            self._attach_legacy()
            if debug_exit:
                self._attach_port(DebugExit(), layout.PORT_DEBUG_EXIT, 4)
            self._attach_firmware_interface()
            if testdev:
                self._attach_testdev()
            for device in devices:
                self._attach_virtio(device)
            if self.boot_config is not None and self.boot_config.bios is not None and not image:
                self._offer_to_firmware(self.boot_config)
            self.on_reset.append(self._load)
            if not image:
                self._load()
        except BaseException:
            self.close()
            for device in devices[len(self.virtio) :]:
                device.close()
            raise

    def similar(self, image: Sequence[SlotImage], spare: Spare | None = None) -> Pc:
        """A new PC with the same devices over this memory, its vCPUs in no certain state (see `fork`)."""
        devices: list[VirtioDevice] = []
        with ClosedOnFailure(devices):
            for transport in self.virtio:
                devices.append(transport.device.twin())
        options: dict[str, Any] = self._options
        twin = Pc(self.boot_config, self.config, image=image, spare=spare, devices=devices, **options)
        twin.boot = self.boot
        return twin

    def describe_board(self) -> tuple[str, dict[str, object]]:
        """A Pc, its options, and what it boots after a reset."""
        boot = self.boot_config
        names = BootConfig.__slots__
        plain = None if boot is None else {name: getattr(boot, name) for name in names}
        devices = [[*each.device.recipe()] for each in self.virtio]
        return "pc", {**self._options, "boot": plain, "devices": devices}

    # -- devices ------------------------------------------------------------------------------------------------

    def _attach_port(self, device: Device, base: int, length: int = 1, name: str | None = None) -> None:
        self.attach(device, ports=range(base, base + length), name=name)

    def _attach_interrupts(self) -> None:
        if self.config.irqchip != "split":
            return
        from pykvm.devices.ioapic import IoApic

        ioapic = IoApic(self._send_msi, self._route_pins)
        self.attach(ioapic, mmio=range(layout.IOAPIC, layout.IOAPIC + layout.IOAPIC_SIZE))
        self.irqs.use_ioapic(ioapic.set_irq)
        self.hooks.ioapic_eoi = ioapic.eoi

    def _send_msi(self, address: int, data: int) -> None:
        self.vm.signal_msi(address, data)  # one that no local APIC takes is lost, as on a real bus

    def _route_pins(self, routes: Sequence[tuple[int, int] | None]) -> None:
        """Tell KVM which message each IOAPIC pin sends: its local APICs report the EOIs of those vectors."""
        table = [(pin, msi[0] & 0xFFFFFFFF, msi[0] >> 32, msi[1]) for pin, msi in enumerate(routes) if msi is not None]
        self.vm.set_gsi_routing(table)

    def _attach_serial(self, count: int) -> None:
        for index in range(count):
            sink = _SerialSink(self.console)
            port = layout.SERIAL_PORTS[index]
            fast = FastUart(self, port + THR, port + LSR, LSR_IDLE) if self.config.c_actions else None
            irq = self.irq_line(layout.SERIAL_IRQS[index])
            # kernels that know only emulators (xv6) never set OUT2, and QEMU has no such gate either
            serial = Serial(irq, sink.write, fast=fast, name=f"COM{index + 1}", out2_gates_irq=False)
            if fast is not None:
                fast.on_bytes(serial.flush)
            self.console.flushers.append(serial.flush)
            self.serial.append(serial)
            if index == 0:
                self.console.keyboard = serial
            self._serial_sinks.append(sink)
            self._attach_port(serial, port, 8)

    def connect_serial(self, index: int, sink: Callable[[bytes], object]) -> None:
        """Send the output of COM`index + 1` to `sink` as well as to `console`."""
        self._serial_sinks[index].sink = sink

    def _attach_legacy(self) -> None:
        keyboard = I8042(self.irq_line(layout.IRQ_KEYBOARD))
        self._attach_port(keyboard.data, layout.PORT_I8042_DATA, name="i8042 data")
        self._attach_port(keyboard.command, layout.PORT_I8042_STATUS, name="i8042 command")
        self.rtc = Rtc(
            self.irq_line(layout.IRQ_RTC),
            ram_below_4g=min(self.config.memory, layout.PCI_HOLE),
            ram_above_4g=max(self.config.memory - layout.PCI_HOLE, 0),
            cpus=self.config.cpus,
            timer=self.io.call_later,
        )
        self._attach_port(self.rtc, layout.PORT_RTC, 2)
        self._attach_port(SystemControlB(), layout.PORT_SYSTEM_CONTROL_B)  # KVM's PIT answers it first, if there is one
        self._attach_port(SystemControlA(), layout.PORT_FAST_A20)
        self.post_codes = PostCode()
        self._attach_port(self.post_codes, layout.PORT_POST)
        self._attach_port(DebugCon(self.console.write), layout.PORT_DEBUGCON)
        self._attach_port(DebugCon(self.firmware_log.write, name="firmware debug"), layout.PORT_SEABIOS_DEBUG)
        self._attach_port(PvPanic(), layout.PORT_PVPANIC)

    def _attach_firmware_interface(self) -> None:
        self.pci = PciHost()
        self._attach_port(self.pci, layout.PORT_PCI_CONFIG, PciHost.length)
        self.acpi_pm = AcpiPm(self.irq_line(layout.IRQ_ACPI), call_later=self.io.call_later)
        self._attach_port(self.acpi_pm, layout.PORT_ACPI_PM, AcpiPm.length)
        self.fw_cfg = FwCfg(self.memory)
        self._attach_port(self.fw_cfg, layout.PORT_FW_CFG, FwCfg.length)
        self.fw_cfg.add_machine(
            ram_size=self.config.memory,
            cpus=self.config.cpus,
            # a firmware lays out the first MiB itself
            e820=[(slot.gpa, slot.size, E820_RAM) for slot in self.memory.slots if slot.file_fd < 0] + [KVM_PAGES],
        )

    def _attach_testdev(self) -> None:
        from pykvm.devices.testdev import PcTestDevice

        device = PcTestDevice(self.irqs.drive, self._flush_page)
        self._attach_port(device.latch, layout.PORT_TESTDEV_LATCH32, 4)
        self._attach_port(device.latch_byte, layout.PORT_TESTDEV_LATCH8)
        self._attach_port(device.flush, layout.PORT_TESTDEV_FLUSH, 4)
        self._attach_port(device.irq_lines, layout.PORT_TESTDEV_IRQ, layout.IOAPIC_PINS)
        window = range(layout.TESTDEV_MMIO, layout.TESTDEV_MMIO + layout.TESTDEV_MMIO_SIZE)
        self.attach(device.iomem, mmio=window)

    def _add_ram(self) -> None:
        """RAM, and memory that devices bring along: above all RAM."""
        super()._add_ram()
        for device in self._memory_devices:
            end = max(layout.HIGH_RAM, *(slot.end for slot in self.memory.slots))
            gpa = (end + layout.DEVICE_MEMORY_ALIGN - 1) // layout.DEVICE_MEMORY_ALIGN * layout.DEVICE_MEMORY_ALIGN
            device.place(self.memory, gpa)

    def _attach_virtio(self, device: VirtioDevice) -> None:
        from pykvm.core.wires import Wires
        from pykvm.virtio.mmio import VirtioMmio

        index = len(self.virtio)
        if self.config.irqchip == "none":
            raise ConfigError("irqchip", f"{device.name} interrupts through an irqfd: it needs kernel or split")
        if index >= len(layout.VIRTIO_GSIS):
            raise ConfigError("devices", f"{device.name} is one more than the {index} virtio devices that fit")
        base = layout.VIRTIO_MMIO_BASE + index * layout.VIRTIO_MMIO_SIZE
        gsi = layout.VIRTIO_GSIS[index]
        if base not in self.wires:  # else a spare has them
            self.wires[base] = Wires(len(device.queue_sizes))
        transport = VirtioMmio(device, self.memory, self.io, base=base, gsi=gsi, wires=self.wires[base])
        self.virtio.append(transport)
        self.attach(transport, mmio=range(base, base + layout.VIRTIO_MMIO_SIZE))
        if self.config.c_actions:
            transport.answer_in_c(self.actions)
        device.join(self.console)
        self.on_connect.append(transport.connect)
        transport.connect(self.vm)

    def find(self, kind: type[D]) -> list[D]:
        """The machine's virtio devices of class `kind`: `vm.find(Net)[0]` is its first network."""
        return [each.device for each in self.virtio if isinstance(each.device, kind)]

    @property
    def balloon(self) -> Balloon:
        """The machine's balloon. Raises MachineStateError when it has none."""
        from pykvm.virtio.balloon import Balloon

        for balloon in self.find(Balloon):
            return balloon
        raise MachineStateError("the machine has no balloon: give it one by devices=[Balloon()] or --balloon")

    def _flush_page(self, gpa: int) -> None:
        """Make the guest fault the page in again, by dropping KVM's mapping of its slot."""
        slot = self.memory.slot_at(gpa)
        if slot is not None:
            self.vm.set_user_memory_region(slot.index, slot.gpa, 0, slot.hva)
            self.vm.set_user_memory_region(slot.index, slot.gpa, slot.size, slot.hva)

    def press_power_button(self) -> None:
        """What a person does to ask the operating system to shut down (ACPI 4.8.3.1.1)."""
        self.acpi_pm.press_power_button()

    # -- booting ------------------------------------------------------------------------------------------------

    def e820(self) -> list[tuple[int, int, int]]:
        """The memory map that boot protocols report: (base, size, type), sorted (ACPI 15)."""
        low = min(self.config.memory, layout.PCI_HOLE)
        areas = [
            (0, layout.EBDA, E820_RAM),
            (layout.EBDA, layout.LOW_RAM_END, E820_RESERVED),
            (layout.BIOS_AREA, layout.BIOS_AREA_END, E820_RESERVED),
            (layout.BIOS_AREA_END, low, E820_RAM),
        ]
        entries = [(start, min(end, low) - start, kind) for start, end, kind in areas if start < low]
        entries.append(KVM_PAGES)
        if self.config.memory > low:
            entries.append((layout.HIGH_RAM, self.config.memory - low, E820_RAM))
        return entries

    def _load(self) -> None:
        if self.boot_config is None:
            return
        boot = self.boot_config
        known = len(self.memory.slots)
        if boot.bios is not None:
            from pykvm.boot.firmware import load_firmware

            self.boot = load_firmware(self.memory, ImageFile(boot.bios), BootOptions())
        else:
            from pykvm.boot.load import load

            assert boot.kernel is not None
            self.boot = load(self.memory, ImageFile(boot.kernel), self._boot_options(boot, self._write_tables()))
        self.map_new_slots(known)
        self.vcpus[0].load_state(self.boot.state)

    def _boot_options(self, boot: BootConfig, rsdp: int) -> BootOptions:
        return BootOptions(
            mode=boot.mode,
            entry=boot.entry,
            load_addr=boot.load_addr,
            cmdline=self._cmdline(boot),
            initrd=ImageFile(boot.initrd) if boot.initrd is not None else None,
            modules=[Module(ImageFile(path), arguments) for path, arguments in boot.modules],
            e820=self.e820(),
            rsdp=rsdp,
            unpack=boot.unpack,
        )

    def _cmdline(self, boot: BootConfig) -> str:
        """The kernel's command line, with the virtio devices where ACPI does not name them (virtio 1.2, 4.2.1)."""
        words = [boot.cmdline] if boot.cmdline else []
        if self._virtio_cmdline:
            words += [f"virtio_mmio.device=4K@{each.base:#x}:{each.gsi}" for each in self.virtio]
        return " ".join(words)

    def _write_tables(self) -> int:
        """ACPI and MP tables where firmware would leave them; the RSDP's GPA, 0 if there is no room for any."""
        if self.config.memory < layout.BIOS_AREA_END:
            return 0
        acpi = build_acpi(self.platform)
        pieces = acpi.pieces + (build_mptable(self.platform) if self.platform.ioapic else ())
        for gpa, data in pieces:
            self.memory.write(gpa, data)
        return acpi.rsdp_gpa

    def _offer_to_firmware(self, boot: BootConfig) -> None:
        """Put into fw_cfg what a firmware looks for: the ACPI tables to install, and a kernel to boot."""
        from pykvm.x86.acpi_loader import loader_files

        for name, data in loader_files(build_image(self.platform)).items():
            self.fw_cfg.add_file(name, data)
        if boot.kernel is not None:
            from pykvm.boot.fwlinux import split_for_firmware

            initrd = ImageFile(boot.initrd) if boot.initrd is not None else None
            cmdline = self._cmdline(boot)
            parts = split_for_firmware(ImageFile(boot.kernel), cmdline=cmdline, initrd=initrd, e820=self.e820())
            self.fw_cfg.add_linux(**parts)
            for path in OPTION_ROMS:
                if os.path.exists(path):  # SeaBIOS boots the kernel by this ROM; qboot does it itself
                    self.fw_cfg.add_file("genroms/linuxboot_dma.bin", ImageFile(path).data)
                    break
