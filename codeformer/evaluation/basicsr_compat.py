"""The only door to basicsr, which nothing but NIQE and its registry of networks needs.

basicsr 1.4.2 can be installed on Python 3.11 and 3.12 only. It imports a torchvision module that newer
torchvision no longer has, and its import pulls in training code. The serving path therefore never comes here.
"""

import importlib
import importlib.util
import sys
import types

from torchvision.transforms.functional import rgb_to_grayscale

from codeformer.networks.codeformer import CodeFormer

_REMOVED_MODULE = "torchvision.transforms.functional_tensor"


def has_basicsr() -> bool:
    """Whether basicsr is installed."""
    return importlib.util.find_spec("basicsr") is not None


def import_basicsr(name: str) -> types.ModuleType:
    """Imports `basicsr.<name>` under current torchvision.

    Raises:
        ModuleNotFoundError: basicsr, or that module of it, is not installed.
    """
    if _REMOVED_MODULE not in sys.modules:
        replacement = types.ModuleType(_REMOVED_MODULE)
        replacement.rgb_to_grayscale = rgb_to_grayscale  # type: ignore[attr-defined]
        sys.modules[_REMOVED_MODULE] = replacement
    return importlib.import_module(f"basicsr.{name}")


def register_codeformer() -> None:
    """Enters our network in basicsr's ARCH_REGISTRY as "CodeFormer"; a second call does nothing."""
    registry = import_basicsr("utils.registry").ARCH_REGISTRY
    if "CodeFormer" not in registry:
        registry.register(CodeFormer)
