"""How results are shown: as text for the terminal, and as parts of the HTML page.

What a result holds is shown by the names of its fields; everything about looks is here and in
templates/page.html.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel

from benchmarks.measure import digits

# Okabe and Ito's colours, told apart with every kind of colour vision.
COLOURS: Final = ("#56B4E9", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#F0E442", "#000000")
_UNITS: Final = {"ms": "ms", "s": "s", "mib": "MiB", "db": "dB"}


@dataclass(frozen=True)
class Table:
    """Rows of cells as they are shown, by column; columns without a value are left out."""

    title: str
    rows: Sequence[Mapping[str, str]]

    @property
    def columns(self) -> list[tuple[bool, list[str]]]:
        """Each column's title and cells, empty where a row lacks it, and whether they are numbers."""
        titles = dict.fromkeys(title for row in self.rows for title in row)
        columns = {title: [row.get(title, "") for row in self.rows] for title in titles}
        return [
            (all(cell[:1] in "-0123456789" for cell in cells), [title, *cells])
            for title, cells in columns.items()
            if set(cells) - {"", "-"}
        ]


@dataclass(frozen=True)
class Chart:
    """One mark for each label; without a label it is left out.

    "bars" are made of parts with a length each. "boxes" show a Summary each: quartiles, whiskers from the
    fastest to p95, dots for p99 and the slowest.
    """

    kind: Literal["bars", "boxes"]
    unit: str
    labels: Mapping[str, Any]

    @property
    def parts(self) -> list[str]:
        """Of all bars, in order."""
        return list(dict.fromkeys(part for bar in self.labels.values() for part in bar))

    @property
    def longest_bar(self) -> float:
        return float(max(sum(bar.values()) for bar in self.labels.values()))


@dataclass(frozen=True)
class Section:
    """All that is shown of one result."""

    title: str
    notes: Sequence[str]
    tables: Sequence[Table]
    charts: Sequence[Chart]
    problems: Sequence[str]
    provenance: Sequence[str]


def title_of(name: str) -> str:
    """Such as "peak memory, MiB" for peak_memory_mib."""
    *words, last = name.split("_")
    if words and last in _UNITS:
        return f"{' '.join(words)}, {_UNITS[last]}"
    return _UNITS.get(name, name.replace("_", " "))


def shown(value: Any) -> str:
    """A value in a table: the length of a list, a dash for None."""
    if isinstance(value, float):
        return digits(value)
    if isinstance(value, list):
        return str(len(value))
    names = {None: "-", True: "on", False: "off"}
    return names[value] if value is None or isinstance(value, bool) else str(value)


def is_parts(value: Any) -> bool:
    """Whether a value is a model that is shown field by field, not in words of its own."""
    return isinstance(value, BaseModel) and type(value).__str__ is BaseModel.__str__


def row_of(model: BaseModel) -> dict[str, str]:
    """A model as cells by the titles of its fields, with those of its parts in their place."""
    row: dict[str, str] = {}
    for name, value in model:
        if isinstance(value, Mapping):
            row |= {key: shown(part) for key, part in value.items()}
        elif is_parts(value):
            row |= row_of(value)
        else:
            row[title_of(name)] = shown(value)
    return row


def table_of(title: str, items: Sequence[BaseModel] | Mapping[str, Any]) -> Table:
    """A row for each model, or for each item of a mapping, whose names are the first column."""
    if not isinstance(items, Mapping):
        return Table(title, [row_of(item) for item in items])
    return Table(
        title,
        [
            {"": name} | (row_of(item) if isinstance(item, BaseModel) else {"value": shown(item)})
            for name, item in items.items()
        ],
    )


def as_text(section: Section) -> str:
    """For the terminal: title, notes and tables."""
    lines = [section.title, *section.notes]
    for table in section.tables:
        columns = []
        for is_number, cells in table.columns:
            width = max(map(len, cells))
            columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in cells])
        rows = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
        lines += ["", f"{table.title}:", *rows] if rows else []
    return "\n".join(lines)


def as_page(sections: Sequence[Section]) -> str:
    """One HTML page that needs nothing else."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(sections=sections, colours=COLOURS, ticks=ticks)


def ticks(largest: float) -> list[float]:
    """Round numbers at equal distances, three to seven of them, from 0 to `largest` or a little more."""
    largest = largest if largest > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(largest / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if 5 * factor * power >= largest * (1 - 1e-9))
    return [round(step * number, 12) for number in range(math.ceil(largest / step - 1e-9) + 1)]
