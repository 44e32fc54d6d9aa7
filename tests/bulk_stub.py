"""`codeformer bulk` with a pipeline that takes no time; run as a program, it is the command line with that
pipeline.

A picture tells what becomes of it: one that is POISON all over kills the process that looks at it. The
variable DELAY gives each picture so many seconds, in workers on other nodes, too.
"""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from codeformer.bulk.job import Job
from codeformer.bulk.ledger import Ledger
from codeformer.bulk.stores import open_store
from codeformer.cli import bulk
from codeformer.cli.main import main
from codeformer.engine.pipeline import Pipeline
from codeformer.imaging.geometry import FFHQ_TEMPLATE_XY, Detection, transform_points
from tests.conftest import CPU, models_of
from tests.test_faces import FixedDetector, Negative
from tests.test_pasting import similarity

POISON = 66
DELAY = "CODEFORMER_STUB_DELAY_S"
ODD_NAMES = (
    "a b",
    "ünïcode",
    "日本",
    "#1?",
    "50%",
    "[x]",
    "'q'",
    "new\nline",
    "dots..",
    "tab\t",
    "-dash",
    "{}",
)


class Detector(FixedDetector):
    """Finds one face in each picture, and dies of some."""

    def __init__(self) -> None:
        super().__init__(transform_points(similarity(0.3, 0, 90, 90), FFHQ_TEMPLATE_XY))

    def detect(self, images_bgr: Sequence[np.ndarray], *, batched: bool = True) -> list[list[Detection]]:
        for image in images_bgr:
            if (image == POISON).all():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(float(os.environ.get(DELAY, "0")))
        return super().detect(images_bgr, batched=batched)


def load(_: Job) -> Pipeline:
    """One face in each picture, whose negative is pasted."""
    return Pipeline(models_of(Detector(), Negative()), CPU, second_look=False)


def use_stub(patch: Any) -> None:
    """Makes the command use the stub, in this process and in all workers.

    Args:
        patch: sets an attribute of an object, as `setattr` does.
    """
    made = bulk.job_of

    def job_of(*arguments: Any) -> Job:
        return dataclasses.replace(made(*arguments), loader=load)

    patch(bulk, "job_of", job_of)


def write_pictures(
    folder: Path, count: int, *, broken: Sequence[int] = (), poison: Sequence[int] = ()
) -> None:
    """Small pictures in nested folders with odd names; some of them cut short, some that kill."""
    for number in range(count):
        odd = ODD_NAMES[number % len(ODD_NAMES)]
        below = folder / f"{number % 7}" / odd if number % 3 else folder / odd
        below.mkdir(parents=True, exist_ok=True)
        value = POISON if number in poison else 70 + number % 100
        # In colour, since the engine takes more trouble with grey ones.
        image = np.full((96, 128, 3), value, np.uint8)
        if number not in poison:
            image[:48, :, 0] = image[48:, :, 2] = 250
            image[:, : number % 128, 1] = number // 128
        ok, data = cv2.imencode(".png" if number % 2 or number in poison else ".jpg", image)
        assert ok
        content = data.tobytes()
        suffix = ".png" if number % 2 or number in poison else ".jpg"
        path = below / f"{odd} {number}{suffix}"
        path.write_bytes(content[: len(content) // 2] if number in broken else content)


def final_rows(target: Path | str, ledger: str | None = None) -> list[dict[str, Any]]:
    """The final rows of a target's ledger."""
    rows: list[dict[str, Any]] = (
        Ledger(open_store(ledger or f"{target}/_ledger"), "", "").final_rows().to_pylist()
    )
    return rows


def outputs(target: Path) -> set[str]:
    """The names of all files in a target but for its ledger; also partial ones."""
    return {
        str(path.relative_to(target))
        for path in target.rglob("*")
        if path.is_file() and path.relative_to(target).parts[0] != "_ledger"
    }


if __name__ == "__main__":
    use_stub(setattr)
    sys.exit(main(sys.argv[1:]))
