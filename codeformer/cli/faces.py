"""`codeformer faces`: each face's crop and restored crop as PNG files, and its place in the photo as JSON."""

import argparse
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from codeformer.cli.arguments import (
    add_command,
    add_loudness,
    add_networks,
    add_options,
    load_pipeline,
    options_of,
    shown,
)
from codeformer.cli.files import FULL_DISK, folded, temporary
from codeformer.cli.reports import Report, json_line, numbers_of, photo_in_log, place_of, progress, say
from codeformer.errors import CodeFormerError, InputError
from codeformer.limits import Limits
from codeformer.options import Options

if TYPE_CHECKING:
    import numpy as np

    from codeformer.cli.photos import Photo
    from codeformer.engine.pipeline import Pipeline, RestoredImage
    from codeformer.imaging.files import ImageU8

INDEX: Final = "faces.jsonl"
_CROP: Final = "crop"
_RESTORED: Final = "restored"
_LONGEST_STEM_BYTES: Final = 200
_NAME: Final = re.compile(rf"(.*)_\d+_(?:{_CROP}|{_RESTORED})\.png", re.DOTALL)
_FACTS: Final = (
    *("number", "reason", "box", "landmarks", "score"),
    *("picture_to_face", "face_to_picture", "crop_file", "restored_file"),
)


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "faces",
        "write the aligned crop of each face, the restored crop, and its place in the photo as JSON",
        "codeformer faces album/ -o faces --faces largest",
    )
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="a file or a folder")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("faces"),
        metavar="DIR",
        help="folder for the crops; default: faces",
    )
    add_options(parser, pastes=False)
    add_networks(parser)
    parser.add_argument("-r", "--recursive", action="store_true", help="include subfolders")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files in DIR, except photos that are named"
    )
    add_loudness(parser)
    parser.set_defaults(command=_faces)


def _faces(options: argparse.Namespace) -> int:
    from codeformer.cli.photos import PhotoFinder

    asked = options_of(options)
    limits = Limits.from_environment()
    report = Report(as_json=False, quiet=options.quiet, options={})
    finder = PhotoFinder(options.output, recursive=options.recursive, skip=report.skip, fail=report.fail)
    photos = finder.find(options.photos)
    if not photos and not report.failures:
        raise InputError(f"{', '.join(map(shown, options.photos))}: expected photos, found none.")
    if photos:
        with FaceFolder(options.output, photos, overwrite=options.overwrite) as folder:
            pipeline = load_pipeline(options, asked.restorer.split("+"))
            with photo_in_log() as set_photo:
                for photo in progress(photos, quiet=options.quiet):
                    set_photo(photo.path)
                    try:
                        lines = folder.write(photo, _restored(pipeline, photo, asked, limits))
                    except (CodeFormerError, OSError) as failure:
                        if isinstance(failure, OSError) and failure.errno in FULL_DISK:
                            raise InputError(
                                f"--output {shown(options.output)}: expected room for the crops, got: "
                                f"{failure.strerror}; free space there."
                            ) from failure
                        reason = failure.local if isinstance(failure, CodeFormerError) else str(failure)
                        report.fail(photo.path, reason)
                        lines = [_line(photo, "failed", reason=reason)]
                    for line in lines:
                        folder.add(line)
                        if not options.quiet:
                            say(line)
    return int(bool(report.failures))


def _restored(pipeline: "Pipeline", photo: "Photo", asked: Options, limits: Limits) -> "RestoredImage":
    from codeformer.engine.pipeline import recipe_for
    from codeformer.engine.plan import plan_for
    from codeformer.imaging.files import decode_image
    from codeformer.limits import Deadline
    from codeformer.serving.fetching import DEFAULT_POLICY
    from codeformer.serving.request import read_source

    deadline = Deadline(limits.max_seconds)
    image = decode_image(read_source(photo.path, 1, limits, DEFAULT_POLICY, deadline), 1, limits)
    [result] = pipeline.restore(
        [image],
        # Crops are taken before the paste, so nobody reads a mask.
        plan=dataclasses.replace(plan_for(asked, pipeline.device), parse_faces=False),
        limits=limits,
        recipe=recipe_for(asked),
        selection=asked.selection,
        keep_crops=True,
    )
    return result


