"""How good the restored pictures are, and how far the faster configurations stray from another.

Clean pictures are spoilt, each with its own seed, restored, and compared with what they were: PSNR and SSIM
of the whole picture and of its faces (as found in the clean picture), and NIQE, which needs no reference.
"""

import argparse
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks import options as opt
from benchmarks.full_size import with_official_sizes
from benchmarks.measure import check_output, summarise, write_report
from codeformer.alignment import align_faces, crop_face, make_working_copy
from codeformer.basicsr_compat import import_basicsr
from codeformer.degradation import HEAVY, MILD, MODERATE, DegradationRange
from codeformer.detection import FaceDetector
from codeformer.errors import InputError
from codeformer.images import ImageU8, decode_image
from codeformer.machine import describe_machine
from codeformer.models import Models, load_models
from codeformer.pipeline import Pipeline, RestoredImage
from codeformer.plan import available_device, check_fidelity, resolve_plan, torch_switches
from codeformer.weights.download import fetch_set
from codeformer.weights.manifest import load_weight_set

OUTPUT: Final = Path(__file__).with_name("last_quality.json")
PRECISIONS: Final = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROGRAM: Final = "-m benchmarks.quality"
DEGRADATIONS: Final[dict[str, DegradationRange]] = {"mild": MILD, "moderate": MODERATE, "heavy": HEAVY}
DEFAULT_CASES: Final = ["baseline/safe", "fast/optimized/none", "max_speed/optimized/none"]
# NIQE works on blocks of 96 px, and wants a few of them.
_SMALLEST_FOR_NIQE: Final = 192
_IDENTICAL_DB: Final = 100.0

