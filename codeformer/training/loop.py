"""The training loop of all stages: seeded and resumable, with weight averaging and progress."""

import copy
import hashlib
import logging
import math
import pickle
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from codeformer.engine.devices import as_device
from codeformer.errors import TrainingError

AVERAGE_DECAY: Final = 0.998
WARM_UP_SHARE: Final = 0.03
FINAL_LEARNING_RATE_SHARE: Final = 0.02
MAX_GRADIENT_NORM: Final = 1.0
# Matrices with fewer rows or columns, such as output layers to RGB, are trained with AdamW.
_SMALLEST_MATRIX: Final = 6

_REMEDY: Final = "use a lower --learning-rate, and continue from the last checkpoint."

NetworkT = TypeVar("NetworkT", bound=nn.Module)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How to run a stage.

    Attributes:
        checkpoint: the file to which a stage saves its state, and from which it resumes.
        steps: optimiser steps of the whole stage, including earlier runs.
        batch: samples per step.
        learning_rate: the maximum, reached after a short warm-up and followed by a cosine decay.
        seed: seed of all random numbers.
        device: cpu or cuda.
        half: run the networks in bfloat16 where autocast allows it.
        compiled: compile the networks with inductor.
        workers: processes that prepare samples.
        save_every: steps between validations, each of which also writes the checkpoint.
        patience: validations without a better score after which a stage stops; 0 for never.
        optimiser: optimiser of the network, adamw or muon.
        begun_from: digests of the networks from earlier stages that it starts from, see `digest_of`.
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
    optimiser: Literal["adamw", "muon"] = "adamw"
    begun_from: str = ""

    def autocast(self) -> torch.autocast:
        """The autocast context for running networks."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half)

    def maybe_compiled(self, function: Any) -> Any:
        """The function, compiled if `compiled` is set."""
        return torch.compile(function, dynamic=False) if self.compiled else function


class Stage(Protocol[NetworkT]):
    """What the loop needs from a stage.

    Attributes:
        network: the network that is trained and averaged.
        memory: other modules whose state is saved in the checkpoint.
        critics: optimisers of these modules.
    """

    network: NetworkT
    memory: nn.ModuleDict
    critics: list[torch.optim.Optimizer]

    def losses(self, batch: Any, progress: float, /) -> dict[str, Tensor]:
        """The loss terms of a batch, to be added up; `progress` runs from 0 to 1 over the stage."""
        ...

    def score(self, network: NetworkT) -> float:
        """The score of a network on held-out pictures; higher is better."""
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
        stage: the stage to run.
        samples: returns a data set of the given length; sample `i` must not depend on the length.
        options: how to run it.
        header: the configuration of the network, saved in the checkpoint for later stages.

    Returns:
        The averaged network.

    Raises:
        TrainingError: a loss or gradient is not finite, or the checkpoint has another configuration.
    """
    run = _Run(stage, options, header)
    run.resume()
    count = options.steps * options.batch
    loader = DataLoader(
        Subset(samples(count), range(min(run.step * options.batch, count), count)),
        batch_size=options.batch,
        num_workers=options.workers,
    )
    if run.is_stale():
        logger.info("an earlier run stopped because the score did not improve; raise --patience to continue")
        return run.average
    for batch in tqdm(loader, initial=run.step, total=options.steps, unit="step", disable=None):
        run.learn([part.to(options.device) for part in batch])
        if run.step % options.save_every == 0 or run.step == options.steps:
            run.validate()
            run.save()
            if run.is_stale():
                logger.info("stopped: no better score in %d validations", options.patience)
                break
    return run.average


