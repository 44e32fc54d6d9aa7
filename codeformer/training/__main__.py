"""One command per stage of training; docs/training.md shows them in order."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import cv2
import torch
from torch.utils.data import DataLoader

from codeformer.detection import FaceDetector
from codeformer.errors import CodeFormerError, TrainingError
from codeformer.images import decode_image
from codeformer.models import load_models
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.retinaface import build_retinaface
from codeformer.plan import as_device, available_device
from codeformer.training.align import aligned_faces
from codeformer.training.detector import DistillationStage
from codeformer.training.evaluation import describe_machine, measure_detector, measure_restorer
from codeformer.training.export import copy_network, export_network, write_manifest
from codeformer.training.faces import TRAINING_MIXTURE, FacePairs, Mixture, pictures_in, split_pictures
from codeformer.training.loop import Options, read_checkpoint, train
from codeformer.training.restorer import (
    AUTOENCODER_CROP,
    AutoencoderStage,
    CodePredictionStage,
    Pairs,
    TransformationStage,
)
from codeformer.training.scenes import Scenes
from codeformer.weights.checkpoints import read_tensors
from codeformer.weights.manifest import load_weight_set

LITE: Final[dict[str, Any]] = {
    "dim_embd": 192,
    "n_head": 6,
    "n_layers": 3,
    "codebook_size": 512,
    "latent_size": 1024,
    "base_channels": 16,
    "channel_multipliers": [1, 2, 4, 4, 8],
    "code_dim": 32,
    "norm_groups": 4,
    "connect_list": ["64", "128", "256"],
}
START_FACES: Final = 64
VALIDATION_FACES: Final = 12
VALIDATION_SEED: Final = 1_000_003
CONFIGURATIONS: Final[dict[str, dict[str, Any]]] = {"lite": LITE, "official": {}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 on success, 1 when something failed, 2 for a wrong call.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except CodeFormerError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m codeformer.training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, steps, batch, rate, text in (
        (
            "autoencoder",
            _autoencoder,
            2000,
            4,
            6e-4,
            "stage 1: encoder, codebook and generator, on clean faces",
        ),
        ("codes", _codes, 1000, 2, 6e-4, "stage 2: the codes of degraded faces"),
        ("transform", _transform, 5000, 1, 5e-4, "stage 3: restoration at every fidelity"),
    ):
        stage = commands.add_parser(name, help=text)
        _add_loop_options(stage, steps=steps, batch=batch, rate=rate)
        stage.add_argument("--faces", type=Path, required=True, metavar="DIR", help="aligned 512 px faces")
        stage.add_argument("--config", choices=CONFIGURATIONS, default="lite", help="size of the network")
        stage.set_defaults(command=command)
        if name == "transform":
            stage.add_argument(
                "--adversarial", type=float, default=0.0, metavar="WEIGHT", help="of the adversarial term"
            )
    detector = commands.add_parser("detector", help="a small detector from a trained one of the same build")
    _add_loop_options(detector, steps=3000, batch=4, rate=2e-3)
    detector.add_argument(
        "--teacher", type=Path, required=True, metavar="FILE", help="RetinaFace mobile0.25 checkpoint"
    )
    detector.add_argument("--photographs", type=Path, required=True, metavar="DIR", help="whole pictures")
    detector.add_argument("--faces", type=Path, required=True, metavar="DIR", help="aligned faces")
    detector.set_defaults(command=_detector)

    export = commands.add_parser("export", help="trained networks to a weight set")
    export.add_argument("--run", type=Path, required=True, metavar="DIR", help="where checkpoints are kept")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="the weight set's folder")
    export.add_argument("--detector-from", metavar="SET", help="copy the detector of another weight set")
    export.add_argument("--description", required=True, help="one sentence for the manifest")
    export.add_argument("--licence", required=True, help="the terms of the weights")
    export.set_defaults(command=_export)

    evaluate = commands.add_parser("evaluate", help="scores of a weight set on pictures kept from training")
    evaluate.add_argument("--weights", default="lite", metavar="SET", help="default: lite")
    evaluate.add_argument("--faces", type=Path, metavar="DIR", help="aligned faces, to score the restorer")
    evaluate.add_argument("--photographs", type=Path, metavar="DIR", help="to score the detector, with:")
    evaluate.add_argument("--teacher", type=Path, metavar="FILE", help="RetinaFace mobile0.25 checkpoint")
    evaluate.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    evaluate.add_argument("--output", type=Path, metavar="FILE", help="also write the scores as JSON")
    evaluate.set_defaults(command=_evaluate)

    align = commands.add_parser("align", help="photographs to aligned faces to train on")
    align.add_argument("photographs", type=Path, metavar="DIR")
    align.add_argument("--to", type=Path, required=True, metavar="DIR")
    align.add_argument("--weights", default="lite", metavar="SET", help="whose detector; default: lite")
    align.set_defaults(command=_align)
    return parser


def _add_loop_options(parser: argparse.ArgumentParser, *, steps: int, batch: int, rate: float) -> None:
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="where checkpoints are kept")
    parser.add_argument("--steps", type=int, default=steps, help=f"of the whole stage, default {steps}")
    parser.add_argument("--batch", type=int, default=batch, help=f"default {batch}")
    parser.add_argument("--learning-rate", type=float, default=rate, help=f"default {rate:g}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--half", action="store_true", help="bfloat16 where autocast allows")
    parser.add_argument("--compiled", action="store_true", help="compile with inductor: minutes, then faster")
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare samples, default 1")
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--patience", type=int, default=0, help="validations without progress to stop after")


def _loop_options(options: argparse.Namespace, stage: str) -> Options:
    return Options(
        checkpoint=options.run / f"{stage}.pt",
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        seed=options.seed,
        device=as_device(options.device) if options.device else available_device(),
        half=options.half,
        compiled=options.compiled,
        workers=options.workers,
        save_every=options.save_every,
        patience=options.patience,
    )


def _autoencoder(options: argparse.Namespace) -> None:
    loop = _loop_options(options, "autoencoder")
    training, validation = split_pictures(options.faces)
    torch.manual_seed(options.seed)
    network = _network(options, loop)
    start = FacePairs(training, START_FACES, options.seed + 3, mixture=None)
    stage = AutoencoderStage(
        network,
        torch.stack([start[index][1] for index in range(START_FACES)]),
        _fixed_pairs(validation, mixture=None),
        loop,
    )
    train(
        stage,
        lambda count: FacePairs(training, count, options.seed, crop=AUTOENCODER_CROP, mixture=None),
        loop,
        header=CONFIGURATIONS[options.config],
    )


def _codes(options: argparse.Namespace) -> None:
    loop = _loop_options(options, "codes")
    training, validation = split_pictures(options.faces)
    network = _network(options, loop, start="autoencoder")
    stage = CodePredictionStage(network, _fixed_pairs(validation, mixture=TRAINING_MIXTURE), loop)
    train(
        stage,
        lambda count: FacePairs(training, count, options.seed + 1),
        loop,
        header=CONFIGURATIONS[options.config],
    )


def _transform(options: argparse.Namespace) -> None:
    loop = _loop_options(options, "transform")
    training, validation = split_pictures(options.faces)
    stage = TransformationStage(
        _network(options, loop, start="codes"),
        _fixed_pairs(validation, mixture=TRAINING_MIXTURE),
        loop,
        codes_from=_network(options, loop, start="autoencoder"),
        adversarial=options.adversarial,
    )
    train(
        stage,
        lambda count: FacePairs(training, count, options.seed + 2),
        loop,
        header=CONFIGURATIONS[options.config],
    )


def _detector(options: argparse.Namespace) -> None:
    loop = _loop_options(options, "detector")
    photographs, validation = split_pictures(options.photographs)
    faces, _ = split_pictures(options.faces)
    torch.manual_seed(options.seed)
    teacher = build_retinaface("mobile0.25")
    teacher.load_state_dict(read_tensors(options.teacher))
    stage = DistillationStage(
        _on_device(build_retinaface("mobile0.25"), loop.device),
        _on_device(teacher, loop.device),
        [decode_image(file.read_bytes()) for file in validation],
        loop,
    )
    train(
        stage,
        lambda count: Scenes(photographs, faces, count, options.seed),
        loop,
        header={"backbone": "mobile0.25"},
    )


def _export(options: argparse.Namespace) -> None:
    options.to.mkdir(parents=True, exist_ok=True)
    entries = {}
    for role, stage in (("restorer", "transform"), ("detector", "detector")):
        checkpoint = options.run / f"{stage}.pt"
        if checkpoint.exists():
            entries[role] = export_network(read_checkpoint(checkpoint), role, options.to, options.licence)
            print(f"{options.to / entries[role]['file']}: {entries[role]['bytes'] / 1e6:.2f} MB")
    if not entries:
        raise TrainingError(f"{options.run}: expected transform.pt or detector.pt, found neither.")
    if "detector" not in entries and options.detector_from:
        entries["detector"] = copy_network(options.detector_from, "detector", options.to)
    write_manifest(options.to, options.description, entries)


def _evaluate(options: argparse.Namespace) -> None:
    device = as_device(options.device) if options.device else available_device()
    models = load_models(load_weight_set(options.weights), device)
    scores: dict[str, Any] = {"weights": options.weights, **describe_machine(device)}
    if options.faces:
        files = pictures_in(options.faces)
        scores["faces"] = len(files)
        scores["restorer"] = measure_restorer(models.restorer, files)
        for kind, methods in scores["restorer"].items():
            for method, quality in methods.items():
                print(
                    f"{kind:9} {method:7} PSNR {quality['psnr_db']:6.2f} dB  SSIM {quality['ssim']:.3f}"
                    f"  colour shift {quality['colour_shift']:.2f}"
                )
    if options.photographs and options.teacher:
        teacher = build_retinaface("mobile0.25")
        teacher.load_state_dict(read_tensors(options.teacher))
        files = pictures_in(options.photographs)
        scores["detector"] = measure_detector(models.detector, FaceDetector(teacher.to(device)), files)
        for name, value in scores["detector"].items():
            print(f"detector {name}: {value:.4g}")
    if options.output:
        options.output.write_text(json.dumps(scores, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _align(options: argparse.Namespace) -> None:
    detector = load_models(load_weight_set(options.weights), available_device()).detector
    options.to.mkdir(parents=True, exist_ok=True)
    count = 0
    for file, face in aligned_faces(detector, pictures_in(options.photographs)):
        cv2.imwrite(str(options.to / f"{file.stem}_{count:05}.png"), face)
        count += 1
    print(f"{options.to}: {count} faces")


def _fixed_pairs(files: Sequence[Path], *, mixture: Mixture | None) -> Pairs:
    """The same few pairs at every validation."""
    files = files[:VALIDATION_FACES]
    return DataLoader(FacePairs(files, len(files), VALIDATION_SEED, mixture=mixture, augment=False))


def _on_device(network: Any, device: torch.device) -> Any:
    return network.to(device, memory_format=torch.channels_last)


def _network(options: argparse.Namespace, loop: Options, start: str | None = None) -> CodeFormer:
    """The restorer on its device: new, or as a stage has left it."""
    network: CodeFormer = _on_device(CodeFormer(**CONFIGURATIONS[options.config]), loop.device)
    if start is not None:
        state = read_checkpoint(options.run / f"{start}.pt")
        if state["header"] != CONFIGURATIONS[options.config]:
            raise TrainingError(
                f"{options.run}: holds a network of {state['header']}; see --config and --run."
            )
        network.load_state_dict(state["average"])
    return network


if __name__ == "__main__":
    sys.exit(main())
