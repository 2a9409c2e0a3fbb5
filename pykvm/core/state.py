"""Typed, versioned state: what a component of a machine saves of itself. Layer: core.

A component declares a Shape: its version, and the kind of each field. A field `x` is the object's attribute `_x`;
`Shape.take` reads them, `Shape.put` stores them, and `Shape.check` refuses what does not fit, before anything is
stored: saved state may come from a file that anybody wrote.
"""

from __future__ import annotations

from pykvm.errors import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    Value = Any  # int, bool, str, bytes and lists of them: what the Shape says
    State = dict[str, Value]


class Kind:
    """What a field may hold. `what` says so in messages."""

    def __init__(self, what: str) -> None:
        self.what = what

    def accepts(self, value: object) -> bool:
        """Whether `value`, which may be anything, is of this kind."""
        raise NotImplementedError

    def take(self, value: Any) -> Value:
        """The attribute's value as plain data that nothing else refers to."""
        return value

    def put(self, owner: object, attribute: str, value: Value) -> None:
        """Store checked data."""
        setattr(owner, attribute, value)


class Int(Kind):
    """An integer of low <= value <= high."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__(f"an integer from {low:#x} to {high:#x}")
        self.low, self.high = low, high

    def accepts(self, value: object) -> bool:
        """An int in the range; a bool is none."""
        return type(value) is int and self.low <= value <= self.high


class Bool(Kind):
    """True or false."""

    def __init__(self) -> None:
        super().__init__("true or false")

    def accepts(self, value: object) -> bool:
        """A bool."""
        return type(value) is bool


class Line(Bool):
    """The level of an IrqLine. Restoring it drives nothing: the interrupt controller is restored as well."""

    def take(self, value: Any) -> Value:
        """The line's level."""
        return bool(value.level)

    def put(self, owner: object, attribute: str, value: Value) -> None:
        """The level, as if it had been driven before."""
        getattr(owner, attribute).level = value


class Bytes(Kind):
    """Bytes; a bytearray gets them in place."""

    def __init__(self, low: int, high: int | None = None) -> None:
        self.low, self.high = low, low if high is None else high
        super().__init__(f"{self.low} to {self.high} bytes")

    def accepts(self, value: object) -> bool:
        """Bytes of a length in the range."""
        return type(value) is bytes and self.low <= len(value) <= self.high

    def take(self, value: Any) -> Value:
        """A copy."""
        return bytes(value)

    def put(self, owner: object, attribute: str, value: Value) -> None:
        """Fill the bytearray, or replace the bytes."""
        target = getattr(owner, attribute)
        if isinstance(target, bytearray):
            target[:] = value
        else:
            setattr(owner, attribute, value)


class ListOf(Kind):
    """A list of so many elements of one kind."""

    def __init__(self, element: Kind, low: int, high: int) -> None:
        super().__init__(f"a list of {low} to {high}, each {element.what}")
        self.element, self.low, self.high = element, low, high

    def accepts(self, value: object) -> bool:
        """A list whose elements are all accepted."""
        return type(value) is list and self.low <= len(value) <= self.high and all(map(self.element.accepts, value))

    def take(self, value: Any) -> Value:
        """A copy."""
        return [self.element.take(each) for each in value]

    def put(self, owner: object, attribute: str, value: Value) -> None:
        """A copy, too: the saved state may be restored again."""
        setattr(owner, attribute, list(value))


class Text(Kind):
    """A string of printable characters, in one line."""

    def __init__(self, longest: int) -> None:
        super().__init__(f"text of up to {longest} characters")
        self.longest = longest

    def accepts(self, value: object) -> bool:
        """A str that is short enough."""
        return type(value) is str and len(value) <= self.longest and value.isprintable()


class Row(Kind):
    """A list of fixed length, each place of its own kind."""

    def __init__(self, *elements: Kind) -> None:
        super().__init__(f"a row of {', '.join(each.what for each in elements)}")
        self.elements = elements

    def accepts(self, value: object) -> bool:
        """A list of these kinds."""
        return (
            type(value) is list
            and len(value) == len(self.elements)
            and all(kind.accepts(each) for kind, each in zip(self.elements, value, strict=True))
        )


U8, U16, U32, U64 = (Int(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
S64 = Int(-(1 << 63), (1 << 63) - 1)
BOOL, LINE = Bool(), Line()


class Shape:
    """The version of a component's state and its fields."""

    def __init__(self, version: int, **fields: Kind) -> None:
        self.version = version
        self.fields = fields
        # a reset of a machine stores them all: the plain ones without a detour
        self._rows = [(n, f"_{n}", None if type(kind).put is Kind.put else kind) for n, kind in fields.items()]

    def check(self, component: str, version: object, state: Mapping[str, object]) -> None:
        """Raise SnapshotError unless `state`, saved as `version`, is exactly of this shape."""
        if version != self.version:
            raise SnapshotError(f"{component}: its state has version {version!r}; this pykvm reads {self.version}")
        if state.keys() != self.fields.keys():
            odd = sorted(state.keys() ^ self.fields.keys())
            raise SnapshotError(f"{component}: fields {', '.join(odd)[:100]} are missing or unknown")
        for name, kind in self.fields.items():
            if not kind.accepts(state[name]):
                raise SnapshotError(f"{component}: field {name} is not {kind.what}")

    def take(self, owner: object) -> State:
        """The fields' values, read from `owner`'s attributes."""
        return {name: kind.take(getattr(owner, f"_{name}")) for name, kind in self.fields.items()}

    def put(self, owner: object, state: State) -> None:
        """Store checked state into `owner`'s attributes."""
        for name, attribute, kind in self._rows:
            if kind is None:
                setattr(owner, attribute, state[name])
            else:
                kind.put(owner, attribute, state[name])


STATELESS = Shape(1)
