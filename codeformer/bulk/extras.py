"""Packages that only bulk runs need, imported where they are needed, with a clear message where they lack."""

import importlib
from types import ModuleType

from codeformer.errors import MissingPackageError


def load(module: str, extra: str) -> ModuleType:
    """Imports a module.

    Args:
        module: its dotted name.
        extra: the extra of this project that brings its package.

    Raises:
        MissingPackageError: it is not installed.
    """
    package = module.split(".", maxsplit=1)[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as cause:
        if cause.name != package:
            raise
        raise MissingPackageError(extra, [package]) from cause
