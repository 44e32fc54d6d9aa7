"""What the sections of `python -m benchmarks gpu` work with: options, networks, time, and what was found."""

import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final

import cv2
import torch
from pydantic import Field
from torch import Tensor

from benchmarks import options as opt
from benchmarks.measure import Amount, Call, Samples, Shares, Timing, interleave, timings_of
from benchmarks.programs.full_size import with_official_sizes
from codeformer.engine.models import Models
from codeformer.engine.plan import torch_switches
from codeformer.engine.precision import half_dtype_of
from codeformer.imaging.files import decode_image
from codeformer.imaging.geometry import FACE_SIZE
from codeformer.serving.request import SAMPLES

NEEDS_A_GPU: Final = "not run: needs a GPU"
# Of a section's time: what is begun within it has the rest to end.
_TO_BEGIN_IN: Final = 0.85

Fact = float | int | bool | str
Share = Annotated[float, Field(ge=0, le=1)]


class Options(opt.InProcess):
    """The command line."""

    weights: opt.Weights = "lite"
    budget_s: float = Field(440.0, gt=0, description="for all sections; half a minute more may be needed")
    goldens: Path | None = Field(None, description="the folder of reference data, for the tests")
    commit: str | None = Field(None, description="what the code is called where git does not tell")
    only: tuple[str, ...] = Field((), description="names of sections; else all")
    repeats: opt.Repeats = 10


class Row(Timing):
    """A call's time, and what else is known of it.

    Its deviation, in 8-bit levels, is that from the faces of the first call that it took turns with; codes
    are compared with those of safe mode; its limit is what the least work takes at the measured ceilings.
    """

    largest_levels: Amount | None = None
    mean_levels: Amount | None = None
    equal_codes: Share | None = None
    times_limit: Amount | None = None


class NotRunError(Exception):
    """A section cannot run here, which is no fault."""


class Rig:
    """Networks of official size on a GPU, those of the set on a CPU; and the section that runs.

    Attributes:
        small: the set's own networks, which are trained: rounding errors stay small in them.
        sizes: of batches, the most telling ones first; of numbers of faces, too.
        crops: eight aligned faces, (8, 512, 512, 3) uint8 BGR.
        ends: the moment of `time.monotonic` from which on the section begins nothing more.
        at_work: which comparison runs.
        rows: what the section has found so far, like `facts`; one that fails leaves it.
        left_out: what it had no time for.
    """

    def __init__(self, options: Options) -> None:
        started = time.monotonic()
        loaded = options.load()
        self.options = options
        self.header = loaded.header
        self.device = loaded.device
        self.on_gpu = loaded.device.type == "cuda"
        self.small = loaded.models
        self.models = with_official_sizes(self.small, self.device) if self.on_gpu else self.small
        self.sizes = (1, 8, 4, 2, 3, 5, 6, 7) if self.on_gpu else (1, 2)
        self.half_dtype = half_dtype_of(self.device)
        portrait = decode_image((SAMPLES / "1.jpg").read_bytes())
        face = torch.from_numpy(cv2.resize(portrait, (FACE_SIZE, FACE_SIZE)))
        self.crops = torch.stack([face.roll(8 * shift, 0) for shift in range(8)]).to(self.device)
        self.setup_s = time.monotonic() - started
        self.begin(0.0)

    def begin(self, seconds: float) -> None:
        """Begins a section that has so many seconds."""
        self.ends = time.monotonic() + _TO_BEGIN_IN * seconds
        self.rows: dict[str, Row] = {}
        self.facts: dict[str, Fact] = {}
        self.left_out: list[str] = []
        self.at_work = ""

    @property
    def is_over(self) -> bool:
        """Whether there is no time to begin anything more."""
        return time.monotonic() >= self.ends

    def left_s(self) -> float:
        """Seconds in which the section may begin something."""
        return max(0.1, self.ends - time.monotonic())

    @cached_property
    def safe_codes(self) -> Tensor:
        """The codes of `crops` in safe mode, face by face: (8, T)."""
        with torch_switches(cudnn_benchmark=True):
            return torch.cat([codes_of(self.models, crop[None]) for crop in self.crops])

    def compare(self, what: str, calls: Mapping[str, Call], ends: float) -> dict[str, Row]:
        """Rows of calls in turns; if their answers are pictures, with the deviation from the first one's."""
        self.at_work = what
        with torch.inference_mode(), torch_switches(cudnn_benchmark=True):
            repeats = self.options.repeats
            samples = interleave(calls, self.device, warmup=2, repeats=repeats, ends=ends)
        expected = next(iter(samples.values()))
        rows = {
            f"{what}, {name}": Row(**dict(timing), **_deviation(samples[name], expected))
            for name, timing in timings_of(samples).items()
        }
        self.rows |= rows
        return rows

    def compare_all(self, comparisons: Mapping[str, Mapping[str, Call]]) -> None:
        """Each of the comparisons in its share of the time; what there is none for is named."""
        shares = Shares(self.ends, len(comparisons))
        for (what, calls), ends in zip(comparisons.items(), shares, strict=True):
            if ends is None:
                self.left_out.append(what)
            else:
                self.compare(what, calls, ends)

    def compare_models(
        self, variants: Mapping[str, Models], sizes: Sequence[int], fidelities: Sequence[float]
    ) -> None:
        """Times of restoring batches, and what differs from the first variant's faces and from safe codes."""
        works = list(product(sizes, fidelities))
        for (size, w), ends in zip(works, Shares(self.ends, len(works)), strict=True):
            what = f"{size} faces, w {w:g}"
            if ends is None:
                self.left_out.append(what)
                continue
            calls = {name: partial(self.restored, models, size, w) for name, models in variants.items()}
            for (label, row), models in zip(
                self.compare(what, calls, ends).items(), variants.values(), strict=True
            ):
                with torch_switches(cudnn_benchmark=True):
                    equal = codes_of(models, self.crops[:size]) == self.safe_codes[:size]
                self.rows[label] = row.model_copy(update={"equal_codes": float(equal.double().mean())})

    def restored(self, models: Models, size: int, w: float) -> Tensor:
        """The first faces of `crops`, restored in one batch."""
        restorer = models.restorers["codeformer"]
        return restorer.restore(self.crops[:size], [w] * size, half_dtype=self.half_dtype)[0]


def codes_of(models: Models, crops: Tensor) -> Tensor:
    restorer: Any = models.restorers["codeformer"]
    codes: Tensor = restorer.codes(crops)
    return codes


def _deviation(samples: Samples, expected: Samples) -> dict[str, Any]:
    ours, theirs = samples.results[-1], expected.results[-1]
    if samples is expected or not isinstance(ours, Tensor) or ours.dtype != torch.uint8:
        return {}
    levels = (ours.short() - theirs.short()).abs().float()
    return {"largest_levels": float(levels.max()), "mean_levels": round(float(levels.mean()), 5)}
