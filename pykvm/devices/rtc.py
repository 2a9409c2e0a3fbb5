"""MC146818 real-time clock and CMOS memory: ports 0x70 (index) and 0x71 (data). Layer: devices.

Source: Motorola MC146818 data sheet; its figures and tables are cited. The memory bytes above 0x0d are where
SeaBIOS, OVMF and old kernels expect a PC's: QEMU documents its use of them in hw/i386/pc.c and SeaBIOS in
src/hw/rtc.h.

The guest's clock is the host's, in UTC, plus an offset that the guest changes by setting the time.
"""

from __future__ import annotations

import time
from _thread import allocate_lock

from pykvm.core.state import BOOL, LINE, S64, U8, Bytes, Shape
from pykvm.devices.bytewide import ByteDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Protocol

    from pykvm.core.device import IrqLine
    from pykvm.core.state import State

    class Timer(Protocol):
        """A pending call, as threading.Timer is one."""

        def cancel(self) -> object:
            """Drop the call, if it has not started yet."""


# -- clock registers ---------------------------------------------------------------------------------------
SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0, 2, 4, 6, 7, 8, 9
SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM = 1, 3, 5
REG_A, REG_B, REG_C, REG_D = 0x0A, 0x0B, 0x0C, 0x0D
CENTURY = 0x32  # an IBM extension; the FADT says where it is
TIME_REGISTERS = frozenset((SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY))
ALARM_REGISTERS = frozenset((SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM))
ALARM_ANY = 0xC0  # an alarm byte from here on matches every value

A_UPDATE_IN_PROGRESS = 0x80
A_DIVIDER_RESET = 0x60  # both bits: the divider is held in reset
A_DEFAULT = 0x26  # 32.768 kHz, 1024 Hz
B_SET, B_PIE, B_AIE, B_UIE, B_SQWE, B_BINARY, B_24H = 0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02
C_IRQF, C_PF, C_AF, C_UF = 0x80, 0x40, 0x20, 0x10  # each flag has its enable at the same bit of register B
D_VALID_RAM = 0x80

UPDATE_S = 0.002228  # table 5: UIP is up 244 us before an update, which takes 1984 us
HALF_SECOND = 0.5  # the first update comes half a second after the divider is released ("divider control")

# -- what a PC keeps in the memory --------------------------------------------------------------------------
DISK_EQUIPMENT = 0x14
EQUIPMENT_FPU = 0x02
CHECKSUM_RANGE, CHECKSUM = range(0x10, 0x2E), 0x2E  # big-endian sum
BOOT_THIRD, BOOT_FIRST = 0x38, 0x3D  # high nibble; low and high nibble for the first two
BOOT_FLOPPY, BOOT_DISK, BOOT_CDROM, BOOT_NETWORK = 1, 2, 3, 4
EXTENDED_KIB = (0x17, 0x30)  # both say it: what the BIOS set up and what it found
KIB, MIB = 1 << 10, 1 << 20
DAY_S = 86400


