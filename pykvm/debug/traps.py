"""Software breakpoints in guest memory: planting them, and hiding them from whoever reads. Layer: debug."""

from __future__ import annotations

import threading

from pykvm.errors import DebugUnsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.core.memory import GuestMemory
    from pykvm.debug.breakpoints import Breakpoint
    from pykvm.debug.hostdebug import Trap

PAGE_SIZE = 4096


class Site:
    """One planted instruction: its GPA, the guest's own bytes under it, whose breakpoints it serves."""

    __slots__ = ("code", "gpa", "owners", "saved")

    def __init__(self, gpa: int, code: bytes, saved: bytes) -> None:
        self.gpa = gpa
        self.code = code
        self.saved = saved
        self.owners: list[Breakpoint] = []


class Traps:
    """All software breakpoints of a machine, by GPA. Any thread may call; the guest may run."""

    def __init__(self, memory: GuestMemory, trap: Trap) -> None:
        self._memory = memory
        self._code = trap.code
        self._size = len(trap.code)
        self._sites: dict[int, Site] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._sites)

    def at(self, gpa: int) -> Site | None:
        """The site whose trap starts at `gpa`."""
        return self._sites.get(gpa)

    def add(self, gpa: int, owner: Breakpoint, trap: Trap | None = None) -> None:
        """Plant a trap (another one of the same length, if given), unless there is one.

        Raises GuestAddressError; DebugUnsupported too close to another one.
        """
        with self._lock:
            site = self._sites.get(gpa)
            if site is None:
                self._check_room(gpa)
                site = Site(gpa, self._code if trap is None else trap.code, self._memory.read(gpa, self._size))
                self._sites[gpa] = site
                self._memory.write(gpa, site.code)
            site.owners.append(owner)

    def _check_room(self, gpa: int) -> None:
        size = self._size
        near = any(other in self._sites for other in range(gpa - size + 1, gpa + size))
        if near or gpa % PAGE_SIZE + size > PAGE_SIZE:
            raise DebugUnsupported(
                f"this KVM's breakpoints are {size} bytes long: no room at {gpa:#x}, take a hardware breakpoint"
            )

    def remove(self, gpa: int, owner: Breakpoint) -> None:
        """Take the trap out when nobody else wants it. Bytes that the guest has changed since stay the guest's."""
        with self._lock:
            site = self._sites.get(gpa)
            if site is None or owner not in site.owners:
                return
            site.owners.remove(owner)
            if not site.owners:
                self.lift(site)
                del self._sites[gpa]

    def lift(self, site: Site) -> None:
        """Let the guest's own instruction be there for a moment."""
        with self._lock:
            if self._is_planted(site):
                self._memory.write(site.gpa, site.saved)

    def plant(self, site: Site) -> None:
        """Undo `lift`, unless the site has been removed since."""
        with self._lock:
            if self._sites.get(site.gpa) is site:
                self._save_and_plant(site)

    def _save_and_plant(self, site: Site) -> None:
        if not self._is_planted(site):
            site.saved = self._memory.read(site.gpa, self._size)
            self._memory.write(site.gpa, site.code)

    def _is_planted(self, site: Site) -> bool:
        return self._memory.read(site.gpa, self._size) == site.code

    def lift_all(self) -> None:
        """Make guest memory what the guest thinks it is (for a snapshot of it); vCPUs are paused until `plant_all`."""
        with self._lock:
            for site in self._sites.values():
                self.lift(site)

    def plant_all(self) -> None:
        """Plant again what was lifted, or overwritten by a loader."""
        with self._lock:
            for site in self._sites.values():
                self._save_and_plant(site)

    # -- memory as the guest thinks it is -----------------------------------------------------------------------

    def read(self, gpa: int, length: int) -> bytes:
        """Guest memory without the traps. Raises GuestAddressError."""
        with self._lock:
            data = bytearray(self._memory.read(gpa, length))
            for site, at, part in self._overlaps(gpa, length):
                if self._is_planted(site):
                    data[at : at + len(part)] = site.saved[part.start : part.stop]
            return bytes(data)

    def write(self, gpa: int, data: bytes) -> None:
        """Change guest memory under the traps, which stay. Raises GuestAddressError."""
        with self._lock:
            planted = bytearray(data)
            touched = list(self._overlaps(gpa, len(data)))
            self._memory.read(gpa, len(data))  # all of it exists, or nothing is changed
            for site, at, part in touched:
                saved = bytearray(site.saved)
                saved[part.start : part.stop] = data[at : at + len(part)]
                site.saved = bytes(saved)
                planted[at : at + len(part)] = site.code[part.start : part.stop]
            self._memory.write(gpa, planted)

    def _overlaps(self, gpa: int, length: int) -> Iterator[tuple[Site, int, range]]:
        """(site, offset in [gpa, gpa + length), range of the trap's bytes that lie there)."""
        first = gpa - self._size + 1
        if length < len(self._sites):
            near = [self._sites[at] for at in range(first, gpa + length) if at in self._sites]
        else:
            near = list(self._sites.values())
        for site in near:
            start, stop = max(gpa, site.gpa), min(gpa + length, site.gpa + self._size)
            if start < stop:
                yield site, start - gpa, range(start - site.gpa, stop - site.gpa)
