"""The same photos by several recipes: pictures, times and measures, for the page and for the command line."""

import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from codeformer.engine.models import RESTORERS
from codeformer.engine.picture import RestoredImage
from codeformer.engine.pipeline import Pipeline, recipe_of
from codeformer.engine.stages import STAGES
from codeformer.errors import ImageError, OptionError
from codeformer.imaging.files import ImageU8, encode_jpeg
from codeformer.imaging.geometry import Face, crop_face
from codeformer.imaging.quality import colour_shift, distance, psnr_db, sharpness, ssim
from codeformer.options import RESTORER_CHOICES, Recipe, check_choice, check_fidelity

MAX_VARIANTS: Final = 12
DEFAULT_FIDELITIES: Final = (0.0, 0.5, 1.0)
# Decoding and encoding, beside the stages of the pipeline.
FILES: Final = "files"
ALL_STAGES: Final = (*STAGES, FILES)

_TITLES: Final = {"codeformer": "CodeFormer", "gfpgan": "GFPGAN"}
_SECONDS: Final = {"s": 1, "h": 3600}
_PRICE: Final = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE]-?\d+)?)\s*/\s*([sh])\s*")
_THOUSAND: Final = 1000

Restore = Callable[[ImageU8, Recipe], RestoredImage]


@dataclass(frozen=True)
class Variant:
    """One way to restore a photo.

    Attributes:
        label: for people.
        recipe: what is done to each face.
    """

    label: str
    recipe: Recipe


