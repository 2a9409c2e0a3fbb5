"""8042 keyboard controller of an AT: ports 0x60 (data) and 0x64 (status, command). Layer: devices.

A controller with nothing plugged in. Each controller command is answered at once, and a byte for the absent
keyboard is answered as the chip does when no keyboard clocks it in: 0xfe with the time-out bit. Linux gives
up after four such bytes, without any of its 200 ms waits; a keyboard that answered would cost it some twenty
commands. There is no second (mouse) port, and both of the usual probes for it say so.

Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller".
"""

from __future__ import annotations

from _thread import allocate_lock

from pykvm.core.outcome import Outcome
from pykvm.core.state import LINE, U8, Bytes, Shape
from pykvm.devices.bytewide import ByteDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.core.device import IrqLine
    from pykvm.core.state import State

# -- status register ----------------------------------------------------------------------------------------
STATUS_OUTPUT_FULL, STATUS_SYSTEM_FLAG, STATUS_COMMAND = 0x01, 0x04, 0x08
STATUS_NOT_LOCKED, STATUS_TIMEOUT = 0x10, 0x40

# -- configuration byte (controller RAM, byte 0) ------------------------------------------------------------
CONFIG_KEYBOARD_IRQ, CONFIG_SYSTEM_FLAG = 0x01, 0x04
CONFIG_KEYBOARD_OFF, CONFIG_AUX_OFF, CONFIG_TRANSLATE = 0x10, 0x20, 0x40
CONFIG_WRITABLE = CONFIG_KEYBOARD_IRQ | CONFIG_SYSTEM_FLAG | CONFIG_KEYBOARD_OFF | CONFIG_TRANSLATE

# -- commands -----------------------------------------------------------------------------------------------
READ_RAM, WRITE_RAM = 0x20, 0x60  # to 0x3f and 0x7f: 32 bytes
TEST_PASSWORD, AUX_DISABLE, AUX_ENABLE, TEST_AUX = 0xA4, 0xA7, 0xA8, 0xA9
SELF_TEST, TEST_KEYBOARD, KEYBOARD_DISABLE, KEYBOARD_ENABLE = 0xAA, 0xAB, 0xAD, 0xAE
READ_INPUT_PORT, READ_OUTPUT_PORT, WRITE_OUTPUT_PORT = 0xC0, 0xD0, 0xD1
WRITE_KEYBOARD_BUFFER, WRITE_AUX_BUFFER, WRITE_AUX = 0xD2, 0xD3, 0xD4
A20_OFF, A20_ON = 0xDD, 0xDF
READ_TEST_INPUTS = 0xE0
PULSE = 0xF0  # to 0xff: the output port's low lines whose bit is 0 go low for 6 us

# -- answers ------------------------------------------------------------------------------------------------
SELF_TEST_PASSED = 0x55
NO_PASSWORD = 0xF1
AUX_CLOCK_LOW = 0x01  # what TEST_AUX says of a port that is not there
RESEND = 0xFE

OUTPUT_NOT_RESET, OUTPUT_A20, OUTPUT_BUFFER_FULL = 0x01, 0x02, 0x10


