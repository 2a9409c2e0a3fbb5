"""The RTC and CMOS memory against the MC146818 data sheet, and what firmware reads."""

from __future__ import annotations

import calendar
import time

import pytest
from device_wire import Wire
from hypothesis import given
from hypothesis import strategies as st

from pykvm.devices.rtc import BOOT_CDROM, BOOT_DISK, BOOT_NETWORK, Rtc

MIB, GIB = 1 << 20, 1 << 30
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10
A, B, C, D, CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32
RUN, DIVIDER_RESET = 0x20, 0x70


def at(text):
    """Seconds since 1970 of `YYYY-MM-DD hh:mm:ss`, UTC."""
    return float(calendar.timegm(time.strptime(text, "%Y-%m-%d %H:%M:%S")))


class Alarm:
    """A pending call of the host's timer."""

    def __init__(self, when, call):
        self.when, self.call, self.live = when, call, True

    def cancel(self):
        self.live = False


class Host:
    """A clock that the test moves, and the timers that run by it."""

    def __init__(self, now):
        self.now = now
        self.timers = []

    def clock(self):
        return self.now

    def timer(self, delay, call):
        assert delay >= 0
        self.timers.append(Alarm(self.now + delay, call))
        return self.timers[-1]

    @property
    def live(self):
        return [each for each in self.timers if each.live]

    def advance(self, seconds):
        """Let time pass, running what comes due."""
        end = self.now + seconds
        while due := [each for each in self.live if each.when <= end]:
            first = min(due, key=lambda each: each.when)
            first.live = False
            self.now = max(self.now, first.when)
            first.call()
        self.now = end


class Guest:
    """Ports 0x70 and 0x71."""

    def __init__(self, now="2026-11-22 20:15:42", *, timer=False, **options):
        self.irq = Wire(8)
        self.host = Host(at(now))
        options.setdefault("ram_below_4g", 512 * MIB)
        self.rtc = Rtc(self.irq, clock=self.host.clock, timer=self.host.timer if timer else None, **options)

    def __getitem__(self, index):
        self.rtc.write(0, 1, index)
        return self.rtc.read(1, 1)

    def __setitem__(self, index, value):
        self.rtc.write(0, 1, index)
        self.rtc.write(1, 1, value)

    @property
    def time(self):
        return tuple(self[index] for index in (CENTURY, 9, 8, 7, 4, 2, 0))

    @time.setter
    def time(self, fields):
        for index, value in zip((CENTURY, 9, 8, 7, 4, 2, 0), fields, strict=True):
            self[index] = value


# -- time --------------------------------------------------------------------------------------------------


def test_time_is_the_hosts_in_bcd():
    """After reset the registers give UTC in BCD and 24-hour mode."""
    assert Guest().time == (0x20, 0x26, 0x11, 0x22, 0x20, 0x15, 0x42)


def test_binary_mode():
    """Register B bit 2 switches to binary."""
    guest = Guest()
    guest[B] = BINARY | H24
    assert guest.time == (20, 26, 11, 22, 20, 15, 42)


