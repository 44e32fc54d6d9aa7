"""CodeFormer face restoration: decoded pictures in, pictures with restored faces out.

Example:
    >>> pipeline = Pipeline.load()
    >>> [result] = pipeline.restore([image_bgr], fidelity=0.5)
    >>> result.image_bgr, result.faces, result.elapsed_ms
"""

from codeformer.alignment import Face
from codeformer.pipeline import Pipeline, RestoredImage
from codeformer.plan import ExecutionPlan, resolve_plan

__all__ = ["ExecutionPlan", "Face", "Pipeline", "RestoredImage", "resolve_plan"]