class I8042:
    """The controller; `data` and `command` are its two one-byte regions, `irq` is IRQ 1.

    The A20 line is only remembered: KVM guests always see all of memory.
    """

    shape = Shape(1, ram=Bytes(32), output=U8, status=U8, a20=U8, awaiting=U8, irq=LINE)

    def __init__(self, irq: IrqLine) -> None:
        self.data: ByteDevice = _DataPort(self)
        self.command: ByteDevice = _CommandPort(self)
        self._irq = irq
        self._lock = allocate_lock()
        self._power_on()

    def _power_on(self) -> None:
        self._ram = bytearray(32)
        self._ram[0] = CONFIG_KEYBOARD_IRQ | CONFIG_SYSTEM_FLAG | CONFIG_AUX_OFF | CONFIG_TRANSLATE
        self._output = 0  # the output buffer; stays readable after it was read
        self._status = STATUS_SYSTEM_FLAG | STATUS_NOT_LOCKED
        self._a20 = OUTPUT_A20
        self._awaiting = 0  # the command that takes the next data byte

    def reset(self) -> None:
        """Return to the power-on state."""
        with self._lock:
            self._power_on()
            self._drive_irq()

    def save(self) -> State:
        """The controller's registers."""
        with self._lock:
            return self.shape.take(self)

    def restore(self, state: State) -> None:
        """Continue from them."""
        with self._lock:
            self.shape.put(self, state)

    # -- port 0x60 ------------------------------------------------------------------------------------------

    def read_data(self) -> int:
        """Empty the output buffer."""
        with self._lock:
            self._status &= ~(STATUS_OUTPUT_FULL | STATUS_TIMEOUT)
            self._drive_irq()
            return self._output

    def write_data(self, value: int) -> Outcome | None:
        """The argument of the last command, or else a byte for the keyboard."""
        with self._lock:
            self._status &= ~STATUS_COMMAND
            command, self._awaiting = self._awaiting, 0
            if command == WRITE_OUTPUT_PORT:
                self._a20 = value & OUTPUT_A20
                return None if value & OUTPUT_NOT_RESET else Outcome.RESET
            if command in (WRITE_KEYBOARD_BUFFER, WRITE_AUX_BUFFER):
                # Without an auxiliary port the byte comes back as the keyboard's: the probe's "no mouse".
                self._answer(value)
            elif WRITE_RAM <= command < WRITE_RAM + 0x20:
                self._write_ram(command & 0x1F, value)
            else:
                if not command:
                    self._ram[0] &= ~CONFIG_KEYBOARD_OFF  # talking to the keyboard enables it
                self._answer(RESEND, STATUS_TIMEOUT)
        return None

    # -- port 0x64 ------------------------------------------------------------------------------------------

    def read_status(self) -> int:
        """The status register; the input buffer is never full, commands take no time."""
        return self._status

    def write_command(self, value: int) -> Outcome | None:
        """Execute a controller command; unknown ones are ignored, as the chip does."""
        with self._lock:
            self._status |= STATUS_COMMAND
            self._awaiting = 0
            if value >= PULSE:
                return None if value & OUTPUT_NOT_RESET else Outcome.RESET
            if READ_RAM <= value < READ_RAM + 0x20:
                self._answer(self._ram[value & 0x1F])
            elif WRITE_RAM <= value < WRITE_RAM + 0x20 or WRITE_OUTPUT_PORT <= value <= WRITE_AUX:
                self._awaiting = value
            else:
                self._execute(value)
        return None

    def _execute(self, command: int) -> None:
        if command == SELF_TEST:
            self._write_ram(0, self._ram[0] | CONFIG_SYSTEM_FLAG | CONFIG_KEYBOARD_OFF)
        elif command == KEYBOARD_DISABLE:
            self._write_ram(0, self._ram[0] | CONFIG_KEYBOARD_OFF)
        elif command == KEYBOARD_ENABLE:
            self._write_ram(0, self._ram[0] & ~CONFIG_KEYBOARD_OFF)
        elif command in (A20_OFF, A20_ON):
            self._a20 = command & OUTPUT_A20
        answers = {
            SELF_TEST: SELF_TEST_PASSED,
            TEST_KEYBOARD: 0,
            TEST_AUX: AUX_CLOCK_LOW,
            TEST_PASSWORD: NO_PASSWORD,
            READ_INPUT_PORT: 0x80,  # keyboard not inhibited
            READ_OUTPUT_PORT: self._output_port(),
            READ_TEST_INPUTS: 0,
        }
        if command in answers:
            self._answer(answers[command])

    def _output_port(self) -> int:
        full = OUTPUT_BUFFER_FULL if self._status & STATUS_OUTPUT_FULL else 0
        return 0xC0 | full | self._a20 | OUTPUT_NOT_RESET

    def _write_ram(self, index: int, value: int) -> None:
        if index == 0:
            # The auxiliary port stays disabled: to enable it and find it off is the other probe for it.
            value = value & CONFIG_WRITABLE | CONFIG_AUX_OFF
            system = STATUS_SYSTEM_FLAG if value & CONFIG_SYSTEM_FLAG else 0
            self._status = self._status & ~STATUS_SYSTEM_FLAG | system
        self._ram[index] = value
        self._drive_irq()

    def _answer(self, value: int, flags: int = 0) -> None:
        """Fill the output buffer; an answer that nobody read is overwritten."""
        self._output = value
        self._status = self._status & ~STATUS_TIMEOUT | STATUS_OUTPUT_FULL | flags
        self._irq.set(False)  # each byte is an edge of its own
        self._drive_irq()

    def _drive_irq(self) -> None:
        wanted = self._ram[0] & (CONFIG_KEYBOARD_IRQ | CONFIG_KEYBOARD_OFF) == CONFIG_KEYBOARD_IRQ
        self._irq.set(wanted and bool(self._status & STATUS_OUTPUT_FULL))


class _DataPort(ByteDevice):
    name = "i8042 data"
    shape = I8042.shape  # this port saves for both

    def __init__(self, core: I8042) -> None:
        self._core = core

    def read_byte(self, offset: int) -> int:
        return self._core.read_data() if offset == 0 else 0xFF

    def write_byte(self, offset: int, value: int) -> Outcome | None:
        return self._core.write_data(value) if offset == 0 else None

    def reset(self) -> None:
        self._core.reset()

    def save(self) -> State:
        return self._core.save()

    def restore(self, state: State) -> None:
        self._core.restore(state)


class _CommandPort(ByteDevice):
    name = "i8042 command"

    def __init__(self, core: I8042) -> None:
        self._core = core

    def read_byte(self, offset: int) -> int:
        return self._core.read_status() if offset == 0 else 0xFF

    def write_byte(self, offset: int, value: int) -> Outcome | None:
        return self._core.write_command(value) if offset == 0 else None

    def reset(self) -> None:
        self._core.reset()