def adamw(network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) for all trainable parameters."""
    return _adamw([p for p in network.parameters() if p.requires_grad], learning_rate)


def _adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    group = {"params": parameters, "initial_lr": learning_rate}
    return torch.optim.AdamW([group], lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)


class MuonWithAdamW:
    """Muon (Jordan et al., 2024) for the matrices of convolutions and linear layers, AdamW for the rest.

    Muon orthogonalises the update of each matrix, which makes each step much more effective here. Its
    learning rate has the scale of AdamW's; the AdamW part uses half of it.

    Args:
        network: the network to train; convolutions may be channels-last or contiguous.
        learning_rate: learning rate of the matrices.
    """

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        matrices = [
            layer.weight
            for layer in network.modules()
            if isinstance(layer, (nn.Conv2d, nn.Linear))
            and layer.weight.requires_grad
            and getattr(layer, "groups", 1) == 1
            and min(layer.weight.shape[0], layer.weight[0].numel()) >= _SMALLEST_MATRIX
        ]
        chosen = {id(weight) for weight in matrices}
        rest = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
        # torch's Muon accepts only matrices, so it gets views (C', N) of the kernels.
        self._pairs = [(weight, nn.Parameter(_as_matrix(weight.data))) for weight in matrices]
        self._parts = (
            torch.optim.Muon(
                [{"params": [matrix for _, matrix in self._pairs], "initial_lr": learning_rate}],
                lr=learning_rate,
                weight_decay=0.0,
                adjust_lr_fn="match_rms_adamw",
            ),
            _adamw(rest, learning_rate / 2),
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of both optimisers."""
        return [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        """One step of both optimisers."""
        for weight, matrix in self._pairs:
            matrix.grad = None if weight.grad is None else _as_matrix(_laid_out_as(weight.grad, weight))
        for part in self._parts:
            part.step()

    def zero_grad(self) -> None:
        """Clears all gradients."""
        for weight, matrix in self._pairs:
            weight.grad = matrix.grad = None
        self._parts[1].zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimisers."""
        return {"muon": self._parts[0].state_dict(), "adamw": self._parts[1].state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        for part, name in zip(self._parts, ("muon", "adamw"), strict=True):
            part.load_state_dict(state_dict[name])


def _as_matrix(kernel: Tensor) -> Tensor:
    """A view of a kernel (C', C, ...) as a matrix (C', N), for either memory layout."""
    if kernel.is_contiguous():
        return kernel.view(len(kernel), -1)
    return kernel.movedim(1, -1).view(len(kernel), -1)


def _laid_out_as(gradient: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight).copy_(gradient) if gradient.stride() != weight.stride() else gradient


_OPTIMISERS: Final[dict[str, Callable[[nn.Module, float], Any]]] = {"adamw": adamw, "muon": MuonWithAdamW}


class _Run(Generic[NetworkT]):
    """A running stage: networks, optimiser, counters and the checkpoint file."""

    def __init__(self, stage: Stage[NetworkT], options: Options, header: Mapping[str, Any]) -> None:
        self._stage = stage
        self._options = options
        self._header = dict(header)
        # Options that must stay the same for a resumed stage, because samples and state depend on them.
        self._recipe = {
            "seed": options.seed,
            "batch": options.batch,
            "critics": len(stage.critics),
            "optimiser": options.optimiser,
            "begun_from": options.begun_from,
        }
        self._parameters = [p for p in stage.network.parameters() if p.requires_grad]
        self._optimiser = _OPTIMISERS[options.optimiser](stage.network, options.learning_rate)
        self.average = copy.deepcopy(stage.network).eval()
        self.step = 0
        self._best, self._stale, self._trained_s = -math.inf, 0, 0.0
        self._start_counting()

    def is_stale(self) -> bool:
        """Whether the score has not improved for `patience` validations."""
        return 0 < self._options.patience <= self._stale

    def _start_counting(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counted, self._started = 0, time.monotonic()

    def learn(self, batch: Sequence[Tensor]) -> None:
        """Runs one training step."""
        progress = self.step / self._options.steps
        # Seed each step by its number, so that a resumed training gets the same random numbers.
        torch.manual_seed((self._options.seed << 32) + self.step)
        for group in self._optimiser.param_groups:
            group["lr"] = group["initial_lr"] * _learning_rate_share(progress)
        terms = self._stage.losses(batch, progress)
        loss = torch.stack(list(terms.values())).sum()
        if not bool(torch.isfinite(loss)):
            raise TrainingError(f"the loss at step {self.step} is {float(loss.detach())}; {_REMEDY}")
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(f"the gradient at step {self.step} is {float(norm)}; {_REMEDY}")
        self._optimiser.step()
        decay = min(AVERAGE_DECAY, (1 + self.step) / (10 + self.step))
        _update_average(self.average, self._stage.network, decay)
        self.step += 1
        self._counted += 1
        for name, term in terms.items():
            self._sums[name] += float(term.detach())

    def validate(self) -> None:
        """Scores the averaged network; logs the score, the speed and the losses since the last validation."""
        elapsed_s = time.monotonic() - self._started
        self._trained_s += elapsed_s
        score = self._stage.score(self.average)
        self._stale = 0 if score > self._best else self._stale + 1
        self._best = max(self._best, score)
        logger.info(
            "step %d/%d  %.2f s/step  %.0f min to go  score %.3f  %s",
            self.step,
            self._options.steps,
            elapsed_s / self._counted,
            elapsed_s / self._counted * (self._options.steps - self.step) / 60,
            score,
            "  ".join(f"{name} {total / self._counted:.4f}" for name, total in self._sums.items()),
        )
        self._start_counting()

    def save(self) -> None:
        """Saves everything that `resume` needs, in a file that is either complete or absent."""
        path = self._options.checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        state = {
            "header": self._header,
            "network": self._stage.network.state_dict(),
            "average": self.average.state_dict(),
            "memory": self._stage.memory.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "critics": [critic.state_dict() for critic in self._stage.critics],
            "recipe": self._recipe,
            "steps": self._options.steps,
            "step": self.step,
            "best": self._best,
            "stale": self._stale,
            "trained_s": self._trained_s,
        }
        torch.save(state, partial)
        partial.replace(path)

    def resume(self) -> None:
        """Restores the state from the checkpoint, if there is one."""
        path = self._options.checkpoint
        if not path.exists():
            return
        state = read_checkpoint(path)
        for name, expected in (("header", self._header), ("recipe", self._recipe)):
            if state[name] != expected:
                raise TrainingError(
                    f"{path}: expected a checkpoint of {expected}, got one of {state[name]}. "
                    "Name another --run folder, or the same options. If only begun_from differs, an earlier "
                    "stage was trained further: remove this file to start this stage again."
                )
        self._stage.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self._stage.memory.load_state_dict(state["memory"])
        rates = [group["initial_lr"] for group in self._optimiser.param_groups]
        self._optimiser.load_state_dict(state["optimiser"])
        # Keep the learning rate of the options, not that of the checkpoint.
        for group, rate in zip(self._optimiser.param_groups, rates, strict=True):
            group["initial_lr"] = rate
        for critic, critic_state in zip(self._stage.critics, state["critics"], strict=True):
            critic.load_state_dict(critic_state)
        self.step, self._trained_s = state["step"], state["trained_s"]
        self._best, self._stale = state["best"], state["stale"]
        logger.info("resumed %s at step %d, after %.0f min", path, self.step, self._trained_s / 60)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint: header, average, step and steps, and the state for resuming.

    Raises:
        TrainingError: there is no such file, or it is not a checkpoint of a stage.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as cause:
        raise TrainingError(f"{path}: no such checkpoint; run the stage that writes it first.") from cause
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as cause:
        raise TrainingError(f"{path}: not a readable checkpoint ({cause}); remove it.") from cause
    if not isinstance(state, dict) or not {"header", "average", "step", "steps"} <= set(state):
        raise TrainingError(f"{path}: expected a stage's checkpoint, got another file; remove it.")
    return state


def digest_of(checkpoint: Mapping[str, Any]) -> str:
    """A hash (16 hexadecimal digits) of the averaged network in a checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint["average"].items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


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
