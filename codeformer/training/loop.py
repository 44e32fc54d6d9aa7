"""The training loop all stages share: seeded, resumable, averaged, with progress."""

import copy
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from codeformer.errors import TrainingError
from codeformer.plan import as_device

AVERAGE_DECAY: Final = 0.998
WARM_UP_SHARE: Final = 0.03
FINAL_LEARNING_RATE_SHARE: Final = 0.02
MAX_GRADIENT_NORM: Final = 1.0

NetworkT = TypeVar("NetworkT", bound=nn.Module)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How to run a stage.

    Attributes:
        checkpoint: the file a stage writes its state to, and resumes from.
        steps: optimiser steps of the whole stage, earlier runs counted in.
        batch: samples per step.
        learning_rate: at its highest; a short warm-up leads to it, a cosine away from it.
        seed: of everything random.
        device: cpu or cuda.
        half: run the networks in bfloat16 where autocast allows.
        compiled: compile the networks with inductor.
        workers: processes that prepare samples.
        save_every: steps between validations, each of which also writes the checkpoint.
        patience: validations without a better score after which a stage stops; 0 for never.
    """

    checkpoint: Path
    steps: int
    batch: int
    learning_rate: float
    seed: int = 0
    device: torch.device = field(default_factory=lambda: as_device("cpu"))
    half: bool = False
    compiled: bool = False
    workers: int = 1
    save_every: int = 200
    patience: int = 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half)

    def maybe_compiled(self, function: Any) -> Any:
        return torch.compile(function, dynamic=False) if self.compiled else function


class Stage(Protocol[NetworkT]):
    """What a stage brings to the loop.

    Attributes:
        network: what is trained and averaged.
        memory: other modules whose state a resumed training needs.
    """

    network: NetworkT
    memory: nn.ModuleDict

    def losses(self, batch: Any, progress: float, /) -> dict[str, Tensor]:
        """The loss terms of a batch, to be added up; `progress` runs from 0 to 1 over the stage."""
        ...

    def score(self, network: NetworkT) -> float:
        """How good a network is on faces it was not trained on; higher is better."""
        ...


def train(
    stage: Stage[NetworkT],
    samples: Callable[[int], Dataset[Any]],
    options: Options,
    *,
    header: Mapping[str, Any],
) -> NetworkT:
    """Runs a stage to its end, from its checkpoint if there is one.

    Args:
        stage: what is trained.
        samples: given a number, that many samples; sample `i` must not depend on the number.
        options: how.
        header: the network's configuration, kept in the checkpoint for the stages that follow.

    Returns:
        The averaged network.

    Raises:
        TrainingError: a loss is not finite, or the checkpoint is another configuration's.
    """
    torch.manual_seed(options.seed)
    parameters = [p for p in stage.network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    average = copy.deepcopy(stage.network).eval()
    step, best, stale, trained_s = 0, -math.inf, 0, 0.0
    if options.checkpoint.exists():
        state = read_checkpoint(options.checkpoint)
        if state["header"] != dict(header):
            raise TrainingError(
                f"{options.checkpoint}: expected a checkpoint of {dict(header)}, "
                f"got one of {state['header']}. Name another --run folder, or the same options."
            )
        stage.network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        stage.memory.load_state_dict(state["memory"])
        optimiser.load_state_dict(state["optimiser"])
        step, best, stale, trained_s = state["step"], state["best"], state["stale"], state["trained_s"]
        logger.info("resumed %s at step %d", options.checkpoint, step)

    loader = DataLoader(
        _From(samples(options.steps * options.batch), step * options.batch),
        batch_size=options.batch,
        num_workers=options.workers,
    )
    sums: dict[str, float] = defaultdict(float)
    counted, started = 0, time.monotonic()
    for batch in loader:
        progress = step / options.steps
        # Random numbers of a step follow from its number, in a resumed training as well.
        torch.manual_seed((options.seed << 32) + step)
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * _learning_rate_share(progress)
        terms = stage.losses([part.to(options.device) for part in batch], progress)
        loss = torch.stack(list(terms.values())).sum()
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss at step {step} is {float(loss.detach())}; use a lower --learning-rate."
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimiser.step()
        _update_average(average, stage.network, min(AVERAGE_DECAY, (1 + step) / (10 + step)))
        step += 1
        counted += 1
        for name, term in terms.items():
            sums[name] += float(term.detach())
        if step % options.save_every == 0 or step == options.steps:
            elapsed_s = time.monotonic() - started
            trained_s += elapsed_s
            score = stage.score(average)
            stale = 0 if score > best else stale + 1
            best = max(best, score)
            logger.info(
                "step %d/%d  %.2f s/step  %.0f min to go  score %.3f  %s",
                step,
                options.steps,
                elapsed_s / counted,
                elapsed_s / counted * (options.steps - step) / 60,
                score,
                "  ".join(f"{name} {total / counted:.4f}" for name, total in sums.items()),
            )
            _write_checkpoint(
                options.checkpoint,
                {
                    "header": dict(header),
                    "network": stage.network.state_dict(),
                    "average": average.state_dict(),
                    "memory": stage.memory.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "step": step,
                    "best": best,
                    "stale": stale,
                    "trained_s": trained_s,
                },
            )
            sums.clear()
            counted, started = 0, time.monotonic()
            if options.patience and stale >= options.patience:
                logger.info("no better score for %d validations: stopped", stale)
                break
    return average


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state a stage has written: header, network, average, memory, optimiser, step, trained_s.

    Raises:
        TrainingError: no such file.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as cause:
        raise TrainingError(f"{path}: no such checkpoint; run the stage that makes it first.") from cause
    return state


def _write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)


def _learning_rate_share(progress: float) -> float:
    if progress < WARM_UP_SHARE:
        return max(progress / WARM_UP_SHARE, 0.01)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP_SHARE) / (1 - WARM_UP_SHARE)))
    return FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * cosine


@torch.no_grad()
def _update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    for ours, theirs in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if ours.dtype.is_floating_point:
            ours.lerp_(theirs, 1 - decay)
        else:
            ours.copy_(theirs)


class _From(Dataset[Any]):
    """The samples of a dataset from some index on."""

    def __init__(self, samples: Dataset[Any], start: int) -> None:
        self._samples = samples
        self._start = start

    def __len__(self) -> int:
        return max(0, len(self._samples) - self._start)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        return self._samples[index + self._start]