Box = tuple[slice, slice]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures.

    Returns:
        0 on success, 1 when a picture failed or nothing could be measured.
    """
    parser = argparse.ArgumentParser(prog=f"python {PROGRAM}", description=__doc__)
    parser.add_argument("reference", type=Path, metavar="REFERENCE_DIR", help="clean pictures")
    opt.add_cases(parser, default=DEFAULT_CASES)
    parser.add_argument("--fidelities", nargs="+", type=float, default=[0.0, 0.5, 1.0], metavar="W")
    parser.add_argument("--degradation", choices=DEGRADATIONS, default="moderate")
    parser.add_argument("--seed", type=opt.count, default=0, help="of the degradations")
    parser.add_argument("--limit", type=opt.positive, metavar="N", help="the first N pictures only")
    parser.add_argument(
        "--against", metavar="NAME", help="deviation of the other cases from this one; 'baseline' will do"
    )
    parser.add_argument("--weights", metavar="SET", help="default: CODEFORMER_WEIGHTS, else official")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument(
        "--official-size",
        action="store_true",
        help="random networks of official size; the set's detector finds the faces",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of generator and parser in fast and max_speed, instead of the device's",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT.name}")
    options = parser.parse_args(arguments)
    return opt.run(lambda: _run(options, opt.command_line(PROGRAM, arguments)))


def _run(options: argparse.Namespace, command: str) -> int:
    fidelities = [check_fidelity(w) for w in options.fidelities]
    against = "baseline/safe" if options.against == "baseline" else options.against
    if against and against not in opt.CASES:
        raise InputError(f"--against {against}: expected one of {', '.join(opt.CASES)}.")
    settings = opt.cases_of([against, *options.cases] if against else options.cases)
    check_output(options.output)
    device = available_device(options.device)
    machine = describe_machine(device)
    weights = load_weight_set(options.weights)
    files = opt.pictures_in(options.reference)[: options.limit]
    fetch_set(weights, progress=True)
    models = load_models(weights, device)
    if options.official_size:
        models = with_official_sizes(models, device)
    clean = [_read(file) for file in files]
    boxes = [_face_boxes(models.detector, picture) for picture in clean]
    spoilt = [
        DEGRADATIONS[options.degradation].sample(rng).apply(picture, rng)
        for picture, rng in ((p, np.random.default_rng((options.seed, i))) for i, p in enumerate(clean))
    ]
    report: dict[str, Any] = {
        "command": command,
        "seed": options.seed,
        "degradation": options.degradation,
        "official_size": options.official_size,
        "precision": options.precision,
        "images": [file.name for file in files],
        "clean_niqe": _niqe_of(clean),
        "degraded": scores(spoilt, clean, boxes),
        "restored": [],
        "deviations": [],
    }
    _print("degraded", report["degraded"])
    for fidelity in fidelities:
        outputs: dict[str, list[RestoredImage]] = {}
        for name, case in settings.items():
            plan = resolve_plan(
                case["runtime_profile"], case["stability_mode"], case["compile_backend"], device=device
            )
            if options.precision and case["runtime_profile"] != "baseline":
                plan = dataclasses.replace(plan, half_dtype=PRECISIONS[options.precision])
            pipeline = Pipeline(models, device)
            outputs[name] = [pipeline.restore([picture], fidelity, plan)[0] for picture in spoilt]
            row: dict[str, Any] = {
                "configuration": case | {"codeformer_fidelity": fidelity},
                "scores": scores([result.image_bgr for result in outputs[name]], clean, boxes),
                "faces": sum(len(result.faces) for result in outputs[name]),
            }
            _print(f"{name} w={fidelity:g}", row["scores"])
            report["restored"].append(row)
        if against:
            report["deviations"] += _deviations(outputs, settings, against, fidelity)
    if against:
        _add_codes(report["deviations"], models, spoilt, device)
        for row in report["deviations"]:
            _print_deviation(row)
    write_report(options.output, "quality", machine, weights, report)
    print(f"wrote {options.output}")
    return 0


def _read(file: Path) -> ImageU8:
    try:
        return decode_image(file.read_bytes())
    except OSError as cause:
        raise InputError(f"{file}: cannot be read ({cause.strerror}).") from cause
    except InputError as cause:
        raise InputError(f"{file}: {cause}") from cause


def _face_boxes(detector: FaceDetector, picture: ImageU8) -> list[Box]:
    height, width = picture.shape[:2]
    boxes = []
    with torch_switches(cudnn_benchmark=False):
        [faces] = detector.detect([picture])
    for face in faces:
        left, top = np.floor(face.box_xyxy[:2]).astype(int).clip(0)
        right, bottom = np.ceil(face.box_xyxy[2:]).astype(int).clip(None, (width, height))
        # SSIM looks through a window of 11 px.
        if right - left >= 16 and bottom - top >= 16:
            boxes.append((slice(top, bottom), slice(left, right)))
    return boxes


def scores(
    results: Sequence[ImageU8], clean: Sequence[ImageU8], boxes: Sequence[Sequence[Box]]
) -> dict[str, Any]:
    """Distributions of PSNR (dB) and SSIM over pictures and over faces, and of NIQE over pictures."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for result, truth, faces in zip(results, clean, boxes, strict=True):
        for prefix, regions in (("", [np.s_[:, :]]), ("face_", faces)):
            for region in regions:
                similarity = _similarity(result[region], truth[region])
                values[f"{prefix}psnr_db"].append(similarity[0])
                values[f"{prefix}ssim"].append(similarity[1])
    report: dict[str, Any] = {name: summarise(numbers) for name, numbers in values.items()}
    if niqe := _niqe_of(results):
        report["niqe"] = niqe
    return report


def psnr(result: ImageU8, truth: ImageU8) -> float:
    """In dB, by basicsr; 100 for equal pictures."""
    metrics = import_basicsr("metrics")
    return min(float(metrics.calculate_psnr(result, truth, crop_border=0)), _IDENTICAL_DB)


def _similarity(result: ImageU8, truth: ImageU8) -> tuple[float, float]:
    metrics = import_basicsr("metrics")
    return psnr(result, truth), float(metrics.calculate_ssim(result, truth, crop_border=0))


def _niqe_of(pictures: Sequence[ImageU8]) -> dict[str, float | int] | None:
    metrics = import_basicsr("metrics")
    numbers = [
        float(np.squeeze(metrics.calculate_niqe(picture, crop_border=0)))
        for picture in pictures
        if min(picture.shape[:2]) >= _SMALLEST_FOR_NIQE
    ]
    # Flat pictures have no statistics.
    numbers = [number for number in numbers if np.isfinite(number)]
    return summarise(numbers) if numbers else None


