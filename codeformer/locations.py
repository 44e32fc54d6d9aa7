"""Paths of the files that come with the package, and of downloaded files.

In a checkout, weight sets and sample pictures are in the top-level folders `weights/` and `data/`. In an
installed package they are in its own folder `share/`; pyproject.toml lists them.
"""

from importlib.resources import files
from pathlib import Path
from typing import Final

from platformdirs import user_cache_path

_PACKAGE: Final = Path(str(files("codeformer")))
_SHARE: Final = _PACKAGE / "share"


def checkout() -> Path | None:
    """The root of the checkout that the package is run from; None for an installed package."""
    return None if _SHARE.is_dir() else _PACKAGE.parent


def shipped(folder: str) -> Path:
    """The folder `weights` or `data` with the files that come with the package."""
    return (checkout() or _SHARE) / folder


def downloads() -> Path:
    """The folder for downloaded weights: `weights/` in a checkout, otherwise in the user's cache folder."""
    return shipped("weights") if checkout() else user_cache_path("codeformer", appauthor=False) / "weights"
