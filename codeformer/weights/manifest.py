"""Weight sets: a folder with a `manifest.json` that describes the files of its networks."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from codeformer.errors import ManifestError
from codeformer.locations import downloads, shipped

WEIGHTS_ROOT: Final = shipped("weights")
SET_VARIABLE: Final = "CODEFORMER_WEIGHTS"
DEFAULT_SET: Final = "official"
MANIFEST_NAME: Final = "manifest.json"
FILE_SUFFIXES: Final = (".pth", ".safetensors")

# Role in the pipeline -> the architecture that fills it. A set may lack a parser, and the optional roles.
ARCHITECTURES: Final = {
    "restorer": "codeformer",
    "detector": "retinaface",
    "parser": "parsenet",
    "gfpgan": "gfpgan",
    "gfpgan-1.3": "gfpgan",
}
# Fetched only where they are asked for. The name is the restorer's, or that and an older version.
OPTIONAL_ROLES: Final = ("gfpgan", "gfpgan-1.3")
_FIELDS: Final[dict[str, type]] = {
    "architecture": str,
    "file": str,
    "bytes": int,
    "sha256": str,
    "sources": list,
    "licence": str,
    "config": dict,
}
_OPTIONAL_FIELDS: Final[dict[str, type]] = {"version": str}


@dataclass(frozen=True)
class WeightFile:
    """One network's file.

    Attributes:
        path: where the file is, or will be.
        size_bytes: its exact size.
        sha256: its hash, lower-case hexadecimal.
        sources: addresses to download it from, in order of preference; empty for a file in the package.
        licence: the terms of the weights.
        config: keyword arguments of the network, JSON types.
        version: of the weights, as their authors count; "" where nobody does.
        role: its network's in a set, one of ARCHITECTURES.
    """

    path: Path
    size_bytes: int
    sha256: str
    sources: tuple[str, ...]
    licence: str
    config: Mapping[str, Any]
    version: str = ""
    role: str = ""

    @property
    def label(self) -> str:
        """Its version, or the start of its hash where it has none."""
        return self.version or self.sha256[:8]

    @property
    def expectation(self) -> str:
        """A description of the file: its size and hash."""
        return f"{self.size_bytes:,} bytes with sha256 {self.sha256}"

    @property
    def remedy(self) -> str:
        """What to do if the file does not match."""
        if not self.sources:
            return "It is shipped with the project, not downloaded: restore it, or install again."
        folder = self.path.parent
        name = folder.name if folder.parent in {WEIGHTS_ROOT, downloads()} else folder
        asked = f" --with {self.role}" * (self.role in OPTIONAL_ROLES)
        return f"Run `python -m codeformer weights fetch {name}{asked}` to get it from {self.sources[0]}."


@dataclass(frozen=True)
class WeightSet:
    """A named set of weights.

    Attributes:
        name: its folder's.
        description: for people.
        restorer: CodeFormer's file.
        detector: the detector's.
        parser: the face parser's; None for a set without one.
        optional: files of other restorers by role, see OPTIONAL_ROLES.
    """

    name: str
    description: str
    restorer: WeightFile
    detector: WeightFile
    parser: WeightFile | None
    optional: Mapping[str, WeightFile] = field(default_factory=dict)

    def restorer_file(self, choice: str) -> WeightFile:
        """A restorer's file.

        Args:
            choice: "codeformer", or one of OPTIONAL_ROLES.

        Raises:
            ManifestError: the set has none.
        """
        if choice == ARCHITECTURES["restorer"]:
            return self.restorer
        if choice in self.optional:
            return self.optional[choice]
        known = ", ".join((ARCHITECTURES["restorer"], *self.optional))
        raise ManifestError(
            self.name,
            f"has no weights for {choice}, only for {known}; use a set that has them ({DEFAULT_SET} has), "
            "or leave it out of the restorers to load.",
        )

    def files(self, restorers: Sequence[str] | None = None) -> Iterator[tuple[str, WeightFile]]:
        """The set's files by role: restorer, detector, parser if there is one, without the optional ones.

        Args:
            restorers: those whose files are wanted, as for `restorer_file`, in the place of CodeFormer's.

        Raises:
            ManifestError: the set lacks one of them.
        """
        if restorers is None:
            yield "restorer", self.restorer
        else:
            chosen = map(self.restorer_file, restorers)
            yield from ((file.role, file) for file in chosen)
        yield "detector", self.detector
        if self.parser is not None:
            yield "parser", self.parser


def load_weight_set(name_or_path: str | Path | None = None) -> WeightSet:
    """Reads a weight set's manifest.

    Args:
        name_or_path: a set that comes with the package, or the path of a folder with a manifest; None for
            the environment variable CODEFORMER_WEIGHTS, or "official" if that is not set. For a set given by
            its path, files are downloaded into its folder, otherwise into `downloads()`.

    Raises:
        ManifestError: there is no such set, or its manifest is malformed.
    """
    chosen = str(name_or_path or os.environ.get(SET_VARIABLE) or DEFAULT_SET)
    named = WEIGHTS_ROOT / chosen
    is_name = Path(chosen).name == chosen and (named / MANIFEST_NAME).is_file()
    folder = named if is_name else Path(chosen)
    manifest_path = folder / MANIFEST_NAME
    if not manifest_path.is_file():
        known = ", ".join(available_sets()) or "none"
        raise ManifestError(
            chosen,
            f"expected the name of a set ({known}) or a folder with a {MANIFEST_NAME}; "
            f"correct {SET_VARIABLE} or the argument.",
        )
    try:
        content = json.loads(manifest_path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as cause:
        raise ManifestError(manifest_path, f"not valid JSON ({cause}).") from cause
    return _parse_manifest(manifest_path, content, downloads() / chosen if is_name else folder)


def available_sets() -> list[str]:
    """The names of the sets that come with the package."""
    return sorted(path.parent.name for path in WEIGHTS_ROOT.glob(f"*/{MANIFEST_NAME}"))


def _parse_manifest(path: Path, content: object, download_folder: Path) -> WeightSet:
    if not isinstance(content, dict):
        raise ManifestError(path, f"expected a JSON object, got {type(content).__name__}.")
    if unknown := sorted(set(content) - {"description", *ARCHITECTURES}):
        raise ManifestError(path, f"unknown keys {unknown}.")
    files = {
        role: _parse_file(path, role, content[role], download_folder)
        for role in ARCHITECTURES
        if content.get(role) is not None
    }
    if missing := [role for role in ("restorer", "detector") if role not in files]:
        raise ManifestError(path, f"lacks {' and '.join(missing)}.")
    return WeightSet(
        name=path.parent.resolve().name,
        description=str(content.get("description", "")),
        restorer=files["restorer"],
        detector=files["detector"],
        parser=files.get("parser"),
        optional={role: files[role] for role in OPTIONAL_ROLES if role in files},
    )


def _parse_file(manifest: Path, role: str, entry: object, download_folder: Path) -> WeightFile:
    if not isinstance(entry, dict):
        raise ManifestError(manifest, f"{role}: expected a JSON object, got {type(entry).__name__}.")
    if not set(_FIELDS) <= set(entry) <= set(_FIELDS | _OPTIONAL_FIELDS):
        expected = f"the keys {sorted(_FIELDS)}, and may have {sorted(_OPTIONAL_FIELDS)}"
        raise ManifestError(manifest, f"{role}: expected {expected}, got {sorted(entry)}.")
    for name, kind in (_FIELDS | _OPTIONAL_FIELDS).items():
        if name in entry and not isinstance(entry[name], kind):
            raise ManifestError(manifest, f"{role}.{name}: expected {kind.__name__}, got {entry[name]!r}.")
    if entry["architecture"] != ARCHITECTURES[role]:
        raise ManifestError(
            manifest, f"{role}.architecture: expected {ARCHITECTURES[role]!r}, got {entry['architecture']!r}."
        )
    name = entry["file"]
    if Path(name).name != name or Path(name).suffix not in FILE_SUFFIXES:
        raise ManifestError(
            manifest,
            f"{role}.file: expected a plain name ending in {' or '.join(FILE_SUFFIXES)}, got {name!r}.",
        )
    sha256 = entry["sha256"]
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise ManifestError(manifest, f"{role}.sha256: expected 64 lower-case hex digits, got {sha256!r}.")
    if not all(isinstance(source, str) for source in entry["sources"]):
        raise ManifestError(manifest, f"{role}.sources: expected a list of addresses.")
    return WeightFile(
        path=(download_folder if entry["sources"] else manifest.parent) / name,
        size_bytes=entry["bytes"],
        sha256=sha256,
        sources=tuple(entry["sources"]),
        licence=entry["licence"],
        config=entry["config"],
        version=entry.get("version", ""),
        role=role,
    )
