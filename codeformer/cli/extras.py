"""Packages that only some commands need."""

from importlib.util import find_spec

from codeformer.errors import MissingPackageError


def check_installed(extra: str, *packages: str) -> None:
    """Checks that the packages of an extra are there, before anything is loaded.

    Args:
        extra: its name in pyproject.toml.
        packages: as they are imported.

    Raises:
        MissingPackageError: one is not.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingPackageError(extra, missing)