@pytest.mark.parametrize(("hour", "bcd"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_twelve_hour_mode(hour, bcd):
    """Noon is 12 PM, midnight 12 AM, PM is bit 7; setting the hour reads the same code."""
    guest = Guest(f"2026-11-22 {hour:02}:00:00")
    guest[B] = 0
    assert guest[4] == bcd
    guest[4] = bcd
    guest[B] = H24 | BINARY
    assert (guest[7], guest[4]) == (22, hour)


@pytest.mark.parametrize(("date", "weekday"), [("2026-11-22", 1), ("2026-11-23", 2), ("2026-11-28", 7)])
def test_weekday_counts_from_sunday(date, weekday):
    """Sunday is 1."""
    assert Guest(f"{date} 00:00:00")[6] == weekday


def test_setting_the_time_with_set():
    """The usual way: SET, write all, clear SET; then the clock runs on from there at full seconds."""
    guest = Guest()
    guest.host.advance(0.7)
    guest[B] = SET | H24
    guest.time = (0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59)
    guest.host.advance(10)
    assert guest.time == (0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59)
    guest[B] = H24
    guest.host.advance(0.9)
    assert guest[0] == 0x59
    guest.host.advance(0.1)
    assert guest.time == (0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00)


def test_set_freezes_the_time_of_that_moment():
    """A guest that sets SET and then reads sees the time at which it did so."""
    guest = Guest("2026-11-22 20:15:42")
    guest.host.advance(5)
    guest[B] = SET | H24
    guest.host.advance(5)
    assert guest[0] == 0x47


def test_releasing_the_divider_gives_half_a_second():
    """Linux resets the divider while it sets the time and relies on the first update 500 ms after release."""
    guest = Guest()
    guest[B] = SET | H24
    guest[A] = DIVIDER_RESET
    guest.time = (0x20, 0x30, 0x01, 0x02, 0x03, 0x04, 0x05)
    guest[B] = H24
    guest.host.advance(3)
    assert guest[0] == 0x05
    guest[A] = 0x26
    guest.host.advance(0.49)
    assert guest[0] == 0x05
    guest.host.advance(0.02)
    assert guest[0] == 0x06


def test_setting_one_register_of_a_running_clock():
    """Without SET a write takes effect at once and keeps the fraction of the second."""
    guest = Guest("2026-11-22 20:15:42")
    guest.host.advance(0.75)
    guest[2] = 0x30
    assert guest.time == (0x20, 0x26, 0x11, 0x22, 0x20, 0x30, 0x42)
    guest.host.advance(0.25)
    assert guest[0] == 0x43


def test_a_set_clock_survives_reset():
    """The battery keeps the offset."""
    guest = Guest()
    guest[9] = 0x30
    guest.rtc.reset()
    assert guest[9] == 0x30


@given(st.lists(st.tuples(st.integers(0, 0x7F), st.integers(0, 255)), max_size=30), st.floats(0, 1e7))
def test_any_register_contents_are_survived(writes, pause):
    """Impossible dates, modes and alarms roll over; every register still reads as a byte."""
    guest = Guest(timer=True)
    for index, value in writes:
        guest[index] = value
    guest.host.now += pause
    for pending in guest.host.live:
        pending.call()
    assert all(0 <= guest[index] <= 0xFF for index in range(0x80))
    guest[A], guest[B] = 0x26, BINARY | H24
    fields = guest.time
    assert 1 <= fields[2] <= 12
    assert 1 <= fields[3] <= 31
    assert max(fields[4] // 24, fields[5] // 60, fields[6] // 60) == 0


@given(st.integers(0, 4_102_444_800))
def test_time_round_trip(moment):
    """What is read and written back under SET is the same time."""
    guest = Guest()
    guest.host.now = float(moment)
    fields = guest.time
    guest[B] = SET | H24
    guest.time = fields
    guest[B] = H24
    assert guest.time == fields


def test_update_in_progress():
    """UIP is up for the last 2.2 ms of each second, never while the clock is held."""
    guest = Guest()
    assert not guest[A] & 0x80
    guest.host.advance(0.998)
    assert guest[A] & 0x80
    guest[B] = SET | H24
    assert not guest[A] & 0x80
    guest[B] = H24
    guest.host.advance(1)
    assert not guest[A] & 0x80


def test_control_registers():
    """A keeps seven bits, C and D are read-only, D says that the battery is good; SET clears UIE."""
    guest = Guest()
    guest[A] = 0xAF
    assert guest[A] == 0x2F
    guest[C] = guest[D] = 0xFF
    assert (guest[C], guest[D]) == (0, 0x80)
    guest[C] = guest[D] = 0x00
    assert (guest[C], guest[D]) == (0, 0x80)
    guest[B] = SET | UIE | AIE | H24
    assert guest[B] == SET | AIE | H24


# -- flags and interrupts ----------------------------------------------------------------------------------


def test_flags_are_computed_on_read_without_a_timer():
    """Polling register C sees each event once, and no interrupt is made."""
    guest = Guest()
    guest[C]
    assert guest[C] == 0
    guest.host.advance(1)
    assert guest[C] == UF | PF
    assert guest[C] == 0
    guest.host.advance(0.001)
    assert guest[C] == PF
    assert guest.irq.changes == []


def test_enabled_flags_set_irqf():
    """IRQF is any flag with its enable."""
    guest = Guest()
    guest[B] = UIE | H24
    guest.host.advance(1)
    assert guest[C] == IRQF | UF | PF


def test_update_interrupt_every_second():
    """UIE interrupts at each second, as long as register C is read."""
    guest = Guest("2026-11-22 20:15:42", timer=True)
    guest.host.advance(0.5)
    guest[B] = UIE | H24
    for edges in (1, 2, 3):
        guest.host.advance(1)
        assert (guest.irq.edges, guest.irq.level) == (edges, True)
        assert guest[C] & (IRQF | UF) == IRQF | UF
        assert not guest.irq.level


def test_an_unread_flag_costs_no_more_timers():
    """A guest that enables an interrupt and goes away does not keep the host busy."""
    guest = Guest(timer=True)
    guest[B] = PIE | UIE | H24
    guest.host.advance(100)
    assert len(guest.host.timers) <= 8
    assert guest.host.live == []
    assert guest.irq.edges == 1


@pytest.mark.parametrize(("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (10, 64), (13, 8), (15, 2)])
def test_periodic_rates(rate, hertz):
    """Table 3: sixteen interrupts take sixteen periods."""
    guest = Guest(timer=True)
    guest[A] = RUN | rate
    guest[B] = PIE | H24
    for edges in range(1, 17):
        guest.host.advance(1 / hertz)
        assert guest.irq.edges == edges
        assert guest[C] & PF


def test_no_rate_no_periodic_interrupt():
    """Rate 0 is off."""
    guest = Guest(timer=True)
    guest[A] = RUN
    guest[B] = PIE | H24
    guest.host.advance(10)
    assert guest.irq.changes == []


@pytest.mark.parametrize(
    ("alarm", "expected"),
    [
        ((0x20, 0x15, 0x45), "2026-11-22 20:15:45"),
        ((0x20, 0x15, 0x42), "2026-11-23 20:15:42"),  # now does not count
        ((0x07, 0x00, 0x00), "2026-11-23 07:00:00"),
        ((0xFF, 0xC0, 0x00), "2026-11-22 20:16:00"),  # every minute
        ((0xFF, 0x00, 0x00), "2026-11-22 21:00:00"),  # every hour
        ((0x00, 0xFF, 0xFF), "2026-11-23 00:00:00"),
        ((0xFF, 0xFF, 0xFF), "2026-11-22 20:15:43"),  # every second
    ],
)
@pytest.mark.parametrize("timer", [True, False])
def test_alarm(alarm, expected, timer):
    """The alarm comes at the next matching second, by interrupt or seen in the flags, and not before."""
    guest = Guest("2026-11-22 20:15:42", timer=timer)
    guest[5], guest[3], guest[1] = alarm
    guest[B] = AIE | H24
    wait = at(expected) - guest.host.now
    guest.host.advance(wait - 0.01)
    assert not guest[C] & AF
    guest.host.advance(0.01)
    assert guest.irq.edges == int(timer)
    assert guest[C] & (AF | IRQF) == AF | IRQF


def test_alarm_in_twelve_hour_mode():
    """The alarm hour has the PM bit too."""
    guest = Guest("2026-11-22 20:15:42", timer=True)
    guest[B] = AIE
    guest[5], guest[3], guest[1] = 0x89, 0x00, 0x00
    guest.host.advance(at("2026-11-22 21:00:00") - guest.host.now)
    assert guest.irq.level


@pytest.mark.parametrize("alarm", [(0x24, 0, 0), (0x45, 0, 0), (0xFF, 0x60, 0), (0xFF, 0xFF, 0x60)])
def test_impossible_alarm_never_comes(alarm):
    """Hour 24 and second 60 match no time, and cost no timer."""
    guest = Guest(timer=True)
    guest[5], guest[3], guest[1] = alarm
    guest[B] = AIE | H24
    assert guest.host.live == []
    guest.host.advance(200_000)
    assert not guest[C] & AF


def test_one_timer_at_a_time():
    """However often the guest moves its alarm, the host has one call pending; closing drops it."""
    guest = Guest(timer=True)
    guest[B] = AIE | UIE | H24
    for second in range(60):
        guest[1] = second
    assert len(guest.host.live) == 1
    guest.rtc.close()
    assert guest.host.live == []


def test_a_host_clock_set_back_is_survived():
    """Time that runs backwards raises no flags."""
    guest = Guest()
    guest[C]
    guest.host.now -= 3600
    assert guest[C] == 0
    assert guest[4] == 0x19


def test_reset_clears_interrupts():
    """The RESET pin clears the enables, the flags and the line."""
    guest = Guest(timer=True)
    guest[B] = UIE | BINARY | H24
    guest.host.advance(1)
    assert guest.irq.level
    guest.rtc.reset()
    assert (guest.irq.level, guest[B], guest[C]) == (False, BINARY | H24, 0)


# -- memory ------------------------------------------------------------------------------------------------


def word(guest, index):
    return guest[index] | guest[index + 1] << 8


@pytest.mark.parametrize(
    ("below", "above", "extended", "over_16m", "over_4g"),
    [
        (8 * MIB, 0, 7 * 1024, 0, 0),
        (16 * MIB + 65536, 0, 15 * 1024 + 64, 1, 0),
        (512 * MIB, 0, 65535, 496 * 16, 0),
        (3 * GIB, 5 * GIB, 65535, 3056 * 16, 5 * GIB >> 16),
        (3 * GIB, 1 << 44, 65535, 3056 * 16, 0xFFFFFF),
        (MIB // 2, 0, 0, 0, 0),
    ],
)
def test_memory_sizes(below, above, extended, over_16m, over_4g):
    """SeaBIOS and old kernels size memory by these bytes; what does not fit is the largest that does."""
    guest = Guest(ram_below_4g=below, ram_above_4g=above)
    assert word(guest, 0x15) == 640
    assert (word(guest, 0x17), word(guest, 0x30)) == (extended, extended)
    assert word(guest, 0x34) == over_16m
    assert word(guest, 0x5B) | guest[0x5D] << 16 == over_4g


def test_cpu_count_and_boot_order():
    """0x5f is the number of CPUs less one; the boot order is three nibbles."""
    guest = Guest(cpus=4, boot_order=(BOOT_CDROM, BOOT_DISK, BOOT_NETWORK))
    assert (guest[0x5F], guest[0x3D], guest[0x38]) == (3, 0x23, 0x40)


def test_checksum():
    """The PC's checksum over 0x10 to 0x2d is right."""
    guest = Guest()
    assert guest[0x2E] << 8 | guest[0x2F] == sum(guest[index] for index in range(0x10, 0x2E))


def test_memory_is_kept_over_reset_but_the_machine_is_described_anew():
    """The shutdown code survives, as resuming firmware needs; a guest's lie about memory does not."""
    guest = Guest()
    guest[0x0F] = 0x0A
    guest[0x7F] = 0x77
    guest[0x34] = 0xEE
    guest.rtc.reset()
    assert (guest[0x0F], guest[0x7F], word(guest, 0x34)) == (0x0A, 0x77, 496 * 16)


def test_index_port():
    """Bit 7 masks NMI and is no part of the index; the port cannot be read."""
    guest = Guest()
    guest.rtc.write(0, 1, 0x80 | 0x0F)
    assert guest.rtc.nmi_masked
    guest.rtc.write(1, 1, 0x5A)
    assert guest[0x0F] == 0x5A
    assert not guest.rtc.nmi_masked
    assert guest.rtc.read(0, 1) == 0xFF


def test_a_word_write_sets_index_and_data():
    """`outw` to 0x70 is two byte cycles."""
    guest = Guest()
    guest.rtc.write(0, 2, 0xA50F)
    assert guest[0x0F] == 0xA5
