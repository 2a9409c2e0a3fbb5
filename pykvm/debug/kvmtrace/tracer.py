"""Follows the system calls of processes by ptrace: threads, fork, exec; leaves them unharmed. Layer: debug.

python-ptrace issues the ptrace(2) calls. Its own debugger attaches by PTRACE_ATTACH, which stops a process by a signal
that the process can see; here PTRACE_SEIZE is used, which does not. PTRACE_GET_SYSCALL_INFO tells the number and
arguments of a call (Linux 5.3). Everything happens on the thread that attached, as ptrace wants it.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import TYPE_CHECKING

from pykvm._native import ffi, lib
from pykvm.errors import HostError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    # (task, number, arguments, result, seconds inside)
    OnSyscall = Callable[["Task", int, tuple[int, ...], int, float], object]

STOPPING_SIGNALS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
SYSCALL_STOP = signal.SIGTRAP | 0x80  # PTRACE_O_TRACESYSGOOD
WALL = 0x40000000  # __WALL, wait(2): threads as well
NOT_FOUND = 127


def load_ptrace() -> Any:
    """python-ptrace's ptrace(request, pid, arg1, arg2). Raises HostError when it is not installed."""
    try:
        from ptrace.binding.func import ptrace
    except ImportError:
        raise HostError(
            "following a process needs python-ptrace, which is GPL and hence no hard dependency of pykvm: "
            "pip install 'pykvm-vmm[trace]'"
        ) from None
    return ptrace


class Task:
    """One thread of a followed process. `pid` is its process."""

    __slots__ = ("arguments", "entered", "number", "pid", "tid")

    def __init__(self, tid: int, pid: int) -> None:
        self.tid = tid
        self.pid = pid
        self.number: int | None = None  # of the call that it is in
        self.arguments: tuple[int, ...] = ()
        self.entered = 0.0


