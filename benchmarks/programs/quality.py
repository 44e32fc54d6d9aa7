"""How good the restored pictures are, and how far the faster configurations deviate from another.

Clean pictures are degraded, each with its own seed, restored, and compared with what they were: PSNR and SSIM
of the whole picture and of its faces (as found in the clean picture), and NIQE, which needs no reference.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

import numpy as np
import torch
from pydantic import Field

from benchmarks import options as opt
from benchmarks.measure import Count, Model, Summary
from benchmarks.programs.full_size import with_official_sizes
from benchmarks.results import Configuration, Report
from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.models import Models
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import torch_switches
from codeformer.errors import InputError
from codeformer.evaluation import metrics
from codeformer.evaluation.degradation import HEAVY, MILD, MODERATE, DegradationRange
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import crop_face
from codeformer.imaging.quality import psnr_db, ssim
from codeformer.machine import NOT_INSTALLED
from codeformer.training.faces import read_photograph

PRECISIONS: Final = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEGRADATIONS: Final[dict[str, DegradationRange]] = {"mild": MILD, "moderate": MODERATE, "heavy": HEAVY}
_SMALLEST_FACE: Final = 16

Degradation = Literal["mild", "moderate", "heavy"]
Precision = Literal["float32", "bfloat16", "float16"]
Box = tuple[slice, slice]


class Scores(Model):
    """Distributions over pictures and over faces; None where there is none, or none large enough."""

    psnr_db: Summary
    ssim: Summary
    face_psnr_db: Summary | None = None
    face_ssim: Summary | None = None
    niqe: Summary | None = None


class Restored(Model):
    """One configuration's scores, and how many faces it restored."""

    configuration: Configuration
    scores: Scores
    faces: Count


class Deviation(Model):
    """How far one configuration's pictures are from another's, in 8-bit levels and dB.

    `equal_codes` is the share of codes that are the same, None where there is no face.
    """

    configuration: Configuration
    against: Configuration
    max_levels: float
    mean_levels: float
    psnr_db: float
    equal_codes: Annotated[float, Field(ge=0, le=1)] | None = None


class Result(Report):
    """Of all configurations and fidelities."""

    kind: Literal["quality"] = "quality"
    seed: Count
    degradation: Degradation
    official_size: bool
    precision: Precision | None
    images: Annotated[list[str], Field(min_length=1)]
    clean_niqe: Summary | None
    degraded: Scores
    restored: list[Restored]
    deviations: list[Deviation]

    def notes(self) -> list[str]:
        has_niqe = self.machine.versions.get("basicsr") != NOT_INSTALLED
        return super().notes() + ([] if has_niqe else ["No NIQE: basicsr was not installed."])


class Options(opt.InProcess):
    """The command line."""

    reference: Annotated[Path, Field(description="a folder of clean pictures")]
    cases: opt.Cases = opt.DEFAULT_CASES
    fidelities: tuple[opt.Fidelity, ...] = (0.0, 0.5, 1.0)
    degradation: Degradation = "moderate"
    seed: int = Field(0, ge=0, description="of the degradations")
    limit: opt.Limit = None
    against: Annotated[
        str | None,
        Field(description="deviation of the other cases from this one; 'baseline' is baseline/safe"),
    ] = None
    official_size: opt.OfficialSize = False
    precision: Annotated[
        Precision | None,
        Field(description="of generator and parser in fast and max_speed, instead of the device's"),
    ] = None