class Rtc(ByteDevice):
    """Index port at offset 0, data port at offset 1; `irq` is IRQ 8.

    `ram_below_4g` and `ram_above_4g` are bytes, `boot_order` up to three BOOT_ codes. `clock` gives seconds since
    1970 UTC. `timer(delay_s, callback)` calls back once on any thread; without it the flags of register C are still
    right whenever they are read, but nothing interrupts. `nmi_masked` is bit 7 of the index port.
    """

    name = "rtc"
    shape = Shape(
        1, index=U8, nmi_masked=BOOL, flags=U8, cmos=Bytes(128), offset_ns=S64, seen_ns=S64, irq=LINE
    )  # offset and seen: of the guest's clock

    def __init__(
        self,
        irq: IrqLine,
        *,
        ram_below_4g: int,
        ram_above_4g: int = 0,
        cpus: int = 1,
        boot_order: Iterable[int] = (BOOT_DISK, BOOT_CDROM, BOOT_NETWORK),
        clock: Callable[[], float] = time.time,
        timer: Callable[[float, Callable[[], None]], Timer] | None = None,
    ) -> None:
        self._irq = irq
        self._clock = clock
        self._timer = timer
        self._pending: Timer | None = None
        self._lock = allocate_lock()
        self._configuration = _pc_configuration(ram_below_4g, ram_above_4g, cpus, boot_order)
        self._cmos = bytearray(128)
        self._cmos[REG_A] = A_DEFAULT
        self._cmos[REG_B] = B_24H
        self._offset = 0.0  # guest time - host time
        self._seen = clock()  # guest time up to which the flags are complete
        self.reset()

    def reset(self) -> None:
        """The RESET pin: interrupts off, flags cleared. Time and memory are kept by the battery, except the
        bytes that describe the machine: those are made anew, so that a guest cannot leave wrong ones behind."""
        with self._lock:
            self._index = 0
            self._nmi_masked = False
            self._flags = 0
            self._cmos[REG_B] &= ~(B_PIE | B_AIE | B_UIE | B_SQWE)
            for index, value in self._configuration.items():
                self._cmos[index] = value
            self._settle()

    def close(self) -> None:
        """Drop the pending timer."""
        with self._lock:
            self._timer = None
            self._settle()

    @property
    def nmi_masked(self) -> bool:
        """Bit 7 of the index port."""
        return self._nmi_masked

    @property
    def _offset_ns(self) -> int:
        return round(self._offset * 1e9)

    @_offset_ns.setter
    def _offset_ns(self, value: int) -> None:
        self._offset = value / 1e9

    @property
    def _seen_ns(self) -> int:
        return round(self._seen * 1e9)

    @_seen_ns.setter
    def _seen_ns(self, value: int) -> None:
        self._seen = value / 1e9

    def save(self) -> State:
        """Memory, flags, and how far the guest's clock is from the host's."""
        with self._lock:
            self._refresh()
            self._latch_events()
            return self.shape.take(self)

    def restore(self, state: State) -> None:
        """Continue from them. The time goes on with the host's: an alarm that fell into the pause rings now."""
        with self._lock:
            self.shape.put(self, state)
            self._latch_events()
            self._settle()

    # -- ports ----------------------------------------------------------------------------------------------

    def read_byte(self, offset: int) -> int:
        """Port 0x71 reads the indexed byte; 0x70 is write-only."""
        if offset != 1:
            return 0xFF
        with self._lock:
            index = self._index
            if index in TIME_REGISTERS:
                self._refresh()
            elif index == REG_A and self._running and self._now() % 1 >= 1 - UPDATE_S:
                return self._cmos[REG_A] | A_UPDATE_IN_PROGRESS
            elif index == REG_C:
                return self._acknowledge()
            elif index == REG_D:
                return D_VALID_RAM
            return self._cmos[index]

    def write_byte(self, offset: int, value: int) -> None:
        """Port 0x70 sets index and NMI mask, 0x71 writes the indexed byte."""
        with self._lock:
            if offset == 0:
                self._index = value & 0x7F
                self._nmi_masked = bool(value & 0x80)
            elif offset == 1:
                self._write_cmos(self._index, value)

    def _write_cmos(self, index: int, value: int) -> None:
        if index in TIME_REGISTERS:
            self._refresh()
            self._cmos[index] = value
            if self._running:
                self._set_time(self._now() % 1)
        elif index in ALARM_REGISTERS:
            self._latch_events()
            self._cmos[index] = value
        elif index in (REG_A, REG_B):
            self._write_control(index, value)
        else:
            self._cmos[index] = value
            return
        self._settle()

    def _write_control(self, index: int, value: int) -> None:
        self._latch_events()
        was_running = self._running
        if was_running:
            self._refresh()
        if index == REG_A:
            value &= ~A_UPDATE_IN_PROGRESS
        elif value & B_SET:
            value &= ~B_UIE  # "SET going high clears UIE"
        self._cmos[index] = value
        if self._running and not was_running:
            self._set_time(HALF_SECOND if index == REG_A else 0.0)

    # -- time -----------------------------------------------------------------------------------------------

    @property
    def _running(self) -> bool:
        """Whether the time registers advance: neither SET nor a divider in reset holds them."""
        held = self._cmos[REG_B] & B_SET or self._cmos[REG_A] & A_DIVIDER_RESET == A_DIVIDER_RESET
        return not held

    def _now(self) -> float:
        return self._clock() + self._offset

    def _refresh(self) -> None:
        """Bring the time registers up to date, in the modes of register B."""
        if not self._running:
            return
        now = time.gmtime(self._now() // 1)
        century, year = divmod(now.tm_year, 100)
        hour = now.tm_hour
        if not self._cmos[REG_B] & B_24H:
            hour = hour % 12 or 12
        fields = {
            SECONDS: now.tm_sec,
            MINUTES: now.tm_min,
            HOURS: hour,
            WEEKDAY: (now.tm_wday + 1) % 7 + 1,  # Sunday is 1
            DAY: now.tm_mday,
            MONTH: now.tm_mon,
            YEAR: year,
            CENTURY: century % 100,
        }
        for index, field in fields.items():
            self._cmos[index] = self._encode(field)
        if not self._cmos[REG_B] & B_24H and now.tm_hour >= 12:
            self._cmos[HOURS] |= 0x80

    def _set_time(self, fraction: float) -> None:
        """Take the time from the registers; impossible dates roll over, nothing is refused."""
        field = [self._decode(each) for each in self._cmos]
        month = min(max(field[MONTH], 1), 12)
        days = _days_since_1970(field[CENTURY] * 100 + field[YEAR], month, field[DAY])
        seconds = field[MINUTES] * 60 + field[SECONDS] + self._decode_hour(self._cmos[HOURS]) * 3600
        self._offset = days * DAY_S + seconds + fraction - self._clock()
        self._seen = self._now()

    def _encode(self, value: int) -> int:
        return value if self._cmos[REG_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._cmos[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 0x0F)

    def _decode_hour(self, value: int) -> int:
        if self._cmos[REG_B] & B_24H:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)

    # -- flags and interrupts -------------------------------------------------------------------------------

    def _period(self) -> float:
        """Seconds between periodic events (table 3), 0 for none."""
        rate = self._cmos[REG_A] & 0x0F
        if not rate or self._cmos[REG_A] & A_DIVIDER_RESET == A_DIVIDER_RESET:
            return 0.0
        return float(1 << (rate + 6 if rate <= 2 else rate - 1)) / 32768

    def _next_alarm(self, after: float) -> float | None:
        """The first second later than `after` whose time of day the alarm bytes match; None if there is none."""
        hours = self._alarm_values(HOURS_ALARM, 24)
        minutes = self._alarm_values(MINUTES_ALARM, 60)
        seconds = self._alarm_values(SECONDS_ALARM, 60)
        midnight = after - after % DAY_S
        for day in (midnight, midnight + DAY_S):
            for hour in (day + value * 3600 for value in hours):
                if hour + 3600 <= after:
                    continue
                for minute in (hour + value * 60 for value in minutes):
                    if minute + 60 <= after:
                        continue
                    for second in (minute + value for value in seconds):
                        if second > after:
                            return second
        return None

    def _alarm_values(self, index: int, count: int) -> range:
        value = self._cmos[index]
        if value >= ALARM_ANY:
            return range(count)
        value = self._decode_hour(value) if index == HOURS_ALARM else self._decode(value)
        return range(value, value + 1) if value < count else range(0)

    def _latch_events(self) -> None:
        """Set the flags of what has happened since the last call."""
        now, since = self._now(), self._seen
        self._seen = now
        if now <= since:  # also when the host's clock was set back
            return
        period = self._period()
        if period and now // period != since // period:
            self._flags |= C_PF
        if self._running and now // 1 != since // 1:
            self._flags |= C_UF
            alarm = self._next_alarm(since)
            if alarm is not None and alarm <= now:
                self._flags |= C_AF

    def _acknowledge(self) -> int:
        """Read register C, which clears it."""
        self._latch_events()
        value = self._flags
        if value & self._cmos[REG_B] & (B_PIE | B_AIE | B_UIE):
            value |= C_IRQF
        self._flags = 0
        self._settle()
        return value

    def _settle(self) -> None:
        """Drive the line, and set the timer for the next event that will interrupt."""
        enabled = self._cmos[REG_B] & (B_PIE | B_AIE | B_UIE)
        self._irq.set(bool(self._flags & enabled))
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        waiting = enabled & ~self._flags  # a flag that is up already will not rise again before register C is read
        if self._timer is None or not waiting:
            return
        now = self._now()
        moments = []
        if waiting & B_PIE and (period := self._period()):
            moments.append((now // period + 1) * period)
        if waiting & B_UIE and self._running:
            moments.append(now // 1 + 1)
        if waiting & B_AIE and self._running and (alarm := self._next_alarm(now)) is not None:
            moments.append(alarm)
        if moments:
            self._pending = self._timer(max(min(moments) - now, 0.0), self._on_timer)

    def _on_timer(self) -> None:
        with self._lock:
            self._pending = None
            self._latch_events()
            self._settle()


def _days_since_1970(year: int, month: int, day: int) -> int:
    """Days from 1970-01-01 in the Gregorian calendar; `day` may be any integer. Years are counted from March."""
    year -= month <= 2
    days = 365 * year + year // 4 - year // 100 + year // 400
    return days + (153 * ((month + 9) % 12) + 2) // 5 + day - 1 - 719468


def _pc_configuration(below: int, above: int, cpus: int, boot_order: Iterable[int]) -> dict[int, int]:
    """The memory bytes that firmware reads: index -> value."""
    cmos = {DISK_EQUIPMENT: EQUIPMENT_FPU}

    def store(index: int, size: int, value: int) -> None:
        value = min(value, (1 << (8 * size)) - 1)
        for byte in range(size):
            cmos[index + byte] = value >> (8 * byte) & 0xFF

    store(0x15, 2, 640)  # base memory, KiB
    for index in EXTENDED_KIB:
        store(index, 2, max(below - MIB, 0) // KIB)
    store(0x34, 2, max(below - 16 * MIB, 0) // (64 * KIB))
    store(0x5B, 3, above // (64 * KIB))
    store(0x5F, 1, cpus - 1)
    first, second, third = (*boot_order, 0, 0, 0)[:3]
    cmos[BOOT_FIRST] = second << 4 | first
    cmos[BOOT_THIRD] = third << 4
    total = sum(cmos.get(index, 0) for index in CHECKSUM_RANGE)
    cmos[CHECKSUM], cmos[CHECKSUM + 1] = total >> 8, total & 0xFF
    return cmos
