"""What a result shows, and how: as text for the terminal, and as a part of the HTML page.

A program's result says it once, as a `Section`; everything about looks is here and in templates/page.html.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.measure import Summary

# Okabe and Ito's colours, told apart with every kind of colour vision.
COLOURS: Final = ("#56B4E9", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#F0E442", "#000000")


@dataclass(frozen=True)
class Table:
    """Rows of cells as they are shown, by column; without a row it is left out.

    The first `text_columns` hold words, the others numbers.
    """

    rows: Sequence[Mapping[str, str]]
    text_columns: int = 1

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def header(self) -> list[str]:
        """The columns of all rows, in order."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    @property
    def cells(self) -> list[list[str]]:
        """Row by row; empty where a row lacks a column."""
        columns = self.header
        return [[row.get(column, "") for column in columns] for row in self.rows]


@dataclass(frozen=True)
class Bars:
    """A horizontal bar for each label, made of parts."""

    unit: str
    labels: Mapping[str, Mapping[str, float]]
    kind: str = "bars"

    @property
    def parts(self) -> list[str]:
        """Of all bars, in order."""
        return list(dict.fromkeys(part for bar in self.labels.values() for part in bar))

    @property
    def longest(self) -> float:
        """The length of the longest bar."""
        return max(sum(bar.values()) for bar in self.labels.values())


@dataclass(frozen=True)
class Boxes:
    """A box for each label: quartiles, whiskers from the fastest to p95, dots for p99 and the slowest."""

    unit: str
    labels: Mapping[str, Summary]
    kind: str = "boxes"


@dataclass(frozen=True)
class Lines:
    """A line for each label, through points (x, y)."""

    x_unit: str
    y_unit: str
    labels: Mapping[str, Sequence[tuple[float, float]]]
    kind: str = "lines"


Chart = Bars | Boxes | Lines


@dataclass(frozen=True)
class Section:
    """All that is shown of one result; charts without a label are left out."""

    title: str
    notes: Sequence[str]
    tables: Sequence[Table]
    charts: Sequence[Chart] = field(default=())


def sentence(*parts: str) -> str:
    """The parts in one note."""
    return "; ".join(parts) + "."


def cell(value: float | None, digits: int = 1) -> str:
    """A number for a table, a dash for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def as_text(section: Section) -> str:
    """For the terminal: everything but the charts."""
    lines = [section.title, *section.notes]
    for table in filter(None, section.tables):
        rows = [table.header, *table.cells]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append("")
        for row in rows:
            cells = [
                text.ljust(width) if column < table.text_columns else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_page(parts: Sequence[tuple[Section, Sequence[str], Sequence[str]]]) -> str:
    """One HTML page that needs nothing else.

    Args:
        parts: each section with the problems and the provenance of its result.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(parts=parts, colours=COLOURS, ticks=ticks)


def ticks(largest: float) -> list[float]:
    """Round numbers at equal distances, three to seven of them, from 0 to `largest` or a little more."""
    largest = largest if largest > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(largest / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if 5 * factor * power >= largest * (1 - 1e-9))
    return [round(step * number, 12) for number in range(math.ceil(largest / step - 1e-9) + 1)]
