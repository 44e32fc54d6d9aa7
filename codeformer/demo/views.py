"""Makes HTML of comparisons; the page and the command line use the same templates."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from codeformer.demo.comparison import ALL_STAGES, Comparison, Price
from codeformer.demo.published import ADVICE, CAVEAT, PUBLISHED
from codeformer.engine.stages import STAGES
from codeformer.evaluation.machine import describe_machine
from codeformer.imaging.files import ImageU8
from codeformer.weights.manifest import DEFAULT_SET, WeightSet, load_weight_set

STATIC: Final = Path(__file__).with_name("static")
# Faces of each photo that are shown one by one; all of them are measured.
_SHOWN_FACES: Final = 4
_FACE_PX: Final = 320
_PICTURE_PX: Final = 800
_QUALITY: Final = 88


@dataclass(frozen=True)
class Setup:
    """What pictures are restored with.

    Attributes:
        weights: name of the set.
        description: of the set.
        is_official: whether the restorers are the published ones.
        machine: as `describe_machine` tells.
    """

    weights: str
    description: str
    is_official: bool
    machine: Mapping[str, Any]

    @classmethod
    def of(cls, weights: WeightSet, device: torch.device) -> "Setup":
        """The setup of a pipeline with this set on this device."""
        return cls(
            weights.name,
            weights.description,
            _restorers_of(weights) <= _restorers_of(load_weight_set(DEFAULT_SET)),
            describe_machine(device),
        )

    @property
    def device(self) -> str:
        """The device by its name."""
        return str(self.machine["device"]["name"])


def _restorers_of(weights: WeightSet) -> set[str]:
    """The hashes of a set's restorers."""
    return {file.sha256 for file in (weights.restorer, *weights.optional.values())}


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"picture": _picture_uri, "face": _face_uri, "time": shown_time}
    environment.globals |= {
        "stages": ALL_STAGES,
        "published": PUBLISHED,
        "caveat": CAVEAT,
        "advice": ADVICE,
        "shown_faces": _SHOWN_FACES,
    }
    return environment


def render_page(**facts: object) -> str:
    """The page to try; see templates/page.html for what it shows."""
    return _environment().get_template("page.html").render(facts)


def render_comparison(
    comparisons: Sequence[Comparison], setup: Setup, plan: str, repeats: int, price: Price | None
) -> str:
    """Photos by several recipes, as a part of a page.

    Args:
        comparisons: one for each photo.
        setup: what they were restored with.
        plan: profile and mode, in words.
        repeats: measured runs of each recipe.
        price: of the device; None to leave costs out.
    """
    template = _environment().get_template("comparison.html")
    return template.render(comparisons=comparisons, setup=setup, plan=plan, repeats=repeats, price=price)


def render_file(part: str) -> str:
    """A page of its own around what `render_comparison` returns; needs no other file and no network."""
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    template = _environment().get_template("file.html")
    return template.render(part=part, style=style)


def render_times(elapsed_ms: Mapping[str, float]) -> str:
    """The time of each stage of one picture, as a bar with its legend."""
    times = {stage: elapsed_ms.get(stage, 0.0) for stage in STAGES}
    return _environment().get_template("times.html").render(times=times)


def shown_time(milliseconds: float) -> str:
    """A time with a unit that suits it."""
    seconds = milliseconds / 1e3
    if seconds >= 0.9995:
        text = f"{seconds:,.0f} s" if seconds >= 99.95 else f"{seconds:.3g} s"
    else:
        text = f"{milliseconds:.0f} ms" if milliseconds >= 1 else "< 1 ms"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def to_jpeg(image_bgr: ImageU8, longest_px: int) -> bytes:
    """A JPEG to look at, whose longer side is at most this long."""
    scale = longest_px / max(image_bgr.shape[:2])
    if scale < 1:
        image_bgr = np.asarray(
            cv2.resize(image_bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8
        )
    _, data = cv2.imencode(".jpg", image_bgr, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return data.tobytes()


def _picture_uri(image_bgr: ImageU8) -> str:
    return _data_uri(to_jpeg(image_bgr, _PICTURE_PX))


def _face_uri(crop_bgr: ImageU8) -> str:
    return _data_uri(to_jpeg(crop_bgr, _FACE_PX))


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