def _deviations(
    outputs: Mapping[str, Sequence[RestoredImage]],
    settings: Mapping[str, Mapping[str, Any]],
    against: str,
    fidelity: float,
) -> list[dict[str, Any]]:
    rows = []
    for name in outputs:
        if name == against:
            continue
        pairs = [
            (ours.image_bgr, theirs.image_bgr)
            for ours, theirs in zip(outputs[name], outputs[against], strict=True)
        ]
        differences = [np.abs(ours.astype(np.int16) - theirs) for ours, theirs in pairs]
        rows.append(
            {
                "configuration": dict(settings[name]) | {"codeformer_fidelity": fidelity},
                "against": dict(settings[against]) | {"codeformer_fidelity": fidelity},
                "max_levels": int(max(difference.max() for difference in differences)),
                "mean_levels": round(float(np.mean([difference.mean() for difference in differences])), 5),
                "psnr_db": round(float(np.mean([psnr(*pair) for pair in pairs])), 3),
                "equal_codes": None,
            }
        )
    return rows


def _add_codes(
    rows: Sequence[dict[str, Any]], models: Models, spoilt: Sequence[ImageU8], device: Any
) -> None:
    """Adds to each deviation the share of codes that are those of the other configuration."""
    crops = []
    for picture in spoilt:
        working = make_working_copy(picture)
        with torch_switches(cudnn_benchmark=False):
            [found] = models.detector.detect([working.image_bgr])
        faces, _ = align_faces(working, found)
        crops += [crop_face(working.image_bgr, face.working_to_face) for face in faces]
    if not crops:
        return
    stacked = torch.from_numpy(np.stack(crops)).to(device)
    known: dict[tuple[object, ...], torch.Tensor] = {}

    def codes(case: Mapping[str, Any]) -> torch.Tensor:
        plan = resolve_plan(
            case["runtime_profile"], case["stability_mode"], case["compile_backend"], device=device
        )
        # All that code prediction depends on: it is in float32 in every profile.
        key = (plan.optimized, plan.compile_backend, plan.micro_batch, plan.cudnn_benchmark)
        if key not in known:
            restorer = (models.optimized(plan.compile_backend) if plan.optimized else models).restorer
            with torch_switches(cudnn_benchmark=plan.cudnn_benchmark):
                batches = range(0, len(stacked), plan.micro_batch)
                known[key] = torch.cat(
                    [restorer.codes(stacked[start : start + plan.micro_batch]) for start in batches]
                )
        return known[key]

    for row in rows:
        row["equal_codes"] = round(
            float((codes(row["configuration"]) == codes(row["against"])).double().mean()), 6
        )


def _print(name: str, row: Mapping[str, Any]) -> None:
    faces = ""
    if "face_psnr_db" in row:
        faces = f"   faces PSNR {row['face_psnr_db']['avg']:6.2f} dB  SSIM {row['face_ssim']['avg']:.4f}"
    niqe = f"   NIQE {row['niqe']['avg']:.2f}" if "niqe" in row else ""
    print(f"{name:36} PSNR {row['psnr_db']['avg']:6.2f} dB  SSIM {row['ssim']['avg']:.4f}{faces}{niqe}")


def _print_deviation(row: Mapping[str, Any]) -> None:
    case = row["configuration"]
    name = f"{case['runtime_profile']}/{case['stability_mode']}/{case['compile_backend']}"
    codes = "" if row["equal_codes"] is None else f"  equal codes {row['equal_codes']:.2%}"
    print(
        f"{name} w={case['codeformer_fidelity']:g} against {row['against']['runtime_profile']}/"
        f"{row['against']['stability_mode']}: max {row['max_levels']} levels  mean {row['mean_levels']:.4f}"
        f"  PSNR {row['psnr_db']:.1f} dB{codes}"
    )


if __name__ == "__main__":
    sys.exit(main())
