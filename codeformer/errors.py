"""All exceptions that this package raises on purpose.

Each message says what was expected, what was found and what to do. The same facts are attributes of the
exception, so that callers need not parse the text.
"""

import re
import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_CAUSE_CHARACTERS: Final = 300
_VALUE_CHARACTERS: Final = 80
# Python refuses to convert longer integers to decimal text.
_LARGEST_BITS: Final = 10_000
# The number of a picture in messages; left out if there is only one picture.
_IN_IMAGE: Final = re.compile(r"\bimage 1\b ?")
_PATH: Final = re.compile(r"/[\w.+-]+/[^\s'\",;:)]*")


def in_words(cause: BaseException) -> str:
    """Describes a failure to a client: its type and the first line of its message, without server paths."""
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {_PATH.sub('...', lines[0])[:_CAUSE_CHARACTERS]}"


class _ShortRepr(reprlib.Repr):
    """A `repr` of bounded length: the beginning and the end of a long value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = _VALUE_CHARACTERS
        self.maxlevel = 2

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > _LARGEST_BITS:
            return f"a whole number of {x.bit_length()} bits"
        return super().repr_int(x, level)


_short_repr: Final = _ShortRepr().repr


class CodeFormerError(Exception):
    """Base class of all errors below."""

    @property
    def local(self) -> str:
        """The message for a user of the command line, who restores local files one by one."""
        return str(self)


class InputError(CodeFormerError, ValueError):
    """The request is invalid, and the caller can correct it."""


class OptionError(InputError):
    """An option has a value outside its range.

    Attributes: `option`, its name; `value`, the value that was given; `expected`, a description.
    """

    def __init__(self, option: str, value: object, expected: str) -> None:
        self.option = option
        self.value = value
        self.expected = expected
        super().__init__(f"{option}: expected {expected}, got {_short_repr(value)}.")


class BackendConflictError(InputError):
    """A second `torch.compile` backend was requested in one process.

    Attributes: `active`, the backend in use; `requested`, the refused backend.
    """

    def __init__(self, active: str, requested: str) -> None:
        self.active = active
        self.requested = requested
        super().__init__(
            f"compile_backend: this process was initialised with {active!r} in optimized mode and "
            f"cannot change to {requested!r}. Send {active!r}, use stability_mode 'safe', "
            "or restart the predictor."
        )


class ImageError(InputError):
    """One picture of the request is unusable.

    Attributes: `index`, its number in the request, counted from 1, or None outside a request;
    `reason`, what is wrong and what to do.
    """

    def __init__(self, reason: str, index: int | None = None) -> None:
        self.index = index
        self.reason = reason
        super().__init__(reason if index is None else f"Image {index}: {reason}")

    @property
    def local(self) -> str:
        return self.reason


class FaceLimitError(ImageError):
    """A picture contains more faces than the limit allows; attributes as for `ImageError`."""


class TimeLimitError(CodeFormerError, TimeoutError):
    """A request exceeded its time limit; nothing was returned.

    Attributes: `seconds`, the limit; `where`, the stage that would have been next.
    """

    def __init__(self, seconds: float, where: str) -> None:
        self.seconds = seconds
        self.where = where
        super().__init__(
            f"expected to be done within {seconds:g} s, but the time was up before {where}. Send fewer or "
            "smaller pictures, or ask the operator to raise CODEFORMER_MAX_SECONDS."
        )

    @property
    def local(self) -> str:
        return (
            f"expected to be done within {self.seconds:g} s, but the time was up before "
            f"{_IN_IMAGE.sub('', self.where)}. "
            "Use a smaller copy, or raise CODEFORMER_MAX_SECONDS."
        )


class CancelledError(CodeFormerError):
    """A request was cancelled; nothing was returned.

    Attributes: `where`, the stage that would have been next.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        super().__init__(f"cancelled before {where}.")


class WeightsError(CodeFormerError):
    """Base class: a weight set, or one of its files, cannot be used."""