class Tracer:
    """Calls `on_syscall` after each system call, `on_exec(pid)` when a process has become another program."""

    def __init__(self, on_syscall: OnSyscall, on_exec: Callable[[int], object]) -> None:
        self._ptrace = load_ptrace()
        self._on_syscall = on_syscall
        self._on_exec = on_exec
        self._tasks: dict[int, Task] = {}
        self._root: int | None = None
        self._owns_root = False
        self._status = 0
        self._stopping = 0
        self._info = ffi.new("struct ptrace_syscall_info *")
        self._info_at = int(ffi.cast("uintptr_t", self._info))
        self._info_size = ffi.sizeof("struct ptrace_syscall_info")

    # -- beginning ----------------------------------------------------------------------------------------------

    def attach(self, pid: int) -> None:
        """Follow every thread of a running process. Raises UsageError."""
        if not os.path.isdir(f"/proc/{pid}/task"):
            raise UsageError(f"attach: there is no process {pid}")
        if pid == os.getpid():
            raise UsageError("attach: a process cannot follow itself")
        self._root = pid
        while new := {int(name) for name in _listdir(f"/proc/{pid}/task")} - self._tasks.keys():
            for tid in sorted(new, key=lambda tid: tid != pid):
                self._seize(tid, pid)

    def _seize(self, tid: int, pid: int) -> None:
        try:
            self._ptrace(lib.PTRACE_SEIZE, tid, 0, _options())
        except Exception as error:
            number = getattr(error, "errno", 0)
            if number == errno.ESRCH and tid != pid:
                self._tasks.setdefault(tid, Task(tid, pid))  # it ended meanwhile
                del self._tasks[tid]
                return
            reason = os.strerror(number) if number else str(error)
            hint = ": be root or its owner, with kernel.yama.ptrace_scope at 0; no other debugger may follow it"
            raise UsageError(f"attach {pid}: {reason}{hint if number == errno.EPERM else ''}") from None
        self._tasks[tid] = Task(tid, pid)
        self._request(lib.PTRACE_INTERRUPT, tid)

    def launch(self, command: Sequence[str]) -> None:
        """Run a command and follow it from its first instruction; it dies with us. Raises UsageError."""
        from shutil import which

        path = which(command[0])
        if path is None:
            raise UsageError(f"{command[0]}: no such command")
        pid = os.fork()
        if pid == 0:
            try:
                os.kill(os.getpid(), signal.SIGSTOP)
                os.execv(path, list(command))
            finally:
                os._exit(NOT_FOUND)
        os.waitpid(pid, os.WUNTRACED)
        self._root, self._owns_root = pid, True
        try:
            self._ptrace(lib.PTRACE_SEIZE, pid, 0, _options() | lib.PTRACE_O_EXITKILL)
        except Exception as error:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise HostError(f"this host does not let processes be followed: {error}") from None
        self._tasks[pid] = Task(pid, pid)
        os.kill(pid, signal.SIGCONT)

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Follow until all have ended or `stop` was called; the exit status of a launched command, else 0."""
        while self._tasks:
            try:
                tid, status = os.waitpid(-1, WALL)
            except ChildProcessError:
                break
            if os.WIFSTOPPED(status):
                self._on_stop(tid, status)
            else:
                self._tasks.pop(tid, None)
                if tid == self._root and self._owns_root:
                    self._status = os.waitstatus_to_exitcode(status)
        return self._status if self._status >= 0 else 128 - self._status

    def stop(self) -> None:
        """Let go: detach from what was attached; end a launched command. Callable from a signal handler."""
        self._stopping += 1
        if self._owns_root and self._root is not None:
            try:
                os.kill(self._root, signal.SIGTERM if self._stopping == 1 else signal.SIGKILL)
            except ProcessLookupError:
                pass
            return
        for tid in list(self._tasks):
            self._request(lib.PTRACE_INTERRUPT, tid)

    def _on_stop(self, tid: int, status: int) -> None:
        task = self._tasks.get(tid)
        if task is None:
            task = self._tasks[tid] = Task(tid, _process_of(tid))
        number, event, deliver = os.WSTOPSIG(status), status >> 16, 0
        resume = lib.PTRACE_SYSCALL
        if number == SYSCALL_STOP:
            self._on_syscall_stop(task)
        elif event == lib.PTRACE_EVENT_STOP:
            if number in STOPPING_SIGNALS:
                resume = lib.PTRACE_LISTEN  # it is stopped, and stays so until a SIGCONT
        elif event == lib.PTRACE_EVENT_EXEC:
            for other in [each for each in self._tasks.values() if each.pid == task.pid and each.tid != tid]:
                del self._tasks[other.tid]
            self._on_exec(task.pid)
        elif not event:
            deliver = number
        if self._stopping and not self._owns_root:
            self._request(lib.PTRACE_DETACH, tid, deliver)
            self._tasks.pop(tid, None)
        else:
            self._request(resume, tid, deliver)

    def _on_syscall_stop(self, task: Task) -> None:
        info = self._info
        if not self._request(lib.PTRACE_GET_SYSCALL_INFO, task.tid, self._info_at, self._info_size):
            return
        if info.op == lib.PTRACE_SYSCALL_INFO_ENTRY:
            task.number, task.arguments = info.entry.nr, tuple(info.entry.args)
            task.entered = time.monotonic()
        elif info.op == lib.PTRACE_SYSCALL_INFO_EXIT and task.number is not None:
            number, task.number = task.number, None
            self._on_syscall(task, number, task.arguments, info.exit.rval, time.monotonic() - task.entered)

    def _request(self, request: int, tid: int, data: int = 0, address: int = 0) -> bool:
        """Issue a request to a stopped task; False when it is gone (killed, or ended)."""
        try:
            self._ptrace(request, tid, address, data)
        except Exception as error:
            if getattr(error, "errno", 0) not in (errno.ESRCH, errno.EIO):
                raise
            return False
        return True


def _options() -> int:
    wanted = ("TRACESYSGOOD", "TRACECLONE", "TRACEFORK", "TRACEVFORK", "TRACEEXEC")
    options = 0
    for name in wanted:
        options |= getattr(lib, f"PTRACE_O_{name}")
    return options


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _process_of(tid: int) -> int:
    """The process of a thread."""
    try:
        with open(f"/proc/{tid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("Tgid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return tid
