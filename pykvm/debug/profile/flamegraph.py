"""A flame graph as an SVG that needs nothing but a browser. Layer: debug, plain data.

Each box is a function, as wide as its share of the samples, above the one that called it. A tooltip names it; a click
zooms in, one on the lowest box out again. After Brendan Gregg, "The Flame Graph", ACM Queue 14(2), 2016.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

WIDTH = 1200
ROW = 18
TOP = 34
CHARACTER = 7.2  # px of one in the 12 px monospaced font
LEAST = 0.1  # px: narrower boxes are left out
SCRIPT = """
var boxes = document.querySelectorAll('g.f'), width = %d;
function zoom(event) {
  var me = event.currentTarget.dataset, from = +me.x, share = +me.w;
  boxes.forEach(function (box) {
    var d = box.dataset, x = (d.x - from) / share, w = d.w / share, inside = x > -1e-6 && x + w < 1 + 1e-6;
    var below = +d.x <= from + 1e-9 && +d.x + +d.w >= from + share - 1e-9 && +d.d < +me.d;
    box.style.display = inside || below ? '' : 'none';
    if (below) { x = 0; w = 1; }
    var rect = box.querySelector('rect'), text = box.querySelector('text'), n = Math.floor(w * width / %s) - 1;
    rect.setAttribute('x', x * width); rect.setAttribute('width', Math.max(w * width - 0.5, 0.1));
    text.setAttribute('x', x * width + 3);
    text.textContent = n < 3 ? '' : d.n.length > n ? d.n.slice(0, n - 1) + '\\u2026' : d.n;
  });
}
boxes.forEach(function (box) { box.addEventListener('click', zoom); });
"""


class Node:
    """A function at one place of the call tree."""

    __slots__ = ("callees", "count")

    def __init__(self) -> None:
        self.count = 0
        self.callees: dict[str, Node] = {}


def tree(stacks: Mapping[tuple[str, ...], int]) -> Node:
    """The call tree of stacks (outermost first) with their counts."""
    root = Node()
    for stack, count in stacks.items():
        node = root
        node.count += count
        for name in stack:
            node = node.callees.setdefault(name, Node())
            node.count += count
    return root


def render(stacks: Mapping[tuple[str, ...], int], title: str) -> str:
    """The SVG document."""
    root = tree(stacks)
    boxes = list(_boxes("all", root, 0.0, 0, root.count)) if root.count else []
    depth = max((level for _, _, _, level, _ in boxes), default=0)
    height = TOP + (depth + 1) * ROW + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="monospace" font-size="12">',
        '<rect width="100%" height="100%" fill="#fffdf5"/>',
        f'<text x="{WIDTH / 2}" y="22" text-anchor="middle" font-size="16">{_safe(title)}</text>',
    ]
    lines += [_box(*box, root.count, height - 10 - ROW) for box in boxes]
    script = SCRIPT % (WIDTH, CHARACTER)
    return "\n".join([*lines, f"<script><![CDATA[{script}]]></script>", "</svg>", ""])


def _boxes(name: str, node: Node, start: float, level: int, total: int) -> Iterator[tuple[str, float, float, int, int]]:
    """(name, left, width, level, samples) of a function and those above it; left and width as shares of all."""
    share = node.count / total
    if share * WIDTH < LEAST:
        return
    yield name, start, share, level, node.count
    for callee, child in sorted(node.callees.items()):
        yield from _boxes(callee, child, start, level + 1, total)
        start += child.count / total


def _box(name: str, start: float, share: float, level: int, count: int, total: int, bottom: int) -> str:
    x, width, y = start * WIDTH, max(share * WIDTH - 0.5, LEAST), bottom - level * ROW
    room = int(share * WIDTH / CHARACTER) - 1
    shown = "" if room < 3 else name if len(name) <= room else f"{name[: room - 1]}\u2026"
    tip = f"{name}: {count} samples, {count / total:.1%}"
    return (
        f'<g class="f" data-x="{start:.9f}" data-w="{share:.9f}" data-d="{level}" data-n="{_safe(name)}">'
        f"<title>{_safe(tip)}</title>"
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 1}" rx="2" fill="{_colour(name)}"/>'
        f'<text x="{x + 3:.2f}" y="{y + 13}">{_safe(shown)}</text></g>'
    )


def _safe(text: str) -> str:
    """For XML; a symbol's name may hold anything."""
    return escape("".join(each if each.isprintable() else "?" for each in text))


def _colour(name: str) -> str:
    """The same warm colour for the same function everywhere; markers are grey."""
    if name.startswith("("):
        return "#d0d0d0"
    hashed = crc32(name.encode())
    return f"rgb({205 + hashed % 50},{80 + (hashed >> 8) % 130},{(hashed >> 16) % 60})"