@dataclass(frozen=True)
class Price:
    """What the device costs.

    Attributes:
        amount: in any currency.
        unit: what it is paid for, "s" for a second or "h" for an hour.
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Price":
        """Reads "0.81/h" or "0.000225/s".

        Raises:
            OptionError: it is something else.
        """
        match = _PRICE.fullmatch(text)
        if match is None or not math.isfinite(float(match[1])):
            raise OptionError("price", text, "an amount per hour or per second, like 0.81/h or 0.000225/s")
        return cls(float(match[1]), match[2])

    def per_thousand(self, total_ms: float) -> float:
        """The price of a thousand pictures that take this long each, one after another."""
        return total_ms / 1e3 * _THOUSAND * self.amount / _SECONDS[self.unit]

    def __str__(self) -> str:
        return f"{self.amount:g} per {'hour' if self.unit == 'h' else 'second'}"


@dataclass(frozen=True)
class Photo:
    """A photo to compare on.

    Attributes:
        name: of its file.
        image_bgr: (H, W, 3) uint8 BGR, upright.
        decode_ms: how long decoding took.
        clean_bgr: the same picture before it was degraded, of the same size; None where there is none.

    Raises:
        ImageError: the sizes differ.
    """

    name: str
    image_bgr: ImageU8
    decode_ms: float
    clean_bgr: ImageU8 | None = None

    def __post_init__(self) -> None:
        if self.clean_bgr is not None and self.clean_bgr.shape != self.image_bgr.shape:
            expected, got = (f"{i.shape[1]} x {i.shape[0]} px" for i in (self.image_bgr, self.clean_bgr))
            raise ImageError(
                f"{self.name}: expected a clean original of the same size, {expected}, got {got}; "
                "scale or crop one of them."
            )


@dataclass(frozen=True)
class Measures:
    """Means over the faces of a picture, each cut out and aligned as 512 x 512 px.

    Attributes:
        distance: to the input, root mean square in levels.
        colour_shift: from the input, in levels.
        sharpness: variance of the Laplacian.
        psnr_db: to the clean original; None where there is none.
        ssim: likewise.
    """

    distance: float
    colour_shift: float
    sharpness: float
    psnr_db: float | None
    ssim: float | None


@dataclass(frozen=True)
class Outcome:
    """What became of a photo by one recipe.

    Attributes:
        label: the recipe's.
        image_bgr: (H, W, 3) uint8 BGR.
        crops_bgr: its faces, (512, 512, 3) each, best score first.
        stages_ms: milliseconds by stage, see ALL_STAGES; empty for a picture that was not restored.
        measures: None for a picture without faces.
    """

    label: str
    image_bgr: ImageU8
    crops_bgr: tuple[ImageU8, ...]
    stages_ms: Mapping[str, float]
    measures: Measures | None

    @property
    def total_ms(self) -> float:
        return sum(self.stages_ms.values())

    @property
    def faces_per_hour(self) -> float:
        return len(self.crops_bgr) / self.total_ms * 3.6e6 if self.total_ms else 0.0


@dataclass(frozen=True)
class Comparison:
    """One photo by all recipes.

    Attributes:
        photo: the photo.
        references: the input, and the clean original if there is one, as outcomes that took no time.
        outcomes: one for each recipe.
    """

    photo: Photo
    references: tuple[Outcome, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def faces(self) -> int:
        return len(self.references[0].crops_bgr)


def chains(pipeline: Pipeline) -> tuple[str, ...]:
    """The choices of `restorer` that this pipeline has the networks for."""
    loaded = pipeline.models.restorers
    return tuple(choice for choice in RESTORER_CHOICES if set(choice.split("+")) <= set(loaded))


def title_of(restorer: str) -> str:
    """A choice of `restorer` for people."""
    return ", then ".join(_TITLES.get(name, name) for name in restorer.split("+"))


def variants_of(restorers: Sequence[str], fidelities: Sequence[float]) -> list[Variant]:
    """Every restorer or chain with every fidelity; those that take no fidelity once.

    Raises:
        OptionError: one of them is out of range, there is none, or there are more than MAX_VARIANTS.
    """
    variants: dict[Recipe, Variant] = {}
    for restorer, fidelity in itertools.product(restorers, fidelities):
        check_choice("restorers", restorer, RESTORER_CHOICES)
        check_fidelity(fidelity)
        takes_fidelity = any(RESTORERS[name].facts.takes_fidelity for name in restorer.split("+"))
        recipe = recipe_of(restorer, float(fidelity))
        label = f"{title_of(restorer)}, fidelity {fidelity:g}" if takes_fidelity else title_of(restorer)
        variants.setdefault(recipe, Variant(label, recipe))
    if not 1 <= len(variants) <= MAX_VARIANTS:
        expected = f"1 to {MAX_VARIANTS} recipes (restorers times fidelities)"
        raise OptionError("restorers, fidelities", f"{len(variants)} recipes", expected)
    return list(variants.values())


def compare(
    photo: Photo,
    variants: Sequence[Variant],
    restore: Restore,
    repeats: int = 1,
    on_step: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Restores a photo by each recipe, one after another.

    Each recipe runs once unmeasured, because the first run of a network at a new size prepares what later
    runs use again.

    Args:
        photo: the photo.
        variants: at least one.
        restore: restores one picture; always the same faces.
        repeats: measured runs, of which the one with the median time counts.
        on_step: called after each run with the number of runs so far, of `runs_of` altogether.

    Raises:
        CodeFormerError: whatever `restore` raises.
    """
    done = 0
    faces: Sequence[Face] = ()
    outcomes = []
    for variant in variants:
        runs = []
        for _ in range(repeats + 1):
            runs.append(restore(photo.image_bgr, variant.recipe))
            done += 1
            on_step(done)
        measured = sorted(runs[1:], key=_total_of)[(repeats - 1) // 2]
        faces = measured.faces
        started = time.perf_counter()
        encode_jpeg(measured.image_bgr)
        encode_ms = (time.perf_counter() - started) * 1e3
        stages: dict[str, float] = {stage: measured.elapsed_ms.get(stage, 0.0) for stage in STAGES}
        stages[FILES] = photo.decode_ms + encode_ms
        outcomes.append(_outcome(variant.label, measured.image_bgr, faces, photo, stages))
    references = [_outcome("Input", photo.image_bgr, faces, photo, {})]
    if photo.clean_bgr is not None:
        references.append(_outcome("Clean original", photo.clean_bgr, faces, photo, {}))
    return Comparison(photo, tuple(references), tuple(outcomes))


def runs_of(variants: Sequence[Variant], repeats: int = 1) -> int:
    """How many runs `compare` makes of one photo."""
    return len(variants) * (repeats + 1)


def _total_of(result: RestoredImage) -> float:
    return sum(result.elapsed_ms.get(stage, 0.0) for stage in STAGES)


def _outcome(
    label: str, image_bgr: ImageU8, faces: Sequence[Face], photo: Photo, stages_ms: Mapping[str, float]
) -> Outcome:
    crops, before, clean = (
        tuple(crop_face(image, face.picture_to_face) for face in faces) if image is not None else ()
        for image in (image_bgr, photo.image_bgr, photo.clean_bgr)
    )
    measures = None
    if crops:
        mean = statistics.fmean
        measures = Measures(
            distance=mean(map(distance, crops, before)),
            colour_shift=mean(map(colour_shift, crops, before)),
            sharpness=mean(map(sharpness, crops)),
            psnr_db=mean(map(psnr_db, crops, clean)) if clean else None,
            ssim=mean(map(ssim, crops, clean)) if clean else None,
        )
    return Outcome(label, image_bgr, crops, stages_ms, measures)
