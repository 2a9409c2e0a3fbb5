"""Where the back end of a vhost-user device comes from: a process that pykvm starts, watches and ends. Layer: virtio.

The socket is made in a private folder, connected to, and its name removed before the process starts: nobody else can
connect, and nothing is left behind, whatever happens. The process gets the listening descriptor.

The process ends with pykvm, kill -9 included: it closes at the end of the connection, or the kernel kills it
(PR_SET_PDEATHSIG). That signal comes when the *thread* that started the process ends, hence `_Spawner`.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading

from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STOP_S, MOMENT_S = 2.0, 0.2
LAST_LINES, LAST_WORDS = 3, 300  # of what a back end said: lines, characters


class BackendSource:
    """How a front end gets its back end. A subclass for a back end that somebody else runs needs `connect` only.

    name      of the back end, in messages
    option    that asked for it, in errors
    restarts  whether `connect` may be called again after the back end died
    advice    what a person should know when a new one took over
    remedy    what to do when none did
    """

    name = "back end"
    option = "vhost-user"
    restarts = False
    advice = "it goes on with the requests that the old one had not finished"
    remedy = "Reset the device in the guest, or start the machine again"

    def connect(self) -> socket.socket:
        """A connected socket. Raises ConfigError."""
        raise NotImplementedError

    def last_words(self) -> str:
        """How the back end ended and what it said about that; "" if that is not known."""
        return ""

    voice = -1  # a descriptor that can be read when the back end has something to say; -1: none

    def listen(self) -> list[str] | None:
        """The lines that it has said since the last call; None: it will say no more."""
        return None

    def stop(self) -> None:
        """The connection was closed: end what is behind it. Idempotent."""

    def end(self) -> None:
        """As `stop`, of a back end that is well."""
        self.stop()


class ProcessBackend(BackendSource):
    """A program that serves the listening socket whose descriptor it is given.

    command   descriptor -> the words of the command
    readonly  run in a mount namespace in which every mount is read-only (in a user namespace, if pykvm is not root's)
    root_at   a folder at which a mount namespace of its own has the root again, for a program that would make a part of
              the tree its root and cannot do so with the root itself; "" for none
    """

    restarts = True
    stop_s = STOP_S  # how long the process may take to end when it is asked to
    status: int | None = None  # that of the last process

    def __init__(
        self,
        name: str,
        option: str,
        command: Callable[[int], Sequence[str]],
        *,
        readonly: bool = False,
        root_at: str = "",
    ) -> None:
        self.name = name
        self.option = option
        self._command = command
        self._confinement = ("readonly" if readonly else "", root_at)
        self.fds: Callable[[], Sequence[int]] = tuple  # more descriptors that the program gets
        self.process: subprocess.Popen[bytes] | None = None
        self._heard: list[str] = []  # the last lines of this process
        self._end = ""

    def connect(self) -> socket.socket:
        """Start the program; the connection waits in the socket's backlog until it accepts it."""
        self.stop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            ours = _connect_privately(listener, self.option)
            try:
                self._start(listener.fileno())
            except BaseException:
                ours.close()
                raise
        return ours

    def _start(self, fd: int) -> None:
        self._heard = []
        self.voice, said_end = os.pipe()
        os.set_blocking(self.voice, False)
        os.set_blocking(said_end, False)  # what nobody reads must not hold it up
        package = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        words = [sys.executable, "-P", "-c", LAUNCH, package, *self._confinement, *self._command(fd)]
        try:
            self.process = spawn(
                words,
                pass_fds=(fd, *self.fds()),
                stdin=subprocess.DEVNULL,
                stdout=said_end,
                stderr=said_end,
                process_group=0,
            )
        except OSError as error:
            raise ConfigError(self.option, f"cannot run {self.name}: {error.strerror}") from None
        finally:
            os.close(said_end)

    def last_words(self) -> str:
        """The end of the process, with what it printed last."""
        return self._end or self._describe_end()

    def _describe_end(self) -> str:
        if self.process is None:
            return ""
        try:
            status = self.process.wait(MOMENT_S)
        except subprocess.TimeoutExpired:
            return ""
        how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        self.listen()
        said = "; ".join(self._heard)[-LAST_WORDS:]
        return f"{self.name} {how}" + (f" ({said})" if said else "")

    def listen(self) -> list[str] | None:
        """What it printed. A line that comes in pieces is several."""
        try:
            data = os.read(self.voice, 65536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        lines = [line.strip() for line in data.decode(errors="replace").splitlines() if line.strip()]
        self._heard = [*self._heard, *lines][-LAST_LINES:]
        return lines if data else None

    def stop(self) -> None:
        """End the process: the connection is closed; if that does not do it, the kernel does."""
        process = self.process
        if process is None:
            return
        self._end = self._describe_end()
        if process.returncode is None:
            _kill_group(process, self.stop_s)
        self.status = process.returncode
        self.process = None
        os.close(self.voice)
        self.voice = -1

    def end(self) -> None:
        """End the process at once: there is nothing to learn from how it ends by itself."""
        if self.process is not None:
            _kill_group(self.process, self.stop_s)
        self.stop()


def _kill_group(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """SIGTERM to the process and its children, SIGKILL when it does not heed that in time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass  # it has just ended
        try:
            process.wait(patience_s)
            return
        except subprocess.TimeoutExpired:
            continue


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _connect_privately(listener: socket.socket, option: str) -> socket.socket:
    """A socket that is connected to `listener`, whose name is gone again."""
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with tempfile.TemporaryDirectory(prefix="pykvm-") as folder:  # mode 0700
            path = os.path.join(folder, "vhost")
            listener.bind(path)
            listener.listen(1)
            ours.connect(path)
    except OSError as error:
        ours.close()
        raise ConfigError(option, f"cannot make a socket for the back end: {error.strerror}") from None
    return ours


# Run by a bare interpreter between fork and exec: dies with pykvm, is confined, becomes the program.
LAUNCH = """
import os, sys
_, package, readonly, root_at, *words = sys.argv
sys.path.insert(0, package)
from pykvm._native import lib
def check(result, what):
    if result < 0:
        print(f"cannot {what}: {os.strerror(-result)}", file=sys.stderr)
        os._exit(126)
check(lib.pk_die_with_parent(), "follow pykvm's end")
if readonly or root_at:
    check(lib.pk_own_mounts(), "make a mount namespace")
if root_at:
    check(lib.pk_bind_root(root_at.encode()), "mount the root a second time")
if readonly:
    check(lib.pk_readonly_mounts(), "make the mounts read-only")
try:
    os.execvp(words[0], words)
except OSError as error:
    print(f"cannot run {words[0]}: {error.strerror}", file=sys.stderr)
    os._exit(127)
"""


class _Spawner:
    """A thread that starts processes and never ends: theirs would be the end of the thread otherwise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pid = -1

    def start(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._pid != os.getpid():  # the first time, or in a child of ours that has none
                self._pid, self._jobs = os.getpid(), queue.SimpleQueue()
                threading.Thread(target=self._main, name="pykvm-spawner", args=(self._jobs,), daemon=True).start()
            self._jobs.put(job)

    @staticmethod
    def _main(jobs: queue.SimpleQueue[Callable[[], None]]) -> None:
        while True:
            jobs.get()()


_spawner = _Spawner()


def spawn(words: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
    """subprocess.Popen(words, **options) from a thread that lives as long as this process. Raises OSError."""
    done = threading.Event()
    result: list[subprocess.Popen[bytes]] = []
    errors: list[BaseException] = []

    def job() -> None:
        try:
            result.append(subprocess.Popen(words, **options))  # type: ignore[call-overload]
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    _spawner.start(job)
    done.wait()
    if errors:
        raise errors[0]
    return result[0]
