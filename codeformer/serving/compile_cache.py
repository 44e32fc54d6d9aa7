"""Compiling ahead of time.

inductor takes minutes at the first request of a process. What it has compiled it keeps in a folder, and finds
again there in other processes: on the same kind of device, with the same torch.
"""

import logging
import os
import time
from pathlib import Path
from typing import Final

from codeformer.engine.pipeline import Pipeline
from codeformer.options import COMPILE_CACHE_VARIABLE, Options
from codeformer.serving.request import SAMPLES, serve

# With the guides and without them: two graphs.
_FIDELITIES: Final = (0.5, 0.0)
# One face, and several: torch compiles for any number when it meets a second one.
_PORTRAITS: Final = (1, 2)

logger = logging.getLogger(__name__)


def fill_compile_cache(pipeline: Pipeline, folder: Path) -> None:
    """Makes inductor compile into a folder what requests of the batching profiles need.

    Args:
        pipeline: loaded, and not yet used in optimized mode.
        folder: for servers to be started with in `COMPILE_CACHE_VARIABLE`; made if need be.

    Raises:
        InferenceError: a network cannot be compiled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[COMPILE_CACHE_VARIABLE] = str(folder.resolve())
    for fidelity in _FIDELITIES:
        for count in _PORTRAITS:
            started = time.perf_counter()
            serve(
                pipeline,
                [SAMPLES / "1.jpg"] * count,
                Options(fidelity, "fast", "optimized", "inductor", "+".join(pipeline.models.restorers)),
            )
            logger.info("%d faces at w = %g: %.0f s", count, fidelity, time.perf_counter() - started)
