"""Reports for people: one self-contained HTML page, and its plots as PNG files beside it.

Takes the JSON files of the other programs, in any mixture.
"""

import argparse
import base64
import io
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from benchmarks import options as opt
from benchmarks.measure import read_report
from codeformer.errors import BenchmarkError

OUTPUT: Final = Path("output/benchmark_report.html")
PRICES: Final = Path(__file__).with_name("prices.json")
STAGES: Final = ("decode", "detect", "align", "restore", "parse", "paste", "encode")
# Okabe and Ito's colours, told apart with every kind of sight.
COLOURS: Final = ("#56B4E9", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#F0E442", "#000000")
_IMAGES_PRICED: Final = 1000

Report = dict[str, Any]
Row = Sequence[object]


@dataclass(frozen=True)
class Prices:
    """What an hour of a device costs."""

    currency: str
    per_hour: Mapping[str, float]

    def of(self, machine: Mapping[str, Any]) -> float | None:
        """The price of a machine's hour, None where the table has none."""
        device = machine["device"]
        if device["type"] == "cpu":
            return self.per_hour.get("CPU")
        return next((price for name, price in self.per_hour.items() if name in device["name"]), None)


@dataclass(frozen=True)
class Latency:
    """A configuration's time per image."""

    label: str
    ms: Mapping[str, float]
    throughput_per_s: float
    failures: int
    cost: float | None


@dataclass(frozen=True)
class Section:
    """A part of the page: a title, paragraphs, a table, and plots by file name."""

    title: str
    notes: Sequence[str]
    header: Sequence[str]
    rows: Sequence[Row]
    plots: Mapping[str, Figure]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page.

    Returns:
        0 on success, 1 when a file is no report or cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="reports, JSON")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT}")
    parser.add_argument(
        "--prices", type=Path, default=PRICES, metavar="FILE", help="default: prices.json here"
    )
    options = parser.parse_args(arguments)
    return opt.run(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    prices = read_prices(options.prices)
    sections = [
        section for number, file in enumerate(options.files) for section in _sections(file, number, prices)
    ]
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        pictures = {name: _png(plot) for section in sections for name, plot in section.plots.items()}
        for name, data in pictures.items():
            options.output.with_name(name).write_bytes(data)
        options.output.write_text(render(sections, pictures), encoding="utf-8")
    except OSError as cause:
        raise BenchmarkError(f"{options.output}: cannot be written ({cause.strerror}).") from cause
    print(f"wrote {options.output} and {len(pictures)} plots")
    return 0


def read_prices(path: Path) -> Prices:
    """The price table.

    Raises:
        BenchmarkError: not a table like prices.json.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        per_hour = {str(name): float(price) for name, price in table["per_hour"].items()}
        return Prices(str(table["currency"]), per_hour)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise BenchmarkError(f"{path}: expected a table like {PRICES.name} ({cause!r}).") from cause


def _sections(file: Path, number: int, prices: Prices) -> Iterator[Section]:
    report = read_report(file)
    make = {
        "requests": _requests,
        "single_image": _single_image,
        "stages": _stages,
        "quality": _quality,
        "parts": _parts,
        "networks": _networks,
        "soak": _soak,
    }[report["kind"]]
    yield make(report, f"{number + 1}_{file.stem}", prices)


def _requests(report: Report, name: str, prices: Prices) -> Section:
    hour = prices.of(report["machine"])
    latencies = [
        Latency(
            label,
            profile["per_image"]["ms"],
            profile["per_image"]["throughput_per_s"],
            profile["failed_requests"],
            cost_of(profile["per_image"]["ms"]["avg"], hour),
        )
        for label, profile in report["profiles"].items()
        if "per_image" in profile
    ]
    failed = [label for label, profile in report["profiles"].items() if "per_image" not in profile]
    first, *_ = report["profiles"].values()
    notes = [
        _sentence(
            f"{len(report['images'])} pictures, {report['batch_size']} a request",
            f"{report['repeats']} rounds after {report['warmup']} to warm up",
            _settings(first),
        )
    ]
    notes += [f"Ratio request by request, {_ratio(name, report)}." for name in report["ratios_to_first"]]
    notes += [f"{label}: every request failed." for label in failed]
    return Section(
        "Requests over HTTP, time per image",
        [*notes, *_provenance(report)],
        _latency_header(prices),
        [_latency_row(latency) for latency in latencies],
        {
            f"{name}_latency.png": plot_latency(latencies, "ms per image, over HTTP"),
            f"{name}_stages.png": plot_stages(
                {
                    label: _medians(profile["stages_ms"])
                    for label, profile in report["profiles"].items()
                    if "stages_ms" in profile
                },
                "median ms of a request",
            ),
            **_cost_plot(name, latencies, prices),
        }
        if latencies
        else {},
    )


def _single_image(report: Report, name: str, prices: Prices) -> Section:
    hour = prices.of(report["machine"])
    good = {label: case for label, case in report["cases"].items() if "warm_ms" in case}
    latencies = [
        Latency(
            label,
            case["warm_ms"],
            1e3 / case["warm_ms"]["avg"],
            len(case["errors"]),
            cost_of(case["warm_ms"]["avg"], hour),
        )
        for label, case in good.items()
    ]
    rows = [
        [
            *_latency_row(latency),
            f"{good[latency.label]['cold_ms']['p50']:,.0f}",
            f"{good[latency.label]['setup_s']['p50']:.1f}",
            _or_dash(good[latency.label]["peak_memory_mib"], "{:,.0f}"),
            good[latency.label]["peak_memory_of"] or "",
        ]
        for latency in latencies
    ]
    image = report["image"]
    notes = [
        _sentence(
            f"{image['name']}, {image['width']} x {image['height']} px",
            f"{report['starts']} fresh servers for each configuration",
            f"{report['repeats']} requests after the first and {report['warmup']} to warm up",
        ),
        f"Fastest when warm: {report['best_warm']}. Fastest from cold: {report['best_cold']}.",
    ]
    notes += [
        f"{label} failed: {error}" for label, case in report["cases"].items() for error in case["errors"]
    ]
    return Section(
        "One picture, cold and warm",
        [*notes, *_provenance(report)],
        [*_latency_header(prices), "first request, ms", "setup, s", "peak memory, MiB", "of"],
        rows,
        {
            f"{name}_latency.png": plot_latency(latencies, "ms, warm, over HTTP"),
            f"{name}_stages.png": plot_stages(
                {label: _medians(case["stages_ms"]) for label, case in good.items()}, "median ms of a request"
            ),
            **_cost_plot(name, latencies, prices),
        }
        if latencies
        else {},
    )


def _stages(report: Report, name: str, prices: Prices) -> Section:
    hour = prices.of(report["machine"])
    rows: list[Row] = []
    breakdown = {}
    for case in report["cases"]:
        place = f"{case['picture']}, {case['width']} x {case['height']}, {_faces(case)}, "
        place += f"batch {case['batch_size']}"
        for label, result in case["configurations"].items():
            total = result["total_ms"]
            breakdown[f"{label}\n{place}"] = {
                stage: row["ms"]["p50"] for stage, row in result["stages"].items()
            }
            cost = cost_of(total["avg"] / case["batch_size"], hour)
            memory = _or_dash(result["peak_memory_mib"], "{:,.0f} MiB")
            rows.append(
                [place, label, "whole request", *_spread(total), "", "", memory, _or_dash(cost, "{:.3f}")]
            )
            rows += [
                [
                    *(place, label, stage),
                    *_spread(row["ms"]),
                    _or_dash(row["limit_ms"], "{:,.2f}"),
                    _or_dash(row["times_limit"], "{:,.1f}"),
                    *("", ""),
                ]
                for stage, row in result["stages"].items()
            ]
    ceilings = report["ceilings"]
    speeds = ", ".join(f"{kind} {speed:,.0f} GFLOP/s" for kind, speed in ceilings["gflops"].items())
    failures = [
        f"{label} failed: {failure}"
        for case in report["cases"]
        for label, failure in case["failures"].items()
    ]
    notes = [
        _sentence(
            f"In process, {report['repeats']} rounds after {report['warmup']} to warm up",
            "configurations in turns",
            f"ceilings: {speeds} in a matrix product or a convolution",
            f"{ceilings['host_copy_gbytes_per_s']:.1f} GB/s in a copy on the host",
        )
    ]
    notes += failures
    plots = {f"{name}_stages.png": plot_stages(breakdown, "median ms of a request")}
    for axis, title in (("faces", "faces"), ("megapixels", "megapixels")):
        if lines := _scaling(report["cases"], axis):
            plots[f"{name}_{axis}.png"] = plot_scaling(lines, title)
    header = ["request", "configuration", "stage", "median ms", "quartiles", "limit ms", "times the limit"]
    return Section(
        "Stages and their limits",
        [*notes, *_provenance(report)],
        [*header, "peak memory", f"{prices.currency} per {_IMAGES_PRICED} images"],
        rows,
        plots,
    )


def _scaling(cases: Iterable[Mapping[str, Any]], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Median time per image over faces or megapixels, all else alike; lines of one point are left out."""
    lines: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for case in cases:
        pixels = case["width"] * case["height"] / 1e6
        fixed, at = (
            (f"{case['width']} x {case['height']}", case["faces"])
            if axis == "faces"
            else (_faces(case), pixels)
        )
        for label, result in case["configurations"].items():
            time = result["total_ms"]["p50"] / case["batch_size"]
            lines[f"{label}, {fixed}, batch {case['batch_size']}"].append((at, time))
    return {label: sorted(points) for label, points in lines.items() if len({at for at, _ in points}) > 1}


def _parts(report: Report, _name: str, _prices: Prices) -> Section:
    ratio = report["full_frame_to_region"]
    notes = [
        _sentence(
            f"In process, {report['repeats']} rounds after {report['warmup']} to warm up",
            f"paste-back on the full frame takes {ratio['p50']:.0f} times as long as in the face's region "
            f"({ratio['p25']:.0f} to {ratio['p75']:.0f})",
        )
    ]
    return Section(
        "Beside the networks",
        [*notes, *_provenance(report)],
        ["part", "", "median ms", "quartiles"],
        [[name, "", *_spread(summary)] for name, summary in report["parts_ms"].items()],
        {},
    )


def _networks(report: Report, _name: str, _prices: Prices) -> Section:
    memory = {None: "", True: "freed memory kept", False: "allocator as it is"}
    rows = [
        [
            row["network"],
            f"{form} ({memory[row['keeps_memory']]})" if row["keeps_memory"] is not None else form,
            *_spread(summary),
            f"{row['ratios_to_first'][form]['p50']:.3f}" if form in row["ratios_to_first"] else "1",
        ]
        for row in report["networks"]
        for form, summary in row["forms_ms"].items()
    ]
    return Section(
        "Forms of the networks, official sizes",
        [f"{report['repeats']} rounds after {report['warmup']} to warm up.", *_provenance(report)],
        ["network", "form", "median ms", "quartiles", "to the first form"],
        rows,
        {},
    )


def _soak(report: Report, name: str, _prices: Prices) -> Section:
    times = report["times_ms"]
    served = sum(report["requests"].values())
    faults = [f"Fault: {fault}." for fault in report["faults"]]
    cancelled = ", ".join(f"{number} {status}" for status, number in report["cancelled"].items())
    notes = [
        _sentence(
            f"{served} requests and {sum(report['cancelled'].values())} to be cancelled ({cancelled})",
            f"{len(faults) or 'no'} faults",
            f"memory {report['growth']:+.2%} from request {report['resident_mib'][0][0]} on",
            f"at most {report['most_files']} files at a time, {len(report['files_left']) or 'none'} left",
        )
    ]
    rows = [
        [
            kind,
            number,
            *((f"{times[kind]['p50']:,.0f}", f"{times[kind]['p99']:,.0f}") if kind in times else ("-", "-")),
            f"{times[kind]['p99'] / times[kind]['p50']:.2f}" if kind in times else "-",
        ]
        for kind, number in report["requests"].items()
    ]
    return Section(
        "Many requests of all kinds",
        [*notes, *faults, *_provenance(report)],
        ["request", "times", "p50 ms", "p99 ms", "p99 to p50"],
        rows,
        {f"{name}_memory.png": plot_memory(report["resident_mib"])},
    )


def _quality(report: Report, _name: str, _prices: Prices) -> Section:
    rows: list[Row] = [["degraded", "", *_scores(report["degraded"])]]
    rows += [
        [
            _label(row["configuration"]),
            f"{row['configuration']['codeformer_fidelity']:g}",
            *_scores(row["scores"]),
        ]
        for row in report["restored"]
    ]
    pictures = f"{len(report['images'])} pictures under {report['degradation']} degradation"
    notes = [_sentence(pictures, f"seed {report['seed']}", "means")]
    for row in report["deviations"]:
        codes = "" if row["equal_codes"] is None else f", {row['equal_codes']:.2%} of the codes equal"
        w = row["configuration"]["codeformer_fidelity"]
        notes.append(
            f"{_label(row['configuration'])} at w = {w:g} against {_label(row['against'])}: "
            f"at most {row['max_levels']} levels, on average {row['mean_levels']:.4f}, "
            f"PSNR {row['psnr_db']:.1f} dB{codes}."
        )
    header = ["", "w", "PSNR, dB", "SSIM", "faces: PSNR, dB", "faces: SSIM", "NIQE"]
    return Section("Quality", [*notes, *_provenance(report)], header, rows, {})


def _scores(scores: Mapping[str, Any]) -> list[str]:
    formats = {
        "psnr_db": "{:.2f}",
        "ssim": "{:.4f}",
        "face_psnr_db": "{:.2f}",
        "face_ssim": "{:.4f}",
        "niqe": "{:.2f}",
    }
    return [_or_dash(scores[key]["avg"] if key in scores else None, text) for key, text in formats.items()]


def cost_of(ms_per_image: float, per_hour: float | None) -> float | None:
    """What 1000 images cost on a machine that does nothing else."""
    return None if per_hour is None else ms_per_image / 1e3 * _IMAGES_PRICED * per_hour / 3600


def plot_latency(latencies: Sequence[Latency], unit: str) -> Figure:
    """A box for each configuration: quartiles, whiskers from the fastest to p95, dots for p99 and slowest."""
    figure, axes = _figure(1.2 + 0.5 * len(latencies))
    boxes = [
        {
            "label": latency.label,
            "med": latency.ms["p50"],
            "q1": latency.ms["p25"],
            "q3": latency.ms["p75"],
            "whislo": latency.ms["min"],
            "whishi": latency.ms["p95"],
            "mean": latency.ms["avg"],
            "fliers": [latency.ms["p99"], latency.ms["max"]],
        }
        for latency in reversed(latencies)
    ]
    axes.bxp(
        boxes,
        orientation="horizontal",
        patch_artist=True,
        widths=0.5,
        boxprops={"facecolor": COLOURS[0], "edgecolor": "#333333"},
        medianprops={"color": "#333333", "linewidth": 2},
        flierprops={"marker": "o", "markersize": 4, "markerfacecolor": COLOURS[4], "markeredgewidth": 0},
    )
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit} (box: quartiles; whiskers: fastest to p95; dots: p99, slowest)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def plot_stages(breakdown: Mapping[str, Mapping[str, float]], unit: str) -> Figure:
    """A bar for each configuration, made of its stages."""
    figure, axes = _figure(1.6 + 0.5 * len(breakdown))
    labels = list(breakdown)[::-1]
    left = [0.0] * len(labels)
    for stage, colour in zip(STAGES, COLOURS, strict=False):
        widths = [breakdown[label].get(stage, 0.0) for label in labels]
        if any(widths):
            axes.barh(labels, widths, left=left, color=colour, label=stage, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel(unit)
    axes.legend(ncols=len(STAGES), loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize="small")
    axes.grid(axis="x", alpha=0.3)
    return figure


def plot_costs(costs: Mapping[str, float], currency: str) -> Figure:
    """A bar for each configuration: what 1000 images cost."""
    figure, axes = _figure(1.2 + 0.4 * len(costs))
    labels = list(costs)[::-1]
    bars = axes.barh(labels, [costs[label] for label in labels], color=COLOURS[2], height=0.6)
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_xlabel(f"{currency} per {_IMAGES_PRICED} images, on a machine that does nothing else")
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    return figure


def plot_scaling(lines: Mapping[str, Sequence[tuple[float, float]]], axis: str) -> Figure:
    """Time per image over faces or megapixels."""
    figure, axes = _figure(4.2 + 0.12 * len(lines))
    for number, (label, points) in enumerate(lines.items()):
        again, colour = divmod(number, len(COLOURS))
        style = ("-", "--", ":")[again % 3]
        axes.plot(*zip(*points, strict=True), marker="o", label=label, color=COLOURS[colour], linestyle=style)
    axes.set_xlabel(axis)
    axes.set_ylabel("median ms per image")
    axes.set_ylim(bottom=0)
    if axis == "faces":
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(frameon=False, fontsize="small", loc="outside lower center", ncols=2)
    axes.grid(alpha=0.3)
    return figure


def plot_memory(resident_mib: Sequence[tuple[int, float]]) -> Figure:
    """Memory over the number of requests served."""
    figure, axes = _figure(3)
    axes.plot(*zip(*resident_mib, strict=True), color=COLOURS[3])
    axes.set_xlabel("requests")
    axes.set_ylabel("resident MiB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    return figure


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def render(sections: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """The page; pictures are embedded, so that the file can be sent as it is."""
    body = []
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2>")
        body += [f"<p>{escape(note)}</p>" for note in section.notes]
        body += [f'<img alt="{escape(name)}" src="{_data_uri(pictures[name])}">' for name in section.plots]
        head = "".join(f"<th>{escape(cell)}</th>" for cell in section.header)
        rows = "\n".join(f"<tr>{_cells(row)}</tr>" for row in section.rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        body.append(f'<div class="table">{table}</div>')
    return _PAGE.replace("BODY", "\n".join(body))


def _faces(case: Mapping[str, Any]) -> str:
    return f"{case['faces']} face{'s' * (case['faces'] != 1)}"


def _medians(stages: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {stage: summary["p50"] for stage, summary in stages.items()}


def _cost_plot(name: str, latencies: Sequence[Latency], prices: Prices) -> dict[str, Figure]:
    """The plot of costs by file name, if the device has a price."""
    costs = {latency.label: latency.cost for latency in latencies if latency.cost is not None}
    return {f"{name}_cost.png": plot_costs(costs, prices.currency)} if costs else {}


def _cells(row: Row) -> str:
    return "".join(f"<td>{escape(str(cell))}</td>" for cell in row)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _sentence(*parts: str) -> str:
    return "; ".join(parts) + "."


def _latency_header(prices: Prices) -> list[str]:
    return [
        *("configuration", "avg ms", "p50", "p95", "p99", "fastest", "slowest", "images/s", "failed"),
        f"{prices.currency} per {_IMAGES_PRICED} images",
    ]


def _latency_row(latency: Latency) -> list[str]:
    times = [f"{latency.ms[key]:,.1f}" for key in ("avg", "p50", "p95", "p99", "min", "max")]
    cost = _or_dash(latency.cost, "{:.3f}")
    return [latency.label, *times, f"{latency.throughput_per_s:.2f}", str(latency.failures), cost]


def _spread(summary: Mapping[str, float]) -> list[str]:
    return [f"{summary['p50']:,.2f}", f"{summary['p25']:,.2f} to {summary['p75']:,.2f}"]


def _or_dash(value: float | None, text: str) -> str:
    return "-" if value is None else text.format(value)


def _label(configuration: Mapping[str, Any]) -> str:
    parts = [configuration["runtime_profile"], configuration["stability_mode"]]
    if configuration["stability_mode"] == "optimized":
        parts.append(configuration["compile_backend"])
    return "/".join(parts)


def _settings(profile: Mapping[str, Any]) -> str:
    configuration = profile["configuration"]
    mode = configuration["stability_mode"]
    backend = f", compile_backend {configuration['compile_backend']}" if mode == "optimized" else ""
    return f"stability_mode {mode}{backend}, fidelity {configuration['codeformer_fidelity']:g}"


def _ratio(name: str, report: Report) -> str:
    first, ratio = next(iter(report["profiles"])), report["ratios_to_first"][name]
    return f"{name} to {first}: {ratio['p50']:.3f} ({ratio['p25']:.3f} to {ratio['p75']:.3f})"


def _provenance(report: Report) -> list[str]:
    machine = report["machine"]
    device = machine["device"]
    details = ", ".join(f"{key} {device[key]}" for key in ("driver", "cuda", "memory_gib") if key in device)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = machine["load_average"][0]
    return [
        _sentence(
            device["name"] + (f" ({details})" if details else ""),
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, load {load:g}",
            f"weights {report['weights']['name']}" if report["weights"] else "random weights",
            f"commit {machine['commit']}, {machine['time']}",
            f"Python {machine['python']}, {versions}",
        ),
        f"Made by: {report['command']}",
    ]


_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Benchmark report</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; border-bottom: 1px solid #ccc; }
p { margin: 0.4rem 0; }
img { display: block; max-width: 100%; margin: 1rem 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td:nth-child(2) { text-align: left; }
</style>
</head>
<body>
<h1>Benchmark report</h1>
BODY
</body>
</html>
"""

if __name__ == "__main__":
    sys.exit(main())
