"""A page of held-out pictures before and after, for the eye: what no number tells."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from codeformer.engine.pipeline import Pipeline, recipe_of
from codeformer.evaluation.degradation import HEAVY, MODERATE
from codeformer.imaging.files import ImageU8
from codeformer.training.faces import read_face, read_photograph
from codeformer.training.scores import EVALUATION_SEED, FIDELITIES, restore_face

PAGE_NAME: Final = "index.html"
# One face in this many is degraded heavily, the others moderately.
_HEAVY_SHARE: Final = 3
_QUALITY: Final = 90
_STYLE: Final = "body{font:14px sans-serif;margin:1em}td{padding:2px}img{max-width:19vw;display:block}"

Row = tuple[str, dict[str, ImageU8]]


def write_page(pipeline: Pipeline, faces: Sequence[Path], photographs: Sequence[Path], folder: Path) -> Path:
    """Restores pictures with all restorers and fidelities and writes them side by side.

    Args:
        pipeline: with the restorers to show.
        faces: aligned 512 px faces, which are degraded first.
        photographs: whole pictures, which are not.
        folder: where to; made if it is missing.

    Returns:
        The page's file.

    Raises:
        InputError: a file is not a usable picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, pictures in (*_face_rows(pipeline, faces), *_photograph_rows(pipeline, photographs)):
        cells = []
        for column, picture in pictures.items():
            file = f"{name}_{column.replace(' ', '_')}.jpg"
            cv2.imwrite(str(folder / file), picture, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
            source = html.escape(file, quote=True)
            cells.append(f'<td>{html.escape(column)}<a href="{source}"><img src="{source}" alt=""></a></td>')
        rows.append(f'<tr><td colspan="{len(cells)}">{html.escape(name)}</td></tr><tr>{"".join(cells)}</tr>')
    page = folder / PAGE_NAME
    page.write_text(
        f'<!doctype html><meta charset="utf-8"><title>Before and after</title><style>{_STYLE}</style>'
        f"<table>{''.join(rows)}</table>",
        encoding="utf-8",
    )
    return page


def _face_rows(pipeline: Pipeline, files: Sequence[Path]) -> Iterator[Row]:
    """Input, results and original of degraded faces; the degradations are those of the scores."""
    for index, file in enumerate(files):
        truth = read_face(file)
        rng = np.random.default_rng((EVALUATION_SEED, index))
        kind = HEAVY if index % _HEAVY_SHARE == _HEAVY_SHARE - 1 else MODERATE
        degraded = kind.sample(rng).apply(truth, rng)
        results = {"input": degraded}
        for name, restorer in pipeline.models.restorers.items():
            for w in FIDELITIES if restorer.facts.takes_fidelity else (None,):
                results[_column(name, w)] = restore_face(restorer, w, degraded)
        yield file.stem, results | {"original": truth}


def _photograph_rows(pipeline: Pipeline, files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        picture = read_photograph(file)
        results = {"input": picture}
        for name, restorer in pipeline.models.restorers.items():
            for w in FIDELITIES if restorer.facts.takes_fidelity else (None,):
                recipe = recipe_of(name, w if w is not None else 1.0)
                [restored] = pipeline.restore([picture], recipe=recipe)
                results[_column(name, w)] = restored.image_bgr
        yield file.stem, results


def _column(name: str, fidelity: float | None) -> str:
    return name if fidelity is None else f"w = {fidelity:g}"
