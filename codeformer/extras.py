"""Packages that only some commands need."""

import importlib
from importlib.util import find_spec
from types import ModuleType

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


def load(module: str, extra: str) -> ModuleType:
    """Imports a module, by its dotted name, of a package that an extra brings.

    Raises:
        MissingPackageError: the package is not installed.
    """
    check_installed(extra, module.split(".", maxsplit=1)[0])
    return importlib.import_module(module)
