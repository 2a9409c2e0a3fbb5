"""What a benchmark found, as a table for people and as data for programs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.measure import Candidate, Series


@dataclass
class Aim:
    """A figure that the project aims at, beside the measured one. It is no pass or fail."""

    text: str
    measured: Series
    unit: str = ""


@dataclass
class Comparison:
    """One benchmark's result: for each candidate the series of each quantity, the first quantity the main one.

    references   candidates to whose series the others are compared, round by round
    notes        what differs between the compared things, and how to read the figures
    """

    name: str
    title: str
    rounds: int
    candidates: Sequence[Candidate]
    units: dict[str, str]
    series: dict[str, dict[str, Series]]
    references: Sequence[str] = ()
    aims: Sequence[Aim] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def main(self) -> str:
        """The quantity that is compared."""
        return next(iter(self.units))

    def ratios(self, name: str) -> dict[str, Series]:
        """The candidate's main quantity over that of each reference that was measured."""
        mine = self.series[name][self.main]
        return {other: mine.over(self.series[other][self.main]) for other in self.references if other in self.series}

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return {
            "benchmark": self.name,
            "title": self.title,
            "rounds": self.rounds,
            "units": self.units,
            "candidates": {
                candidate.name: {
                    "command": candidate.command,
                    "environment": dict(candidate.environment),
                    **{key: series.as_dict() for key, series in self.series[candidate.name].items()},
                    "ratio_to": {key: series.as_dict() for key, series in self.ratios(candidate.name).items()},
                }
                for candidate in self.candidates
            },
            "aims": [{"aim": aim.text, "unit": aim.unit, "measured": aim.measured.as_dict()} for aim in self.aims],
            "skipped": self.skipped,
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """The table."""
        lines = [f"== {self.name}: {self.title}; {self.rounds} rounds", ""]
        lines += _commands(self.candidates)
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()]
        lines += ["", *_align(self._rows())]
        if self.aims:
            lines += ["", "aims (median and quartiles of the rounds; nothing passes or fails)"]
            lines += [f"  {aim.text}: {_spread(aim.measured)} {aim.unit}".rstrip() for aim in self.aims]
        return "\n".join([*lines, "", *(f"  - {note}" for note in self.notes)])

    def _rows(self) -> list[list[str]]:
        first, *others = self.units
        present = [name for name in self.references if name in self.series]
        heads = ["median", "quartiles", "min", "max"]
        names = {key: f"{key}, {unit}" if unit else key for key, unit in self.units.items()}
        rows = [[names[first], *heads, *(names[key] for key in others), *(f"x {name}" for name in present)]]
        for candidate in self.candidates:
            kinds = self.series[candidate.name]
            row = [candidate.name, _figure(kinds[first].median), "-".join(map(_figure, kinds[first].quartiles))]
            row += map(_figure, kinds[first].extremes)
            row += [_figure(kinds[key].median) if key in kinds else "" for key in others]
            ratios = self.ratios(candidate.name)
            row += ["1" if name == candidate.name else _spread(ratios[name]) for name in present]
            rows.append(row)
        return rows


def _commands(candidates: Sequence[Candidate]) -> list[str]:
    lines = []
    for candidate in candidates:
        variables = [f"{name}={shlex.quote(value)}" for name, value in candidate.environment.items()]
        lines += [f"  {candidate.name}", f"      {' '.join([*variables, shlex.join(candidate.command)])}"]
    return lines


def _figure(value: float) -> str:
    """Three significant digits or so, without an exponent."""
    size = abs(value)
    return f"{value:.0f}" if size >= 1000 or value == int(value) else f"{value:.1f}" if size >= 100 else f"{value:.2f}"


def _spread(series: Series) -> str:
    low, high = series.quartiles
    return f"{series.median:.2f} ({low:.2f}-{high:.2f})"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
