"""Generates the benchmark pictures, data/1.jpg ... data/100.jpg, and their description, data/pictures.json.

Portraits, groups and crowds; faces from 40 px to the whole frame, turned, or cut off by the border; grey,
sepia and framed pictures; in common sizes, degraded in the ranges of the CodeFormer paper. All faces are from
NASA's portrait of astronaut Eileen Collins (public domain); backgrounds are public-domain and CC0 pictures,
all from scikit-image. A picture depends only on its number and, with the pinned tools, is the same byte for
byte.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import cv2
import numpy as np
import skimage.data
from tqdm import tqdm

from codeformer.evaluation.degradation import HEAVY, MILD, MODERATE, Degradation
from codeformer.imaging.files import ImageU8

FOLDER: Final = Path(__file__).resolve().parent
COUNT: Final = 100
SEED: Final = 2022
# Written together with the pictures.
INDEX: Final = "pictures.json"
# The folder of a portrait and its degraded copy, with which `codeformer verify-official` verifies weights.
PAIR: Final = "pair"

# The face in NASA's portrait, in its pixels, measured by hand: the centre of eyes and mouth, the width from
# ear to ear, and the landmarks (eyes, nose, corners of the mouth).
FACE_CENTRE_XY: Final = (224.0, 122.0)
FACE_WIDTH: Final = 84.0
LANDMARKS_XY: Final = ((204.0, 104.0), (243.0, 104.0), (225.0, 128.0), (206.0, 143.0), (244.0, 143.0))
HEAD: Final = np.s_[0:262, 122:326]

Kind = Literal["portrait", "close_up", "whole_frame", "pair", "group", "crowd", "cut", "far"]
Tone = Literal["colour", "grey", "sepia"]

# Repeated for every twenty pictures.
KINDS: Final[tuple[Kind, ...]] = (
    *("portrait", "pair", "portrait", "group", "close_up", "portrait", "far", "portrait", "pair", "crowd"),
    *("portrait", "cut", "portrait", "group", "whole_frame", "portrait", "pair", "portrait", "group"),
    "close_up",
)
SIZES_WH: Final = (
    *[(640, 832)] * 9,
    *[(832, 640), (512, 512), (480, 640), (768, 1024), (1024, 768), (1280, 720), (1080, 1350), (1600, 1200)],
    *[(300, 400), (1920, 1080), (2400, 3000)],
)
GROUNDS: Final = ("coffee", "rocket", "brick", "grass", "gravel", "moon", "hubble_deep_field")
# Width in px of faces in crowds. Larger on larger pictures, because these are reduced for detection.
SMALL_FACE: Final = (40.0, 60.0)
REDUCED_SIDE: Final = 640


@dataclass(frozen=True)
class Placement:
    """A face on a picture.

    Attributes:
        centre_xy: its centre, in px of the picture.
        width: width from ear to ear, in px.
        turn_deg: rotation in degrees, counter-clockwise.
        mirrored: whether left and right are exchanged.
        gain_bgr: factors of its colour channels.
    """

    centre_xy: tuple[float, float]
    width: float
    turn_deg: float
    mirrored: bool
    gain_bgr: tuple[float, float, float]

    @property
    def matrix(self) -> np.ndarray:
        """The (2, 3) transform from pixels of the portrait to pixels of the picture."""
        scale = self.width / FACE_WIDTH
        matrix = cv2.getRotationMatrix2D(FACE_CENTRE_XY, self.turn_deg, scale)
        if self.mirrored:
            flip = np.array([[-1, 0, 2 * FACE_CENTRE_XY[0]], [0, 1, 0], [0, 0, 1]])
            matrix = matrix @ flip
        matrix[:, 2] += np.subtract(self.centre_xy, FACE_CENTRE_XY)
        return np.asarray(matrix)

    def landmarks_xy(self) -> list[list[float]]:
        """Left and right eye, nose, left and right corner of the mouth (as seen by the viewer), in px."""
        order = (1, 0, 2, 4, 3) if self.mirrored else (0, 1, 2, 3, 4)
        points = np.array(LANDMARKS_XY)[list(order)]
        return [
            [round(float(v), 1) for v in point] for point in points @ self.matrix[:, :2].T + self.matrix[:, 2]
        ]


@dataclass(frozen=True)
class Recipe:
    """How to generate one picture.

    Attributes:
        number: number of the picture, from 1.
        kind: its content.
        size_wh: width and height in px, including the frame.
        ground: the background; "portrait" for that of NASA's portrait.
        faces: the faces, in the order of pasting.
        tone: colour, grey or sepia.
        frame: width of the light frame in px, 0 for none.
        degradation: degradation of the whole picture; None for a clean picture.
    """

    number: int
    kind: Kind
    size_wh: tuple[int, int]
    ground: str
    faces: tuple[Placement, ...]
    tone: Tone
    frame: int
    degradation: Degradation | None


def main() -> None:
    """Writes the pictures and their index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="default: data/")
    parser.add_argument("--count", type=int, default=COUNT, help=f"number of pictures, default {COUNT}")
    parser.add_argument(
        "--clean", action="store_true", help="without degradation, as references for `quality`"
    )
    options = parser.parse_args()
    if options.output.resolve() == FOLDER and (options.clean or options.count != COUNT):
        parser.error(
            "--clean and --count would replace pictures of data/ by other ones: name another --output."
        )
    recipes = [plan(number) for number in range(1, options.count + 1)]
    if options.clean:
        recipes = [replace(recipe, degradation=None) for recipe in recipes]
    options.output.mkdir(parents=True, exist_ok=True)
    for recipe in tqdm(recipes, unit="picture"):
        (options.output / f"{recipe.number}.jpg").write_bytes(encode(draw(recipe), clean=options.clean))
    (options.output / INDEX).write_text(index_text(recipes), encoding="utf-8")
    if not options.clean:
        for name, picture in draw_pair().items():
            file = options.output / PAIR / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(encode_png(picture))


