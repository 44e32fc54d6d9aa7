"""CodeFormer face restoration: decoded pictures in, pictures with restored faces out.

Example:
    >>> pipeline = Pipeline.load()
    >>> [result] = pipeline.restore([image_bgr], fidelity=0.5)
    >>> result.image_bgr, result.faces, result.elapsed_ms
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from codeformer.engine.pipeline import Pipeline, RestoredImage
    from codeformer.engine.plan import ExecutionPlan, resolve_plan
    from codeformer.imaging.geometry import Face
    from codeformer.process import tune_process

__all__ = ["ExecutionPlan", "Face", "Pipeline", "RestoredImage", "resolve_plan", "tune_process"]

# Imported on first use: importing torch takes seconds, and the help of the command line does not need it.
_HOMES: Final = {
    "ExecutionPlan": "engine.plan",
    "Face": "imaging.geometry",
    "Pipeline": "engine.pipeline",
    "RestoredImage": "engine.picture",
    "resolve_plan": "engine.plan",
    "tune_process": "process",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