class FaceFolder:
    """Names and writes the files of one run, and lists them in `faces.jsonl`.

    The files of a photo's first face are `STEM_1_crop.png` and `STEM_1_restored.png`, with `STEM_2` in the
    place of `STEM` if another photo of the run, or another file, has that name.

    Args:
        folder: the output folder; made if need be.
        photos: all photos of this run, which are never overwritten.
        overwrite: replace other files, the list of an earlier run among them.

    Raises:
        InputError: the folder cannot be written, or has the list of an earlier run.
    """

    def __init__(self, folder: Path, photos: "Sequence[Photo]", *, overwrite: bool) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            index = folder / INDEX
            if index.exists() and not overwrite:
                raise InputError(
                    f"--output {shown(folder)}: has the faces of an earlier run; choose another folder, or "
                    "replace them with --overwrite."
                )
            place = folder.resolve()
            taken = [photo.place.name for photo in photos if photo.place.parent == place]
            if not overwrite:
                taken += [path.name for path in folder.iterdir()]
            self._list = index.open("w", encoding="ascii")
        except OSError as cause:
            raise InputError(f"--output {shown(folder)}: cannot be written ({cause.strerror}).") from cause
        self._stems: dict[Photo, str] = {}
        stems = {found[1] for name in taken if (found := _NAME.fullmatch(folded(name)))}
        for photo in photos:
            self._stems[photo] = next(stem for stem in _stems_of(photo) if folded(stem) not in stems)
            stems.add(folded(self._stems[photo]))

    def __enter__(self) -> "FaceFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._list.close()

    def write(self, photo: "Photo", result: "RestoredImage") -> list[str]:
        """Writes the crops of a photo's faces.

        Returns:
            A line for each face: those that were restored, best score first, then those left as they are.

        Raises:
            OSError: a file cannot be written.
        """
        lines = []
        for number, (face, crops) in enumerate(zip(result.faces, result.crops, strict=True), start=1):
            files = [_name(self._stems[photo], number, kind) for kind in (_CROP, _RESTORED)]
            for file, image in zip(files, (crops.crop_bgr, crops.restored_bgr), strict=True):
                self._write(file, image)
            lines.append(
                _line(
                    photo,
                    "restored",
                    number=number,
                    **place_of(face),
                    picture_to_face=_matrix(face.picture_to_face),
                    face_to_picture=_matrix(face.face_to_picture),
                    crop_file=files[0],
                    restored_file=files[1],
                )
            )
        for number, skipped in enumerate(result.skipped_faces, start=len(lines) + 1):
            lines.append(_line(photo, "skipped", number=number, reason=skipped.reason, **place_of(skipped)))
        return lines or [_line(photo, "no_face")]

    def add(self, line: str) -> None:
        """Adds a line to the list, once its files are there."""
        self._list.write(f"{line}\n")
        self._list.flush()

    def _write(self, name: str, image_bgr: "ImageU8") -> None:
        import cv2

        _, data = cv2.imencode(".png", image_bgr)
        with temporary(self._folder, data.tobytes()) as part:
            part.replace(self._folder / name)


def _line(photo: "Photo", status: str, **facts: Any) -> str:
    return json_line({"source": str(photo.path), "status": status} | dict.fromkeys(_FACTS) | facts)


def _matrix(transform: "np.ndarray[Any, Any]") -> list[list[float | None]]:
    return [numbers_of(row, digits=9) for row in transform]


def _name(stem: str, number: int, kind: str) -> str:
    return f"{stem}_{number}_{kind}.png"


def _stems_of(photo: "Photo") -> Iterator[str]:
    """The beginnings that a photo's names may have: bounded, since file systems bound names."""
    name = photo.path.stem
    while len(os.fsencode(name)) > _LONGEST_STEM_BYTES:
        name = name[:-1]
    yield name
    yield from (f"{name}_{number}" for number in count(2))
