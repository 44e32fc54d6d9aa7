"""One HTML page of any results, to be sent as it is: charts, tables, costs, and how they were measured."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from benchmarks import options as opt
from benchmarks.results import PRICES, Prices, read_model
from benchmarks.runner import check_output, read_report
from benchmarks.views import as_page


class Options(opt.Options):
    """The command line."""

    files: Annotated[tuple[Path, ...], Field(description="results")]
    output: Path = Path("output/benchmark_report.html")
    prices: Path = PRICES


def measure(options: Options) -> None:
    prices = read_model(Prices, options.prices)
    sections = [read_report(file).section(prices) for file in options.files]
    check_output(options.output)
    options.output.write_text(as_page(sections), encoding="utf-8")
    print(f"wrote {options.output}")
