"""Guest physical memory: slots, their backing, and every bounds check on a GPA. Layer: core.

`GuestMemory` owns the host mappings and knows nothing of KVM; the machine registers each slot with
KVM_SET_USER_MEMORY_REGION. Pages are allocated by the kernel when first touched (MAP_NORESERVE), so a machine of
512 MiB costs no RSS until its guest uses it.

Source: KVM API documentation, 4.35 KVM_SET_USER_MEMORY_REGION.
"""

from __future__ import annotations

import mmap
import os

from pykvm._native import ffi, lib
from pykvm.errors import ConfigError, GuestAddressError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pykvm._native import CData
    from pykvm.core.filememory import FileGuard
    from pykvm.core.memimage import SlotImage

PAGE_SIZE = 4096
HUGE_PAGE_SIZE = 2 << 20


class Slot:
    """One memslot: [gpa, gpa + size) of the guest backed by host memory at `hva`.

    `map` may be larger, for `hva` to be at a huge page where `gpa` is at one: KVM maps huge pages only then.
    """

    __slots__ = (
        "copied", "dirty", "fd", "fd_offset", "file_fd", "gpa", "guard", "hva", "image", "index", "map", "name",
        "readonly", "size", "skew", "view",
    )  # fmt: skip

    def __init__(self, index: int, gpa: int, size: int, backing: mmap.mmap, name: str, readonly: bool, fd: int) -> None:
        self.index = index
        self.gpa = gpa
        self.size = size
        self.map = backing
        self.name = name
        self.readonly = readonly
        self.fd = fd
        self.fd_offset = 0
        self.image: SlotImage | None = None  # what is mapped here copy-on-write (core.memimage)
        self.file_fd = -1  # the host's file that is mapped here, shared
        self.guard: FileGuard | None = None  # over files of the host that are mapped here in either way
        self.copied = False  # other processes have mapped it: snapshots are copies (core.memshared)
        self.dirty: CData = ffi.NULL  # uint64_t[], a bit for each page that devices in C wrote; see publish()
        start = int(ffi.cast("uintptr_t", ffi.from_buffer(backing)))
        self.skew = min((gpa - start) % HUGE_PAGE_SIZE, len(backing) - size)  # where the slot begins in `map`
        self.view = memoryview(backing)[self.skew : self.skew + size]
        self.hva = start + self.skew

    @property
    def end(self) -> int:
        """First GPA past the slot."""
        return self.gpa + self.size

    @property
    def shared_fd(self) -> int:
        """What another process maps to have this memory, from `fd_offset` on; -1 for nothing."""
        return self.file_fd if self.file_fd >= 0 and not self.readonly else self.fd

    def advise(self, advice: int, offset: int, length: int) -> None:
        """madvise(2) for [offset, offset + length) of the slot. Raises OSError."""
        self.map.madvise(advice, self.skew + offset, length)

    def close_fd(self) -> None:
        """Close the memfd of a slot whose memory is mapped anew."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def abandon(self) -> bool:
        """Release `view`; whether nobody has another view, which would see what the memory is used for next."""
        try:
            self.view.release()
            self.map.resize(-1)  # no size at all, but views are looked for first
        except BufferError:
            return False
        except ValueError:
            return True
        return False

    def __repr__(self) -> str:
        ro = " ro" if self.readonly else ""
        return f"<Slot {self.index} {self.name} [{self.gpa:#x}, {self.end:#x}){ro}>"


class GuestMemory:
    """The guest's physical memory. Addresses are GPAs; sizes are bytes.

    >>> memory.write(0x7c00, code); memory.read(0x7c00, 4); memory[0x7c00:0x7c04]; memory.read_u32(0x500)

    Every accessor raises GuestAddressError when any byte lies outside the slots, and then nothing was changed.
    The host may write slots that are read-only to the guest (firmware).
    """

    def __init__(self, *, memfd: bool = False, hugepages: bool = False, shared: bool = False) -> None:
        self.memfd = memfd
        self.shared = shared
        self.hugepages = hugepages
        self.slots: list[Slot] = []
        self._native: CData | None = None
        self._published: list[CData] = []

    # -- making slots -------------------------------------------------------------------------------------------

    def add(self, gpa: int, size: int, *, name: str = "ram", readonly: bool = False, frozen: bool = False) -> Slot:
        """Map `size` bytes of zeroed memory at `gpa`; both are page-aligned and overlap no other slot.

        `frozen`: an image will be installed over it (add_image), no memfd of its own is needed, unless it is shared.
        """
        if gpa % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
            raise ConfigError("memory", f"slot {name} [{gpa:#x}, +{size:#x}) is not page-aligned")
        for other in self.slots:
            if gpa < other.end and other.gpa < gpa + size:
                raise ConfigError("memory", f"slot {name} [{gpa:#x}, {gpa + size:#x}) overlaps {other}")
        fd = -1
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | lib.MAP_NORESERVE
        shared = self.memfd and not (frozen and not self.shared)
        huge = shared and self.hugepages and size % HUGE_PAGE_SIZE == 0  # a firmware's few pages are not
        try:
            if shared:
                fd = os.memfd_create(f"pykvm-{name}", os.MFD_CLOEXEC | (os.MFD_HUGETLB if huge else 0))
                os.ftruncate(fd, size)
                # hugetlbfs pages are reserved: one that is missing at its first access would be SIGBUS
                flags = mmap.MAP_SHARED | (0 if huge else lib.MAP_NORESERVE)
            spare = HUGE_PAGE_SIZE if fd < 0 and size >= HUGE_PAGE_SIZE else 0
            backing = mmap.mmap(fd, size + spare, flags)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            what = f"{size >> 20} MiB {'in huge pages ' if huge else ''}for {name}: {error.strerror}"
            advice = f": sudo sysctl vm.nr_hugepages={size // HUGE_PAGE_SIZE}, or more" if huge else ""
            raise ConfigError("memory", f"cannot map {what}{advice}") from error
        index = max((slot.index for slot in self.slots), default=-1) + 1
        slot = Slot(index, gpa, size, backing, name, readonly, fd)
        slot.copied = self.shared and fd >= 0
        if self.hugepages and not self.memfd:
            slot.advise(mmap.MADV_HUGEPAGE, 0, size)
        self.slots.append(slot)
        self.slots.sort(key=lambda each: each.gpa)
        self.publish()
        return slot

    def add_image(self, image: SlotImage) -> Slot:
        """A slot whose content is `image`, shared copy-on-write where that can be."""
        from pykvm.core.memimage import install

        slot = self.add(image.gpa, image.size, name=image.name, readonly=image.readonly, frozen=True)
        install(slot, image)
        return slot

    def give(self) -> list[Slot]:
        """Every slot, not this object's any more (abandoned before): for another one's `adopt`."""
        slots, self.slots = self.slots, []
        return slots

    def adopt(self, slots: list[Slot]) -> None:
        """Have these slots of an object that is of no use any more."""
        for old in slots:
            slot = Slot(old.index, old.gpa, old.size, old.map, old.name, old.readonly, -1)
            slot.image, slot.guard = old.image, old.guard
            self.slots.append(slot)
        self.publish()

    def remove(self, slot: Slot) -> None:
        """Unmap a slot that KVM no longer knows."""
        self.slots.remove(slot)
        self.publish()
        release(slot)

    def close(self) -> None:
        """Unmap everything. A view that a caller still holds keeps its own slot mapped until it is dropped."""
        for slot in self.slots:
            release(slot)
        self.slots.clear()

    def damage(self, *, seen: bool = False) -> str:
        """After an access that failed: what is wrong with the files that are mapped as memory; "" if there are none.

        With `seen` only what can be seen of it: a file that was cut short.
        """
        found = [why for slot in self.slots if slot.guard is not None and (why := slot.guard.damage(seen=seen))]
        return min(found, key=lambda each: "was cut" not in each, default="")

    # -- for C --------------------------------------------------------------------------------------------------

    @property
    def native(self) -> CData:
        """The slots as C sees them: a struct pk_memory * (native/guestmem.h) that lives as long as this object."""
        if self._native is None:
            self._native = ffi.new("struct pk_memory *")
            self.publish()
        return self._native

    def publish(self) -> None:
        """Tell C what changed in `slots` (also a bitmap in `Slot.dirty`): a new table, swapped whole."""
        if self._native is None:
            return
        entries = [
            (slot.gpa, slot.size, ffi.cast("uint8_t *", slot.hva), slot.dirty, slot.readonly) for slot in self.slots
        ]
        slots = ffi.new("struct pk_slot[]", entries)
        table = ffi.new("struct pk_slots *", (len(entries), slots))
        self._published += [slots, table]  # C may be inside an older one
        self._native.slots = table

    # -- finding ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes in all slots together."""
        return sum(slot.size for slot in self.slots)

    def slot_at(self, gpa: int) -> Slot | None:
        """The slot that holds `gpa`, or None."""
        for slot in self.slots:
            if slot.gpa <= gpa < slot.end:
                return slot
        return None

    def contains(self, gpa: int, length: int = 1) -> bool:
        """Whether every byte of [gpa, gpa + length) is guest memory."""
        try:
            for _ in self._pieces(gpa, length):
                pass
        except GuestAddressError:
            return False
        return True

    def _pieces(self, gpa: int, length: int) -> Iterator[tuple[Slot, int, int]]:
        """(slot, offset, length) of each slot's part of [gpa, gpa + length). The one place that checks bounds."""
        if gpa < 0 or length < 0:
            raise GuestAddressError(gpa, length, "is not an address range")
        at, left = gpa, length
        while left:
            slot = self.slot_at(at)
            if slot is None:
                raise GuestAddressError(gpa, length)
            part = min(left, slot.end - at)
            yield slot, at - slot.gpa, part
            at += part
            left -= part

    # -- access -------------------------------------------------------------------------------------------------

    def view(self, gpa: int, length: int) -> memoryview:
        """A writable view straight into guest memory; the range must lie in one slot. Release it before close()."""
        slot = self.slot_at(gpa)
        if slot is None or length < 0 or gpa + length > slot.end:
            raise GuestAddressError(gpa, length, "is not inside one memory slot")
        offset = gpa - slot.gpa
        return slot.view[offset : offset + length]

    def views(self, gpa: int, length: int, *, write: bool = True) -> list[memoryview]:
        """Views of [gpa, gpa + length), one for each slot that holds a part of it, for devices that move data.

        With `write` every part must lie in a slot that the guest may write, too.
        """
        found = []
        for slot, at, part in self._pieces(gpa, length):
            if write and slot.readonly:
                raise GuestAddressError(gpa, length, "is read-only")
            found.append(slot.view[at : at + part])
        return found

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of [gpa, gpa + length)."""
        pieces = list(self._pieces(gpa, length))
        return b"".join(bytes(slot.view[at : at + part]) for slot, at, part in pieces)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `gpa`."""
        source = memoryview(data).cast("B")
        pieces = list(self._pieces(gpa, len(source)))
        done = 0
        for slot, at, part in pieces:
            slot.view[at : at + part] = source[done : done + part]
            done += part

    def fill(self, gpa: int, length: int, byte: int = 0) -> None:
        """Set [gpa, gpa + length) to `byte`, a mebibyte at a time."""
        pieces = list(self._pieces(gpa, length))
        block = bytes([byte]) * min(length, 1 << 20)
        for slot, at, part in pieces:
            for start in range(at, at + part, len(block)):
                step = min(len(block), at + part - start)
                slot.view[start : start + step] = block[:step]

    def discard(self, ranges: Iterable[tuple[int, int]], *, zeroed: bool = True) -> int:
        """Give the host pages of these (GPA, length), which read as zeros afterwards, back to the host.

        All are page-aligned. The bytes that were given back: not those of slots whose memory cannot be given back in
        such pieces (huge pages of hugetlbfs, a file of the host), or would show a snapshot's content again
        (copy-on-write of a frozen image); with `zeroed=False` it may.
        """
        removed: list[tuple[int, int]] = []
        dropped: list[tuple[int, int]] = []
        for gpa, length in ranges:
            if (gpa | length) % PAGE_SIZE:
                raise GuestAddressError(gpa, length, "is not page-aligned")
            for slot, at, part in self._pieces(gpa, length):
                if slot.readonly:
                    raise GuestAddressError(gpa, length, "is read-only")
                if slot.file_fd < 0 and not (zeroed and slot.image is not None):
                    # shared memory keeps its pages in the file until they are removed from there
                    (removed if slot.fd >= 0 else dropped).append((slot.hva + at, slot.hva + at + part))
        done = 0
        for spans, advice in ((removed, mmap.MADV_REMOVE), (dropped, mmap.MADV_DONTNEED)):
            result = lib.pk_advise(ffi.new("struct pk_range[]", spans), len(spans), advice)
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            done += result
        return done

    def gpa_of(self, view: memoryview) -> int:
        """The GPA of the first byte of a view of guest memory."""
        hva = int(ffi.cast("uintptr_t", ffi.from_buffer(view)))
        for slot in self.slots:
            if slot.hva <= hva < slot.hva + slot.size:
                return slot.gpa + hva - slot.hva
        raise ValueError("the view is not of guest memory")

    def read_uint(self, gpa: int, size: int) -> int:
        """A little-endian unsigned integer of `size` bytes."""
        return int.from_bytes(self.read(gpa, size), "little")

    def write_uint(self, gpa: int, size: int, value: int) -> None:
        """Store a little-endian unsigned integer of `size` bytes."""
        self.write(gpa, value.to_bytes(size, "little"))

    def read_u8(self, gpa: int) -> int:
        """The byte at `gpa`."""
        return self.read_uint(gpa, 1)

    def read_u16(self, gpa: int) -> int:
        """The 16-bit little-endian value at `gpa`."""
        return self.read_uint(gpa, 2)

    def read_u32(self, gpa: int) -> int:
        """The 32-bit little-endian value at `gpa`."""
        return self.read_uint(gpa, 4)

    def read_u64(self, gpa: int) -> int:
        """The 64-bit little-endian value at `gpa`."""
        return self.read_uint(gpa, 8)

    def read_cstring(self, gpa: int, limit: int = 4096) -> bytes:
        """The bytes at `gpa` up to a NUL (not included), `limit` bytes or the end of memory."""
        parts = bytearray()
        while len(parts) < limit and (slot := self.slot_at(gpa + len(parts))) is not None:
            at = gpa + len(parts) - slot.gpa
            piece = bytes(slot.view[at : min(at + 256, slot.size, at + limit - len(parts))])
            end = piece.find(0)
            if end >= 0:
                return bytes(parts + piece[:end])
            parts += piece
        return bytes(parts)

    def __getitem__(self, key: int | slice) -> int | bytes:
        if isinstance(key, slice):
            start, length = _span(key)
            return self.read(start, length)
        return self.read_u8(key)

    def __setitem__(self, key: int | slice, value: int | bytes | bytearray | memoryview) -> None:
        if isinstance(key, int):
            if not isinstance(value, int):
                raise TypeError("one byte of guest memory takes an int")
            self.write(key, bytes([value]))
            return
        if isinstance(value, int):
            raise TypeError("a range of guest memory takes bytes")
        start, length = _span(key)
        if len(value) != length:
            raise ValueError(f"{length} bytes of guest memory cannot take {len(value)} bytes")
        self.write(start, value)


def _span(key: slice) -> tuple[int, int]:
    if key.start is None or key.stop is None or key.step not in (None, 1):
        raise ValueError("guest memory slices need a start and a stop, and no step")
    return key.start, key.stop - key.start


def release(slot: Slot) -> None:
    """Unmap a slot, and close what belongs to it."""
    if slot.guard is not None:
        slot.guard.release()
    try:
        slot.view.release()
        slot.map.close()
    except BufferError:
        pass  # a caller holds a view: the mapping goes with the last one
    slot.close_fd()
    slot.image = None