def index_text(recipes: Iterable[Recipe]) -> str:
    """The index as JSON, with one line for each picture."""
    lines = ",\n".join(json.dumps(entry) for entry in describe(recipes))
    return f"[\n{lines}\n]\n"


def describe(recipes: Iterable[Recipe]) -> list[dict[str, Any]]:
    """Describes pictures: sizes, kinds, faces with width and landmarks, degradations."""
    return [
        {
            "file": f"{recipe.number}.jpg",
            "kind": recipe.kind,
            "size": f"{recipe.size_wh[0]}x{recipe.size_wh[1]}",
            "tone": recipe.tone,
            "frame": recipe.frame,
            "faces": [
                {
                    "width": round(face.width, 1),
                    "turn_deg": round(face.turn_deg, 1),
                    "landmarks_xy": face.landmarks_xy(),
                }
                for face in recipe.faces
            ],
            "degradation": asdict(recipe.degradation) if recipe.degradation else None,
        }
        for recipe in recipes
    ]


def plan(number: int) -> Recipe:
    """The recipe of a picture, by its number, from 1."""
    rng = np.random.default_rng((SEED, number))
    kind = KINDS[(number - 1) % len(KINDS)]
    # Every twenty pictures combine kinds and sizes differently.
    turn = (number - 1) // len(KINDS)
    size_wh = SIZES_WH[((number - 1) * 7 + turn * 3) % len(SIZES_WH)]
    tone: Tone = "grey" if number % 8 == 5 else "sepia" if number % 16 == 10 else "colour"
    frame = round(0.04 * min(size_wh)) if number % 11 == 4 else 0
    faces = tuple(_place(kind, size_wh, frame, rng))
    ground = "portrait" if len(faces) == 1 and kind != "far" else str(rng.choice(GROUNDS))
    return Recipe(number, kind, size_wh, ground, faces, tone, frame, _degradation(kind, faces, rng))


