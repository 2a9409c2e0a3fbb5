"""The machine's methods that save, copy and restore it. Layer: core.

All of it is in `pykvm.snapshot`, loaded when used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from pykvm.snapshot.apply import Checked
    from pykvm.snapshot.state import Snapshot


class Snapshots:
    """Mixed into Machine."""

    checked: Checked | None = None  # the snapshot that was restored last fits: pykvm.snapshot.apply

    def snapshot(self) -> Snapshot:
        """The machine as it is now: memory, vCPUs, interrupt controllers, clock, devices. It goes on as it was.

        Writable disks take part when they have an overlay. What the devices are connected to on the host does not.
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

    def save(
        self,
        path: str,
        *,
        snapshot: Snapshot | None = None,
        parent: Snapshot | None = None,
        compress: bool = False,
    ) -> Snapshot:
        """Write a snapshot file (its format: pykvm.snapshot.format): of now, or an earlier `snapshot` of this machine.

        An existing file is replaced at the end, whole. With `parent`, a Snapshot that `save` returned, only the pages
        that are not as there are written. `compress` makes it small (zstd); restoring it then has to unpack all memory
        first. What was written to disks with an overlay is in the file, their images and other disks are not: restoring
        wants those unchanged, so pause a machine with other writable disks before, and close it after.
        `pykvm.restore_file(path)` makes a machine of it. Raises SnapshotError.
        """
        from pykvm.snapshot.save import save

        return save(self, path, snapshot, parent, compress)  # type: ignore[arg-type]

    def describe_board(self) -> tuple[str, dict[str, object]]:
        """(kind of machine, what beside its MachineConfig it was made of), for a snapshot file."""
        return "machine", {}

    def fork(self, snapshot: Snapshot | None = None, *, attach: Callable[[Self], object] | None = None) -> Self:
        """A new machine that goes on from `snapshot`, by default from now; paused, with a life of its own.

        It shares memory copy-on-write. Built-in devices are made anew with the same state; `attach(machine)` has to
        put the caller's own devices on it, at the same addresses, and can plug in its networks (`Net.plug`): it is
        connected to nothing on the host. Its console starts empty. When it is closed, the next fork of the same
        `snapshot` may use its KVM VM again (core.spare), which makes that several times faster.
        """
        from pykvm.snapshot.apply import fork

        return fork(self, snapshot, attach)  # type: ignore[type-var]
