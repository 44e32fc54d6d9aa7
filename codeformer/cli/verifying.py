"""`codeformer verify-official`: whether the official files, once fetched, do here what they are known for."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from codeformer.cli.arguments import add_command, is_progress_shown
from codeformer.errors import CodeFormerError
from codeformer.locations import shipped
from codeformer.weights.manifest import DEFAULT_SET, OPTIONAL_ROLES, WeightSet, load_weight_set

if TYPE_CHECKING:
    from codeformer.engine.pipeline import Pipeline
    from codeformer.imaging.files import ImageU8

_VERIFIED: Final = "VERIFIED"
_NOT_VERIFIED: Final = "NOT VERIFIED"
# The least that a restored face has to gain on the degraded one. docs/operations.md has the reasons.
LEAST_GAIN_DB: Final = 0.0
LEAST_GAIN_SSIM: Final = 0.0
LEAST_GAIN_DETAIL: Final = 0.1


@dataclass(frozen=True)
class Closeness:
    """How close a face is to its original.

    Attributes:
        psnr_db: as `quality.psnr_db`.
        ssim: as `quality.ssim`.
        detail: as `quality.detail_agreement`: a kind of sharpness.
    """

    psnr_db: float
    ssim: float
    detail: float

    def __str__(self) -> str:
        return f"{self.psnr_db:7.2f} dB  {self.ssim:8.3f}  {self.detail:8.2f}"


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "verify-official",
        "fetch the official weights, restore a degraded sample and compare it with its original",
        "codeformer verify-official --with gfpgan",
    )
    parser.add_argument(
        "--with",
        dest="optional",
        choices=OPTIONAL_ROLES,
        help="verify this restorer as well",
    )
    parser.add_argument(
        "--weights", metavar="SET", default=DEFAULT_SET, help="a set's name or folder; default: official"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; default: CODEFORMER_DEVICE, else auto")
    parser.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    restorers = ("codeformer", *filter(None, [options.optional]))
    try:
        weight_set = load_weight_set(options.weights)
        objections = list(_objections(weight_set, restorers, options.device))
    except CodeFormerError as failure:
        objections = [failure.local]
    if objections:
        print(f"{_NOT_VERIFIED}: {'; '.join(objections)}")
        return 1
    print(f"{_VERIFIED}: the restored face is closer to its original than the degraded one, in detail too.")
    return 0


def _objections(weight_set: WeightSet, restorers: tuple[str, ...], device: str | None) -> Iterator[str]:
    """What speaks against the set; prints what is found out on the way.

    Raises:
        CodeFormerError: the files cannot be fetched or used, or a face cannot be restored.
    """
    from codeformer.engine.pipeline import Pipeline
    from codeformer.imaging.files import decode_image
    from codeformer.weights.download import fetch_set

    fetch_set(weight_set, restorers, progress=is_progress_shown())
    for _, file in weight_set.files(restorers):
        print(f"{file.path.name:30} verified by its sha256, {file.sha256[:16]}..., {file.size_bytes:,} bytes")
    pipeline = Pipeline.load(weight_set, device, restorers=restorers, download=False)
    clean, degraded = (
        decode_image((shipped("data") / "pair" / name).read_bytes()) for name in ("clean.png", "degraded.png")
    )
    print(f"{'face':20} {'PSNR':>10}  {'SSIM':>8}  {'detail':>8}")
    for restorer in pipeline.models.restorers:
        yield from (f"{restorer}: {objection}" for objection in compare(pipeline, restorer, clean, degraded))


def compare(
    pipeline: "Pipeline", restorer: str, clean_bgr: "ImageU8", degraded_bgr: "ImageU8"
) -> Iterator[str]:
    """Restores a degraded portrait, prints how close it has come, and says what speaks against it.

    Args:
        pipeline: with this restorer.
        restorer: its name.
        clean_bgr: (H, W, 3) uint8 BGR, the original.
        degraded_bgr: the same portrait, degraded; of the same size.
    """
    from codeformer.engine.pipeline import recipe_of
    from codeformer.options import DEFAULT_FIDELITY

    [result] = pipeline.restore([degraded_bgr], recipe=recipe_of(restorer, DEFAULT_FIDELITY))
    if len(result.faces) != 1:
        yield f"expected one face in the sample, found {len(result.faces)}"
        return
    left, top, right, bottom = result.faces[0].box_xyxy.round().astype(int).clip(0).tolist()
    before, after = (
        closeness(picture[top:bottom, left:right], clean_bgr[top:bottom, left:right])
        for picture in (degraded_bgr, result.image_bgr)
    )
    print(f"{'degraded':20} {before}")
    print(f"{f'by {restorer}':20} {after}")
    yield from objections_to(before, after)


def closeness(face_bgr: "ImageU8", truth_bgr: "ImageU8") -> Closeness:
    """How close a face (H, W, 3) uint8 BGR is to its original."""
    from codeformer.imaging import quality

    return Closeness(
        quality.psnr_db(face_bgr, truth_bgr),
        quality.ssim(face_bgr, truth_bgr),
        quality.detail_agreement(face_bgr, truth_bgr),
    )


def objections_to(before: Closeness, after: Closeness) -> Iterator[str]:
    """What speaks against a restored face: too little gained on the degraded one."""
    for name, gained, least in (
        ("PSNR in dB", after.psnr_db - before.psnr_db, LEAST_GAIN_DB),
        ("SSIM", after.ssim - before.ssim, LEAST_GAIN_SSIM),
        ("detail", after.detail - before.detail, LEAST_GAIN_DETAIL),
    ):
        # Also where it is not a number.
        if not gained >= least:
            yield f"expected the face to gain at least {least:g} of {name}, got {gained:+.3f}"