class ManifestError(WeightsError):
    """A weight set is unknown, or its manifest is malformed.

    Attributes: `path`, the manifest or folder; `reason`.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"Weight set {path}: {reason}")


class WeightFileError(WeightsError):
    """A weight file is missing or is not the file its manifest describes.

    Attributes: `path`; `expected` and `actual` in words; `remedy`.
    """

    def __init__(self, path: Path, expected: str, actual: str, remedy: str) -> None:
        self.path = path
        self.expected = expected
        self.actual = actual
        self.remedy = remedy
        super().__init__(f"Weight file {path}: expected {expected}, got {actual}. {remedy}")


class DownloadError(WeightsError):
    """No source delivered a weight file.

    Attributes: `path`, where it should have gone; `expected`, in words;
    `attempts`, one line per address tried, with what it answered.
    """

    def __init__(self, path: Path, expected: str, attempts: Sequence[str]) -> None:
        self.path = path
        self.expected = expected
        self.attempts = tuple(attempts)
        tried = "".join(
            f"\n  - {attempt}" + (f" ({count} times)" if count > 1 else "")
            for attempt, count in Counter(attempts).items()
        )
        super().__init__(
            f"Weight file {path}: expected {expected}, but no source delivered it:{tried}\n"
            "Check the network and try again (a partial download is resumed), or put the file there by other "
            "means; it is verified before use. The weight set lite comes with the project and needs no "
            "network (--weights lite, or CODEFORMER_WEIGHTS=lite)."
        )


class InferenceError(CodeFormerError, RuntimeError):
    """A stage failed on a valid picture; nothing was returned for the whole request.

    Attributes: `stage`; `where`, the pictures and faces of the failed batch, counted from 1; `cause`, a text.
    """

    def __init__(self, stage: str, where: str, cause: str) -> None:
        self.stage = stage
        self.where = where
        self.cause = cause
        super().__init__(f"{stage} failed on {where}: {cause}")

    @property
    def local(self) -> str:
        return f"{self.stage} failed on {_IN_IMAGE.sub('', self.where) or 'the picture'}: {self.cause}"


class DeviceMemoryError(InferenceError):
    """A stage did not fit into the device's memory, not even with one face; attributes as above."""

    def __init__(self, stage: str, where: str, cause: str) -> None:
        super().__init__(
            stage,
            where,
            f"{cause} There is too little memory: use smaller pictures, or free memory of the device.",
        )


class DeviceError(CodeFormerError, RuntimeError):
    """The device cannot run the networks, so a server must not start on it.

    Attributes: `device`, its name; `cause`, a text.
    """

    def __init__(self, device: str, cause: str) -> None:
        self.device = device
        self.cause = cause
        super().__init__(
            f"{device}: expected a device that restores the sample portrait, got: {cause} Check that the GPU "
            "is one torch was built for, that its driver is recent enough (`nvidia-smi`), and that no other "
            "process has taken its memory."
        )


class NonFiniteOutputError(CodeFormerError, ArithmeticError):
    """The output of a network contains NaN or infinity. After half precision, float32 may still succeed."""


class OutputError(CodeFormerError):
    """The restored pictures cannot be written; nothing was returned.

    Attributes: `cause`, a text.
    """

    def __init__(self, cause: str) -> None:
        self.cause = cause
        super().__init__(
            f"expected to write the restored pictures, got: {cause}. Send the request again later, or ask "
            "the operator to make the server's temporary folder writable and free space there."
        )


class DiskFullError(CodeFormerError):
    """The disk is full: this result cannot be written, and later ones could not be either.

    Attributes: `path`, the file or folder that could not be written; `cause`, a text.
    """

    def __init__(self, path: Path, cause: str) -> None:
        self.path = path
        self.cause = cause
        super().__init__(
            f"{path}: expected room for the result, got: {cause}; free space there and continue with "
            "--skip-existing."
        )


class MissingPackageError(CodeFormerError, ImportError):
    """A command needs packages that are not installed.

    Attributes: `extra`, the extra of this package that brings them; `packages`, those that are missing.
    """

    def __init__(self, extra: str, packages: Sequence[str]) -> None:
        self.extra = extra
        self.packages = tuple(packages)
        super().__init__(
            f"expected the packages of the extra {extra!r}, but {', '.join(packages)} "
            f"{'is' if len(packages) == 1 else 'are'} not installed. Run `pip install 'codeformer[{extra}]'`,"
            f" or in a checkout `pip install -r requirements-{'bulk' if extra == 'ray' else extra}.txt`."
        )


class BulkError(CodeFormerError, RuntimeError):
    """A bulk run cannot start or go on; its ledger keeps what is recorded, and the next run goes on there."""


class SourceError(BulkError):
    """The source of a bulk run cannot be listed or read as a whole."""


class TargetError(BulkError):
    """The target of a bulk run, or its ledger's folder, cannot be written."""


class LedgerError(BulkError):
    """A file of a bulk run's ledger cannot be used."""


class TrainingError(CodeFormerError, RuntimeError):
    """A training run cannot start or continue."""


class BenchmarkError(CodeFormerError, RuntimeError):
    """A benchmark cannot start or continue, or its measurements are not valid."""
