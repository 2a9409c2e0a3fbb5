"""A small option parser. Layer: cli.

`pykvm start` is run for guests that live a few milliseconds; importing argparse would cost it as much as the guest
itself. One table of Options serves parsing, errors and help.
"""

from __future__ import annotations

from pykvm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


class Option:
    """One option. `metavar` "" makes it a flag, "[=SPEC]" a flag that may have a value; `many` collects a list;
    `convert` may raise UsageError."""

    __slots__ = ("convert", "default", "help", "many", "metavar", "name")

    def __init__(
        self,
        name: str,
        metavar: str,
        text: str,
        *,
        default: Any = None,
        convert: Callable[[str], Any] = str,
        many: bool = False,
    ) -> None:
        self.name = name
        self.metavar = metavar
        self.help = text
        self.default = default
        self.convert = convert
        self.many = many

    @property
    def key(self) -> str:
        """The attribute name: --load-addr is load_addr."""
        return self.name.removeprefix("--").replace("-", "_")


class HelpWanted(Exception):
    """--help was given; the text is its argument."""


class Parser:
    """Options in any order, `--name value` or `--name=value`, `--` ends them; the rest are positional."""

    def __init__(
        self, usage: str, summary: str, options: Sequence[Option], *, positionals: int, epilog: str = ""
    ) -> None:
        self.usage = usage
        self.summary = summary
        self.options = {option.name: option for option in options}
        self.positionals = positionals
        self.epilog = epilog

    def parse(self, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """(values by key, positional arguments). Raises UsageError, HelpWanted."""
        values: dict[str, Any] = {o.key: [] if o.many else o.default for o in self.options.values()}
        rest: list[str] = []
        queue = list(reversed(arguments))
        while queue:
            word = queue.pop()
            if word == "--":
                rest += reversed(queue)
                break
            if not word.startswith("--"):
                if word.startswith("-") and len(word) > 1:
                    if word == "-h":
                        raise HelpWanted(self.help())
                    raise UsageError(f"unknown option {word}; see --help")
                rest.append(word)
                continue
            self._take(word, queue, values)
        if len(rest) > self.positionals:
            raise UsageError(f"unexpected argument {rest[self.positionals]!r}; usage: {self.usage}")
        return values, rest

    def _take(self, word: str, queue: list[str], values: dict[str, Any]) -> None:
        if word == "--help":
            raise HelpWanted(self.help())
        name, equals, text = word.partition("=")
        option = self.options.get(name)
        if option is None:
            raise UsageError(f"unknown option {name}{self._near(name)}; see --help")
        if equals and not option.metavar:
            raise UsageError(f"{name} takes no value")
        if not equals and (not option.metavar or option.metavar.startswith("[")):
            values[option.key] = True
            return
        if not equals:
            if not queue:
                raise UsageError(f"{name} needs a value: {name} {option.metavar}")
            text = queue.pop()
        value = option.convert(text)
        if option.many:
            values[option.key].append(value)
        else:
            values[option.key] = value

    def _near(self, name: str) -> str:
        from difflib import get_close_matches

        near = get_close_matches(name, self.options, 1)
        return f" (did you mean {near[0]}?)" if near else ""

    def help(self) -> str:
        """The --help text."""
        left = {name: f"{name} {o.metavar}".rstrip().replace(" [", "[") for name, o in self.options.items()}
        width = max(map(len, left.values())) + 2
        lines = [f"usage: {self.usage}", "", self.summary, "", "options:"]
        lines += [f"  {left[name]:{width}}{option.help}" for name, option in self.options.items()]
        lines.append(f"  {'--help':{width}}this text")
        return "\n".join(lines) + (f"\n\n{self.epilog}" if self.epilog else "")
