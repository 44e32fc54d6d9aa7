"""The only module that imports basicsr, which is needed for NIQE and for its registry of networks.

basicsr 1.4.2 can be installed on Python 3.11 and 3.12 only. It imports a module that newer versions of
torchvision no longer have, and it imports training code. So the serving code never imports this module.
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
    """Imports `basicsr.<name>` with current versions of torchvision.

    Raises:
        ModuleNotFoundError: basicsr is not installed, or has no such module.
    """
    if _REMOVED_MODULE not in sys.modules:
        replacement = types.ModuleType(_REMOVED_MODULE)
        replacement.rgb_to_grayscale = rgb_to_grayscale  # type: ignore[attr-defined]
        sys.modules[_REMOVED_MODULE] = replacement
    return importlib.import_module(f"basicsr.{name}")


def register_codeformer() -> None:
    """Registers our network in basicsr's ARCH_REGISTRY as "CodeFormer"; a second call does nothing."""
    registry = import_basicsr("utils.registry").ARCH_REGISTRY
    if "CodeFormer" not in registry:
        registry.register(CodeFormer)
