"""Where the files that come with the package are, and where downloaded ones go.

A checkout has weight sets and sample pictures in its top-level folders `weights/` and `data/`. An installed
package has them inside itself, in `share/`; pyproject.toml says which.
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
    """The folder `weights` or `data` with the files that come with the package, wherever it is run from."""
    return (checkout() or _SHARE) / folder


def downloads() -> Path:
    """The folder for downloaded weights: that of the shipped sets in a checkout, else in the user's cache."""
    return shipped("weights") if checkout() else user_cache_path("codeformer", appauthor=False) / "weights"
