"""The options of a request: choices, defaults and validation.

This module does not import torch, so that the help of the command line appears at once. `engine.plan` turns
the profile, the mode and the backend into a plan for a device.
"""

import itertools
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final, Literal, get_args

from codeformer.errors import OptionError

RuntimeProfile = Literal["baseline", "fast", "max_speed"]
StabilityMode = Literal["safe", "optimized"]
CompileBackend = Literal["none", "eager", "aot_eager", "inductor"]
FaceChoice = Literal["all", "largest", "centre"]
FileFormat = Literal["jpg", "png", "webp"]
MetadataPolicy = Literal["keep", "strip"]

RUNTIME_PROFILES: Final[tuple[str, ...]] = get_args(RuntimeProfile)
STABILITY_MODES: Final[tuple[str, ...]] = get_args(StabilityMode)
COMPILE_BACKENDS: Final[tuple[str, ...]] = get_args(CompileBackend)
FACE_CHOICES: Final[tuple[str, ...]] = get_args(FaceChoice)
FILE_FORMATS: Final[tuple[str, ...]] = get_args(FileFormat)
METADATA_POLICIES: Final[tuple[str, ...]] = get_args(MetadataPolicy)

RESTORERS: Final = ("codeformer", "gfpgan")
# One restorer, or two one after the other.
RESTORER_CHOICES: Final[tuple[str, ...]] = tuple(
    "+".join(chain) for length in (1, 2) for chain in itertools.permutations(RESTORERS, length)
)

DEFAULT_FIDELITY: Final = 0.5
DEFAULT_QUALITY: Final = 95

# The folder for inductor's compiled kernels; torch defines the name.
COMPILE_CACHE_VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class Step:
    """One restorer's turn at a face.

    Attributes:
        restorer: its name.
        fidelity: 0 (quality) to 1 (fidelity); None for a restorer that takes none.
    """

    restorer: str
    fidelity: float | None


@dataclass(frozen=True)
class Recipe:
    """What is done to a face.

    Attributes:
        steps: restorers one after another, on the same crop.
        strength: how much of the restored face goes into the picture: 1 for all of it, 0 for nothing.
    """

    steps: tuple[Step, ...]
    strength: float = 1.0


@dataclass(frozen=True)
class Selection:
    """Which of a picture's faces are restored.

    Attributes:
        faces: all of them, the one with the largest box, or the one nearest to the picture's centre.
        min_face_px: faces whose box is shorter than this on its longer side, in px of the picture, are left
            out before the choice is made.
        left_out: numbers of faces that are left out as well, as in the result of a run without a selection:
            from 1, best score first.

    Raises:
        OptionError: a number is not a whole number from 1.
    """

    faces: FaceChoice = "all"
    min_face_px: float = 0.0
    left_out: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for number in self.left_out:
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise OptionError("left_out", number, "numbers of faces, counted from 1")


def check_aligned(selection: Selection | None) -> None:
    """Raises OptionError when faces are to be chosen among aligned crops."""
    if selection not in (None, Selection()):
        expected = "their defaults with aligned crops, each of which is one face"
        raise OptionError("faces, min_face_px", selection, expected)


@dataclass(frozen=True)
class Options:
    """Everything that a request may ask for besides its pictures; checked when it is made.

    Attributes:
        codeformer_fidelity: 0 (quality) to 1 (fidelity).
        runtime_profile: one of RUNTIME_PROFILES.
        stability_mode: one of STABILITY_MODES.
        compile_backend: one of COMPILE_BACKENDS.
        restorer: one of RESTORER_CHOICES.
        strength: as for `Recipe`.
        faces: as for `Selection`, and the next one too.
        min_face_px: 0 for faces of any size.

    Raises:
        OptionError: one of them is out of range.
    """

    codeformer_fidelity: float = DEFAULT_FIDELITY
    runtime_profile: str = "baseline"
    stability_mode: str = "safe"
    compile_backend: str = "eager"
    restorer: str = "codeformer"
    strength: float = 1.0
    faces: str = "all"
    min_face_px: float = 0.0

    def __post_init__(self) -> None:
        check_fidelity(self.codeformer_fidelity)
        check_choice("runtime_profile", self.runtime_profile, RUNTIME_PROFILES)
        check_choice("stability_mode", self.stability_mode, STABILITY_MODES)
        check_choice("compile_backend", self.compile_backend, COMPILE_BACKENDS)
        check_choice("restorer", self.restorer, RESTORER_CHOICES)
        check_strength(self.strength)
        check_choice("faces", self.faces, FACE_CHOICES)
        check_min_face_px(self.min_face_px)

    @property
    def selection(self) -> Selection:
        """Which faces."""
        return Selection(self.faces, float(self.min_face_px))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Output:
    """How a result is written; checked when it is made. The defaults are those of the service.

    Attributes:
        file_format: one of FILE_FORMATS, which is also the ending of a file's name.
        quality: of JPG and WebP, 1 to 100; None for the default, and for PNG, which is lossless.
        metadata: "keep" for EXIF, XMP, resolution and colour profile of the photo; "strip" for pixels in
            sRGB and the resolution.

    Raises:
        OptionError: one of them is out of range, or a quality is given for PNG.
    """

    file_format: str = "jpg"
    quality: int | None = None
    metadata: MetadataPolicy = "strip"

    def __post_init__(self) -> None:
        check_choice("format", self.file_format, FILE_FORMATS)
        check_choice("metadata", self.metadata, METADATA_POLICIES)
        if self.quality is None:
            return
        if self.file_format == "png":
            raise OptionError("quality", self.quality, "no quality with the format png, which is lossless")
        if not _is_number(self.quality) or int(self.quality) != self.quality or not 1 <= self.quality <= 100:
            raise OptionError("quality", self.quality, "a whole number from 1 to 100")


def check_fidelity(value: object) -> float:
    """Returns the fidelity as a float.

    Raises:
        OptionError: it is not a number from 0 to 1.
    """
    return _check_share("codeformer_fidelity", value, "0 (quality) to 1 (fidelity)")


def check_strength(value: object) -> float:
    """Returns the strength as a float.

    Raises:
        OptionError: it is not a number from 0 to 1.
    """
    return _check_share("strength", value, "0 (the input) to 1 (the restored face)")


def check_min_face_px(value: object) -> float:
    """Returns the smallest size of a face to restore, in px, as a float.

    Raises:
        OptionError: it is not a number from 0.
    """
    if _is_number(value) and 0 <= value < float("inf"):  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise OptionError("min_face_px", value, "a number of pixels, 0 for faces of any size")


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises OptionError when a value is not one of an option's choices."""
    if value not in choices:
        raise OptionError(option, value, f"one of {', '.join(choices)}")


def _check_share(option: str, value: object, meaning: str) -> float:
    number: Any = value
    # Compare before converting: NaN fails the comparison, and a huge integer cannot become a float.
    if _is_number(value) and 0 <= number <= 1:
        return float(number)
    raise OptionError(option, value, f"a number from {meaning}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