def _place(kind: Kind, size_wh: tuple[int, int], frame: int, rng: np.random.Generator) -> list[Placement]:
    width, height = (side - 2 * frame for side in size_wh)
    short = min(width, height)
    small = [side * max(1.0, short / REDUCED_SIDE) for side in SMALL_FACE]
    if kind in {"portrait", "close_up", "whole_frame", "cut", "far"}:
        low, high = {
            "portrait": (0.18, 0.38),
            "close_up": (0.4, 0.6),
            "whole_frame": (0.72, 0.8),
            "cut": (0.3, 0.45),
            "far": (0.0, 0.0),
        }[kind]
        face = (
            rng.uniform(small[0], small[1])
            if kind == "far"
            else max(small[0], short * rng.uniform(low, high))
        )
        x, y = rng.uniform(0.42, 0.58) * width, rng.uniform(0.4, 0.5) * height
        if kind == "far":
            x, y = rng.uniform(0.2, 0.8) * width, rng.uniform(0.3, 0.7) * height
        if kind == "cut":
            # A quarter of the face is outside the border.
            x = face * 0.25 if rng.random() < 0.5 else width - face * 0.25
        return [_face((x + frame, y + frame), face, rng)]
    rows_columns = {"pair": [(1, 2)], "group": [(1, 3), (2, 2), (2, 3)], "crowd": [(2, 4), (3, 4), (3, 3)]}[
        kind
    ]
    rows, columns = rows_columns[int(rng.integers(len(rows_columns)))]
    if width < height:
        rows, columns = columns, rows
    cell_w, cell_h = width / columns, height / rows
    largest = max(small[0], min(cell_w / 1.7, cell_h / 2.2))
    low, high = (
        (small[0], min(largest, small[1])) if kind == "crowd" else (max(small[0], 0.6 * largest), largest)
    )
    faces = []
    for row in range(rows):
        for column in range(columns):
            face = rng.uniform(low, high)
            x = (column + 0.5 + rng.uniform(-0.08, 0.08)) * cell_w + frame
            y = (row + 0.45 + rng.uniform(-0.05, 0.05)) * cell_h + frame
            faces.append(_face((x, y), face, rng))
    return faces


def _face(centre_xy: tuple[float, float], width: float, rng: np.random.Generator) -> Placement:
    turn = rng.uniform(-35, 35) if rng.random() < 0.25 else rng.normal(0, 4)
    gain = rng.uniform(0.85, 1.12) * rng.uniform(0.93, 1.07, 3)
    return Placement(
        (float(centre_xy[0]), float(centre_xy[1])),
        float(width),
        float(turn),
        bool(rng.random() < 0.5),
        (float(gain[0]), float(gain[1]), float(gain[2])),
    )


def _degradation(kind: Kind, faces: tuple[Placement, ...], rng: np.random.Generator) -> Degradation:
    """Draws a degradation; small faces are degraded less, so that they can still be found."""
    smallest = min(face.width for face in faces)
    if kind in {"crowd", "far"} or smallest < 70:
        return MILD.sample(rng)
    chosen = HEAVY if smallest > 200 and rng.random() < 0.4 else MODERATE
    drawn = chosen.sample(rng)
    # The ranges are for 512 px crops, in which a face is about 300 px wide.
    scale = min(1.0, smallest / 300)
    return replace(
        drawn,
        blur_sigma=max(0.3, drawn.blur_sigma * scale),
        downsampling=max(1.0, drawn.downsampling * scale),
        noise_sigma=drawn.noise_sigma * max(scale, 0.4),
    )


def draw(recipe: Recipe) -> ImageU8:
    """Draws the picture of a recipe, (H, W, 3) uint8 BGR."""
    width, height = recipe.size_wh
    if recipe.ground == "portrait":
        [face] = recipe.faces
        picture = cv2.warpAffine(
            _with_gain(_portrait(), face),
            face.matrix,
            recipe.size_wh,
            flags=cv2.INTER_CUBIC,
            borderMode=cv2.BORDER_REPLICATE,
        )
    else:
        picture = _cover(_ground(recipe.ground), recipe.size_wh)
        for face in recipe.faces:
            picture = _pasted(picture, face)
    if recipe.degradation is not None:
        noise = np.random.default_rng((SEED, recipe.number, 1))
        picture = recipe.degradation.apply(np.asarray(picture, dtype=np.uint8), noise)
    if recipe.tone != "colour":
        grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        tint = np.array([0.72, 0.88, 1.0]) if recipe.tone == "sepia" else np.ones(3)
        picture = np.rint(grey[:, :, None] * tint).astype(np.uint8)
    if recipe.frame:
        inner = picture[recipe.frame : height - recipe.frame, recipe.frame : width - recipe.frame]
        paper = (214, 226, 232) if recipe.tone != "grey" else (228, 228, 228)
        edge = recipe.frame
        picture = cv2.copyMakeBorder(inner, edge, edge, edge, edge, cv2.BORDER_CONSTANT, value=paper)
    return np.asarray(picture, dtype=np.uint8)


