"""How results are shown: as text for the terminal, and as parts of the HTML page.

What a result holds is shown by the names of its fields; everything about looks is here and in
templates/page.html.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel

from benchmarks.measure import digits

# Okabe and Ito's colours, told apart with every kind of colour vision.
COLOURS: Final = ("#56B4E9", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#F0E442", "#000000")
_UNITS: Final = {"ms": "ms", "s": "s", "mib": "MiB", "db": "dB"}

Row = Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """Rows of cells as they are shown, by column; columns without a value are left out."""

    title: str
    rows: Sequence[Row]

    @property
    def columns(self) -> list[tuple[bool, list[str]]]:
        """Each column's title and cells, empty where a row lacks it, and whether they are numbers.

        Labels, whose column has no title, are none.
        """
        titles = dict.fromkeys(title for row in self.rows for title in row)
        columns = {title: [row.get(title, "") for row in self.rows] for title in titles}
        return [
            (bool(title) and all(cell[:1] in "-0123456789" for cell in cells), [title, *cells])
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
    """A value in a table or note: the length of a list, a dash for None."""
    if isinstance(value, float):
        return digits(value)
    if isinstance(value, list):
        return str(len(value))
    names = {None: "-", True: "on", False: "off"}
    return names[value] if value is None or isinstance(value, bool) else str(value)


def is_table(value: Any) -> bool:
    """Whether a field is shown as rows or cells: a mapping, or a model that has no words of its own."""
    if isinstance(value, list):
        return any(map(is_table, value))
    is_wordless = isinstance(value, BaseModel) and type(value).__str__ is BaseModel.__str__
    return is_wordless or isinstance(value, Mapping)


def rows_of(value: Any, label: str = "") -> list[Row]:
    """A row for each model in mappings and lists, labelled by its keys; none for what is no table."""
    if not is_table(value):
        return []
    if isinstance(value, BaseModel):
        return [{"": label} | cells_of(value)]
    rows: list[Row] = []
    for key, item in value.items() if isinstance(value, Mapping) else (("", item) for item in value):
        name = ", ".join(filter(None, (label, key)))
        rows += rows_of(item, name) if is_table(item) else [{"": name, "value": shown(item)}]
    return rows


def cells_of(items: BaseModel | Mapping[str, Any]) -> dict[str, str]:
    """Cells by the titles of fields; those of parts come in their place."""
    cells: dict[str, str] = {}
    for name, value in items.items() if isinstance(items, Mapping) else items:
        if is_table(value) and not isinstance(value, list):
            cells |= cells_of(value)
        else:
            cells[title_of(name)] = shown(value)
    return cells


def notes_of(items: Mapping[str, Any]) -> str:
    """What is known, as a sentence."""
    return "; ".join(f"{title} {text}" for title, text in cells_of(items).items() if text != "-") + "."


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


def as_page(sections: Iterable[Section]) -> str:
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
