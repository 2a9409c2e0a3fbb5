"""The machine's methods that save, copy and restore it. Layer: core.

All of it is in `pykvm.snapshot`, loaded when used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from pykvm.snapshot.state import Snapshot


class Snapshots:
    """Mixed into Machine."""

    def snapshot(self) -> Snapshot:
        """The machine as it is now: memory, vCPUs, interrupt controllers, clock, devices. It goes on as it was.

        Memory is not copied but shared copy-on-write from now on, so this is cheap with `memfd=True`; a machine with
        anonymous memory has what it ever wrote copied the first time. Callable from any state and any thread but a
        vCPU's. Raises SnapshotError for a device that cannot be saved.
        """
        from pykvm.snapshot.take import take

        return take(self)  # type: ignore[arg-type]

    def restore(self, snapshot: Snapshot) -> None:
        """Be as `snapshot` again: of this machine, of one that it was forked from, or of its twin. Left paused.

        After the machine's latest snapshot (or the one that it was forked from) only the pages written since are given
        back; its time goes on from the snapshot's. Raises SnapshotError if it does not fit, before anything is touched.
        """
        from pykvm.snapshot.apply import restore

        restore(self, snapshot)  # type: ignore[arg-type]

    def fork(self, snapshot: Snapshot | None = None, *, attach: Callable[[Self], object] | None = None) -> Self:
        """A new machine that goes on from `snapshot`, by default from now; paused, with a life of its own.

        It shares memory copy-on-write. Built-in devices are made anew with the same state; `attach(machine)` has to
        put the caller's own devices on it, at the same addresses. Its console starts empty.
        """
        from pykvm.snapshot.apply import fork

        return fork(self, snapshot, attach)  # type: ignore[type-var]
