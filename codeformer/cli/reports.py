"""What commands tell: results on standard output, everything else on standard error.

As text for people, or as JSON for programs: one object a line, in ASCII, written as soon as it is known.
"""

import contextlib
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from codeformer.cli.arguments import is_progress_shown, shown

if TYPE_CHECKING:
    import numpy as np

    from codeformer.engine.picture import RestoredImage
    from codeformer.imaging.geometry import Face, SkippedFace
    from codeformer.serving.request import Metrics

ItemT = TypeVar("ItemT")

_TIMING: Final = "timing."
# Photos are restored one by one, so that their number tells nothing.
_NUMBER: Final = re.compile(r"\bimage 1\b:? ?")


class Report:
    """The lines of one run.

    Args:
        as_json: results as JSON objects. Photos that failed or were skipped then have one, too.
        quiet: nothing but failures on standard error, and no text on standard output.
        options: what was asked for, as JSON types; part of each object.

    Attributes:
        failures: how many photos have failed.
    """

    def __init__(self, *, as_json: bool, quiet: bool, options: Mapping[str, Any]) -> None:
        self.failures = 0
        self._as_json = as_json
        self._quiet = quiet
        self._options = options

    def fail(self, path: Path, reason: str) -> None:
        """A photo that was asked for and cannot be restored."""
        self.failures += 1
        say(f"failed: {shown(path)}: {reason}", to_errors=True)
        self._tell(path, None, "failed", error=reason)

    def skip(self, path: Path, reason: str, target: Path | None = None) -> None:
        """A file that is left out; `target` is its earlier result, if that is why."""
        if not self._quiet:
            say(f"skipped: {shown(path)}: {reason}", to_errors=True)
        self._tell(path, target, "skipped", error=reason)

    def restored(
        self, path: Path, target: Path, note: str, result: "RestoredImage", metrics: "Metrics"
    ) -> None:
        """A photo that has a result; `note` is for people."""
        if not self._quiet and not self._as_json:
            say(f"{shown(path)} -> {shown(target)} ({note})")
        self._tell(
            path,
            target,
            "restored" if result.faces else "no_face",
            faces=[place_of(face) for face in result.faces],
            skipped_faces=[{"reason": face.reason, **place_of(face)} for face in result.skipped_faces],
            restorers=metrics["models.restorers"],
            times_ms={
                name.removeprefix(_TIMING): value
                for name, value in metrics.items()
                if name.startswith(_TIMING)
            },
        )

    def _tell(self, source: Path, target: Path | None, status: str, **facts: Any) -> None:
        if self._as_json:
            always = {"source": str(source), "target": target and str(target), "status": status}
            empty: dict[str, Any] = {
                "error": None,
                "faces": [],
                "skipped_faces": [],
                "restorers": [],
                "times_ms": {},
            }
            say(json_line(always | empty | facts | {"options": self._options}))


def json_line(content: Mapping[str, Any]) -> str:
    r"""One line of JSON in ASCII.

    Bytes of a file name that are no UTF-8 become \udc80 to \udcff, as Python's own functions name such files.
    """
    return json.dumps(content, allow_nan=False)


def place_of(face: "Face | SkippedFace") -> dict[str, Any]:
    """Box, landmarks and score of a face as JSON types, in px of the picture; null where not finite."""
    return {
        "box": numbers_of(face.box_xyxy),
        "landmarks": [numbers_of(point) for point in face.landmarks_xy],
        "score": round(float(face.score), 4),
    }


def numbers_of(values: "np.ndarray[Any, Any]", digits: int = 2) -> list[float | None]:
    """A row of numbers, rounded; None for those that are not finite."""
    return [round(value, digits) if math.isfinite(value) else None for value in map(float, values)]


def progress(items: Sequence[ItemT], *, quiet: bool) -> Iterator[ItemT]:
    """The items one after another, with a bar on standard error if that is a terminal."""
    from tqdm import tqdm

    is_shown = is_progress_shown(quiet=quiet) and len(items) > 1
    yield from tqdm(items, desc="restoring", unit="photo", disable=not is_shown)


@contextlib.contextmanager
def photo_in_log() -> Iterator[Callable[[Path], None]]:
    """Names the current photo in each log line, in place of its number; yields a function that sets it."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    name = ""

    def set_photo(path: Path) -> None:
        nonlocal name
        name = shown(path)

    def add_name(record: logging.LogRecord) -> bool:
        if not hasattr(record, "photo"):
            # The filter runs once per handler; the prefix is added only once.
            record.photo = name
            record.msg, record.args = f"{name}: {_NUMBER.sub('', record.getMessage())}", ()
        return True

    with logging_redirect_tqdm():
        handlers = list(logging.getLogger().handlers)
        for handler in handlers:
            handler.addFilter(add_name)
        try:
            yield set_photo
        finally:
            for handler in handlers:
                handler.removeFilter(add_name)


def say(line: str, *, to_errors: bool = False) -> None:
    """Prints a line without tearing the progress bar."""
    from tqdm import tqdm

    stream = sys.stderr if to_errors else sys.stdout
    with tqdm.external_write_mode(file=stream):
        print(line, file=stream, flush=True)