def measure(options: Options) -> Result:
    against = "baseline/safe" if options.against == "baseline" else options.against
    if against and against not in opt.CASES:
        raise InputError(f"--against {against}: expected one of {', '.join(opt.CASES)}.")
    # The one that the others are compared with comes first.
    cases = opt.cases_of([against, *options.cases] if against else options.cases)
    files = opt.pictures_of(options.reference)[: options.limit]
    loaded = options.load()
    device = loaded.device
    models = with_official_sizes(loaded.models, device) if options.official_size else loaded.models
    clean = [read_photograph(file) for file in files]
    boxes = [_face_boxes(models.detector, picture) for picture in clean]
    degraded = []
    for index, picture in enumerate(clean):
        rng = np.random.default_rng((options.seed, index))
        degraded.append(DEGRADATIONS[options.degradation].sample(rng).apply(picture, rng))
    restored: list[Restored] = []
    deviations: list[Deviation] = []
    crops: list[ImageU8] = []
    codes: dict[str, torch.Tensor] = {}
    for fidelity in options.fidelities:
        outputs: dict[str, list[ImageU8]] = {}
        for name, configuration in opt.cases_of(list(cases), fidelity).items():
            plan = configuration.plan(device)
            if options.precision and configuration.runtime_profile != "baseline":
                plan = replace(plan, half_dtype=PRECISIONS[options.precision])
            pipeline = Pipeline(models, device)
            results = [pipeline.restore([picture], fidelity, plan)[0] for picture in degraded]
            outputs[name] = [result.image_bgr for result in results]
            faces = sum(len(result.faces) for result in results)
            found = scores(outputs[name], clean, boxes)
            restored.append(Restored(configuration=configuration, scores=found, faces=faces))
            if name == against:
                reference = configuration
                crops = [
                    crop_face(picture, face.picture_to_face)
                    for picture, result in zip(degraded, results, strict=True)
                    for face in result.faces
                ]
            if against and crops and name not in codes:
                codes[name] = _codes(models, configuration, crops, device)
            if against and name != against:
                deviation = _deviation(outputs[name], outputs[against])
                if codes:
                    equal = (codes[name] == codes[against]).double().mean()
                    deviation["equal_codes"] = round(float(equal), 6)
                deviations.append(Deviation(configuration=configuration, against=reference, **deviation))
            print(f"measured {configuration}")
    return Result.of(
        loaded.header,
        options,
        images=[file.name for file in files],
        clean_niqe=_niqe(clean),
        degraded=scores(degraded, clean, boxes),
        restored=restored,
        deviations=deviations,
    )


def _face_boxes(detector: FaceDetector, picture: ImageU8) -> list[Box]:
    """Where faces are, none of them too small to be compared."""
    height, width = picture.shape[:2]
    boxes = []
    with torch_switches(cudnn_benchmark=False):
        [faces] = detector.detect([picture])
    for face in faces:
        left, top = np.floor(face.box_xyxy[:2]).astype(int).clip(0)
        right, bottom = np.ceil(face.box_xyxy[2:]).astype(int).clip(None, (width, height))
        if min(right - left, bottom - top) >= _SMALLEST_FACE:
            boxes.append((slice(top, bottom), slice(left, right)))
    return boxes


def scores(results: Sequence[ImageU8], clean: Sequence[ImageU8], boxes: Sequence[Sequence[Box]]) -> Scores:
    """Scores of pictures (H, W, 3) uint8 BGR against clean ones, and of their faces in boxes."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for result, truth, faces in zip(results, clean, boxes, strict=True):
        for prefix, region in [("", np.s_[:, :]), *(("face_", face) for face in faces)]:
            values[f"{prefix}psnr_db"].append(psnr_db(result[region], truth[region]))
            values[f"{prefix}ssim"].append(ssim(result[region], truth[region]))
    summaries: dict[str, Any] = {name: Summary.of(numbers) for name, numbers in values.items()}
    return Scores(**summaries, niqe=_niqe(results))


def _niqe(pictures: Sequence[ImageU8]) -> Summary | None:
    return Summary.of_any([value for value in map(metrics.niqe, pictures) if value is not None])


def _deviation(ours: Sequence[ImageU8], theirs: Sequence[ImageU8]) -> dict[str, float]:
    pairs = list(zip(ours, theirs, strict=True))
    levels = [np.abs(a.astype(np.int16) - b) for a, b in pairs]
    return {
        "max_levels": float(max(difference.max() for difference in levels)),
        "mean_levels": round(float(np.mean([difference.mean() for difference in levels])), 5),
        "psnr_db": round(float(np.mean([psnr_db(a, b) for a, b in pairs])), 3),
    }


def _codes(
    models: Models, configuration: Configuration, crops: Sequence[ImageU8], device: torch.device
) -> torch.Tensor:
    """The codes that a configuration predicts; in float32 in every profile, whatever the fidelity."""
    plan = configuration.plan(device)
    chosen = models.optimized(plan.compile_backend) if plan.optimized else models
    restorer = cast("CodeFormerRestorer", chosen.restorers["codeformer"])
    batches = torch.split(torch.from_numpy(np.stack(crops)).to(device), plan.micro_batch)
    with torch_switches(cudnn_benchmark=plan.cudnn_benchmark):
        return torch.cat([restorer.codes(batch) for batch in batches])
