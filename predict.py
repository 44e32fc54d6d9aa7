"""The Cog predictor: a thin adapter over the `codeformer` package."""

import logging
import os
from collections.abc import Callable

import cog
import coglet
from cog import BaseRunner, Input, Path

from codeformer.engine.devices import available_device
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.precision import cpu_precision
from codeformer.limits import Limits, batch_wait_s
from codeformer.log import configure_server_log
from codeformer.options import Options
from codeformer.process import tune_process
from codeformer.serving.fetching import FetchPolicy
from codeformer.serving.outputs import OutputFolder
from codeformer.serving.service import Service
from codeformer.serving.shutdown import Keeper, end_server, ignore_termination, listening_port

logger = logging.getLogger(__name__)


class Predictor(BaseRunner):
    """Restores the faces of 1 to 4 photos; for several requests at a time."""

    def setup(self) -> None:
        """Loads the networks, fetching and verifying their weights, and tries them once."""
        configure_server_log()
        limits, wait_s = Limits.from_environment(), batch_wait_s()
        fetch_policy = FetchPolicy.from_environment()
        cpu_precision()  # refuses a wrong value before any weights are fetched
        device = available_device()
        tune_process(device)
        pipeline = Pipeline.load(device=device)
        self.outputs = OutputFolder()
        keeper = Keeper(None)
        give_up: Callable[[str], None] = logger.critical
        if coglet.server.active:
            # This is the worker of a server, and no test or other program.
            ignore_termination()
            port = listening_port(os.getppid())
            if port is None:
                logger.warning(
                    "requests sent with respond-async are lost at SIGTERM: the server's port is unknown"
                )
            keeper, give_up = Keeper(port), end_server
        self.service = Service(pipeline, limits, fetch_policy, self.outputs, keeper, wait_s, give_up)
        self.service.warm_up()

    def healthcheck(self) -> bool:
        """Whether the thread that works and the device are there; Cog asks at the same time as it serves."""
        return self.service.is_alive()

    @cog.concurrent(max=8)  # type: ignore[untyped-decorator]
    async def run(
        self,
        images: list[Path] = Input(
            description="1 to 4 photos: JPEG, HEIC, AVIF, PNG, WebP, BMP, TIFF or GIF, up to 100 megapixels each."
        ),
        codeformer_fidelity: float = Input(
            description="Balance between quality (0) and fidelity (1). Lower values look better but may alter facial features.",
            default=0.5,
            ge=0.0,
            le=1.0,
        ),
        runtime_profile: str = Input(
            description="baseline: float32, face after face, as upstream. fast: batched, with mixed precision where the device has it. max_speed: fast without face parsing during paste-back.",
            default="baseline",
            choices=["baseline", "fast", "max_speed"],
        ),
        stability_mode: str = Input(
            description="safe: no high-risk runtime optimizations (recommended on Replicate). optimized: rewritten networks, torch.compile or CUDA graphs, for the highest throughput.",
            default="safe",
            choices=["safe", "optimized"],
        ),
        compile_backend: str = Input(
            description="torch.compile backend, used only when stability_mode is optimized. Fixed by the first optimized request of a process.",
            default="eager",
            choices=["none", "eager", "aot_eager", "inductor"],
        ),
        restorer: str = Input(
            description="The network that restores the faces: codeformer, gfpgan, or one after the other on the same crops. The server has to have loaded it (CODEFORMER_RESTORERS).",
            default="codeformer",
            choices=["codeformer", "gfpgan", "codeformer+gfpgan", "gfpgan+codeformer"],
        ),
        strength: float = Input(
            description="How much of each restored face goes into the photo: 1 for all of it, 0 for none.",
            default=1.0,
            ge=0.0,
            le=1.0,
        ),
        faces: str = Input(
            description="Which faces are restored: all of them, the largest one, or the one nearest to the centre.",
            default="all",
            choices=["all", "largest", "centre"],
        ),
        min_face_px: float = Input(
            description="Faces smaller than this, measured in pixels of the photo on the longer side of their box, are left as they are. 0 for faces of any size.",
            default=0.0,
            ge=0.0,
        ),
    ) -> list[Path]:
        """Returns one JPG per photo, in order and of the same size, with every face restored."""
        paths, metrics = await self.service.serve(
            images,
            Options(
                codeformer_fidelity=codeformer_fidelity,
                runtime_profile=runtime_profile,
                stability_mode=stability_mode,
                compile_backend=compile_backend,
                restorer=restorer,
                strength=strength,
                faces=faces,
                min_face_px=min_face_px,
            ),
        )
        for name, value in metrics.items():
            self.record_metric(name, value)
        return [Path(path) for path in paths]


# Cog reads the signature above from the text of this file, and hands over what the annotations say when it runs:
# with paths it would fetch and unpack the pictures itself, without limits, and could wedge when a client hangs up.
Predictor.run.__annotations__["images"] = list[str]