def draw_pair() -> dict[str, ImageU8]:
    """A portrait in the size of its original and its degraded copy, (300, 300, 3) uint8 BGR, by file name.

    Other pictures enlarge the portrait and have no sharp original to compare with. The noise is strong, so
    that a restored face is closer to its original than the degraded one, even where it invents detail.
    """
    degradation = Degradation(7, 1.2, 2.5, 25.0, 60)
    clean = np.ascontiguousarray(_portrait()[:300, 74:374])
    return {
        "clean.png": clean,
        "degraded.png": degradation.apply(clean, np.random.default_rng((SEED, 0, 1))),
    }


def encode_png(picture: ImageU8) -> bytes:
    """Encodes a picture as PNG."""
    ok, data = cv2.imencode(".png", picture)
    if not ok:
        raise RuntimeError("OpenCV cannot write PNG")
    return data.tobytes()


def encode(picture: ImageU8, *, clean: bool) -> bytes:
    """Encodes a picture as JPEG, at a quality that adds no visible degradation."""
    ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95 if clean else 88])
    if not ok:
        raise RuntimeError("OpenCV cannot write JPEG")
    return data.tobytes()


def _pasted(picture: ImageU8, face: Placement) -> ImageU8:
    head, mask = _cutout()
    corner = np.array([[1, 0, HEAD[1].start], [0, 1, HEAD[0].start], [0, 0, 1]])
    matrix = face.matrix @ corner
    size_wh = (picture.shape[1], picture.shape[0])
    warped = cv2.warpAffine(
        _with_gain(head, face), matrix, size_wh, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    ).astype(np.float32)
    alpha = cv2.warpAffine(mask, matrix, size_wh)[:, :, None]
    return np.asarray(np.rint(warped * alpha + picture * (1 - alpha)), dtype=np.uint8)


def _with_gain(picture: ImageU8, face: Placement) -> ImageU8:
    return np.asarray(np.clip(np.rint(picture * np.array(face.gain_bgr)), 0, 255), dtype=np.uint8)


def _cover(picture: ImageU8, size_wh: tuple[int, int]) -> ImageU8:
    """Scales a picture to cover the size, and crops its centre."""
    width, height = size_wh
    scale = max(width / picture.shape[1], height / picture.shape[0])
    matrix = np.array(
        [
            [scale, 0, (width - scale * picture.shape[1]) / 2],
            [0, scale, (height - scale * picture.shape[0]) / 2],
        ]
    )
    covered = cv2.warpAffine(picture, matrix, size_wh, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(covered, dtype=np.uint8)


@cache
def _portrait() -> ImageU8:
    return np.ascontiguousarray(skimage.data.astronaut()[:, :, ::-1])  # type: ignore[no-untyped-call]


@cache
def _ground(name: str) -> ImageU8:
    picture = getattr(skimage.data, name)()
    picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR) if picture.ndim == 2 else picture[:, :, ::-1]
    return np.ascontiguousarray(picture)


@cache
def _cutout() -> tuple[ImageU8, np.ndarray]:
    """Head and shoulders (h, w, 3) uint8, and their mask (h, w) float32: an oval with a soft edge."""
    head = np.ascontiguousarray(_portrait()[HEAD])
    height, width = head.shape[:2]
    mask = np.zeros((height, width), np.float32)
    cv2.ellipse(mask, (width // 2, height // 2), (width // 2 - 16, height // 2 - 16), 0, 0, 360, 1.0, -1)
    return head, cv2.GaussianBlur(mask, (0, 0), 5)


if __name__ == "__main__":
    main()
