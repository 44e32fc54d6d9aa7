"""The command line of training."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from codeformer.imaging.geometry import FACE_SIZE
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.gfpgan import GFPGANv1Clean
from codeformer.training.configurations import CONFIGURATIONS, GFPGAN_CONFIGURATIONS
from codeformer.training.faces import CROP_GRID


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The parser, whose `command` is the name of the command."""
    parser = argparse.ArgumentParser(prog="python -m codeformer.training", description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, steps, batch, text in (
        ("autoencoder", 2000, 4, "stage 1: encoder, codebook and generator, on clean faces"),
        ("codes", 1000, 2, "stage 2: prediction of codes from degraded faces"),
        ("transform", 5000, 3, "stage 3: restoration at every fidelity"),
        ("correction", 10000, 4, "stage 4: the branch that corrects the input"),
        ("detail", 2000, 4, "stage 5: the detail that is added at low fidelity"),
        ("gfpgan", 2000, 1, "a GFPGAN, on the correction of stage 4 if it is to have one"),
    ):
        stage = commands.add_parser(name, help=text)
        _add_loop_options(stage, steps=steps, batch=batch, rate=1e-3)
        stage.add_argument("--faces", type=Path, required=True, metavar="DIR", help="aligned 512 px faces")
        stage.add_argument(
            "--config",
            type=_gfpgan_config if name == "gfpgan" else _config,
            default="lite",
            metavar="NAME",
            help=f"{' or '.join(CONFIGURATIONS)}, or a JSON file of the network's arguments; default: lite",
        )
        stage.add_argument("--half", action="store_true", help="use bfloat16 where autocast allows it")
        stage.add_argument(
            "--compiled",
            action="store_true",
            help="compile the networks: takes minutes, then steps are faster",
        )
        if name in {"transform", "correction", "detail"}:
            side = 256 if name == "transform" else 192
            stage.add_argument(
                "--crop", type=_crop, default=side, metavar="PX", help=f"side of the crops, default {side}"
            )
        if name in {"transform", "detail", "gfpgan"}:
            weight = 0.0 if name == "transform" else 0.8
            stage.add_argument(
                "--adversarial",
                type=float,
                default=weight,
                metavar="WEIGHT",
                help=f"weight of the adversarial loss, default {weight:g}",
            )
    for name, steps, rate, text in (
        ("detector", 4000, 1e-2, "train a detector from a trained one of the same architecture"),
        ("harden", 2000, 2e-3, "train a detector further, on degraded pictures and on no faces"),
    ):
        stage = commands.add_parser(name, help=text)
        _add_loop_options(stage, steps=steps, batch=4, rate=rate)
        stage.add_argument(
            "--teacher", type=Path, required=True, metavar="FILE", help="RetinaFace mobile0.25 checkpoint"
        )
        stage.add_argument("--photographs", type=Path, required=True, metavar="DIR", help="whole pictures")
        stage.add_argument("--faces", type=Path, required=True, metavar="DIR", help="aligned faces")

    begin = commands.add_parser(
        "begin", help="make checkpoints of a weight set, for stages that train it further"
    )
    begin.add_argument("--run", type=Path, required=True, metavar="DIR", help="where checkpoints are kept")
    begin.add_argument("--weights", metavar="SET", help="default: CODEFORMER_WEIGHTS, else official")
    begin.add_argument(
        "--config",
        type=_config,
        metavar="NAME",
        help="of the restorer, if it is to have other parts; as for the stages. New ones start from zero",
    )

    export = commands.add_parser("export", help="write trained networks to a weight set")
    export.add_argument("--run", type=Path, required=True, metavar="DIR", help="where checkpoints are kept")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="the folder of the weight set")
    export.add_argument("--detector-from", metavar="SET", help="copy the detector of another weight set")
    export.add_argument("--description", required=True, help="one sentence for the manifest")
    export.add_argument("--licence", required=True, help="the terms of the weights")

    evaluate = commands.add_parser("evaluate", help="score a weight set on held-out pictures")
    evaluate.add_argument("--weights", metavar="SET", help="default: CODEFORMER_WEIGHTS, else official")
    evaluate.add_argument("--faces", type=Path, metavar="DIR", help="aligned faces, to score the restorer")
    evaluate.add_argument("--photographs", type=Path, metavar="DIR", help="to score the detector, with:")
    evaluate.add_argument("--teacher", type=Path, metavar="FILE", help="RetinaFace mobile0.25 checkpoint")
    evaluate.add_argument("--compared-with", metavar="SET", help="another set, to be scored as well")
    evaluate.add_argument("--device", help="cuda or cpu; default: cuda if there is a GPU")
    evaluate.add_argument("--output", type=Path, metavar="FILE", help="also write the scores as JSON")

    page = commands.add_parser("page", help="write a page of held-out pictures before and after")
    page.add_argument("--weights", metavar="SET", help="as for evaluate")
    page.add_argument("--faces", type=Path, required=True, metavar="DIR", help="aligned faces")
    page.add_argument("--photographs", type=Path, required=True, metavar="DIR", help="whole pictures")
    page.add_argument("--to", type=Path, required=True, metavar="DIR")
    page.add_argument("--device", help="cuda or cpu; default: cuda if there is a GPU")

    align = commands.add_parser("align", help="extract aligned faces from photographs")
    align.add_argument("photographs", type=Path, metavar="DIR")
    align.add_argument("--to", type=Path, required=True, metavar="DIR")
    align.add_argument(
        "--weights", metavar="SET", help="set with the detector to use; default: as for evaluate"
    )
    align.add_argument("--device", help="cuda or cpu; default: cuda if there is a GPU")
    return parser


def _add_loop_options(parser: argparse.ArgumentParser, *, steps: int, batch: int, rate: float) -> None:
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="where checkpoints are kept")
    parser.add_argument(
        "--steps", type=_positive, default=steps, help=f"steps of the whole stage, default {steps}"
    )
    parser.add_argument("--batch", type=_positive, default=batch, help=f"default {batch}")
    parser.add_argument("--learning-rate", type=float, default=rate, help=f"default {rate:g}")
    parser.add_argument("--optimiser", choices=["adamw", "muon"], default="muon", help="default muon")
    parser.add_argument("--seed", type=_count, default=0)
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is a GPU")
    parser.add_argument("--workers", type=_count, default=1, help="processes that prepare samples, default 1")
    parser.add_argument("--save-every", type=_positive, default=200, metavar="STEPS")
    parser.add_argument(
        "--patience", type=_count, default=0, help="stop after so many validations without a better score"
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 0, got {text}")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, got {text}")
    return number


def _crop(text: str) -> int:
    number = int(text)
    if not (0 < number <= FACE_SIZE and number % CROP_GRID == 0):
        raise argparse.ArgumentTypeError(f"expected a multiple of {CROP_GRID} up to {FACE_SIZE}, got {text}")
    return number


def _config(text: str) -> dict[str, Any]:
    return _config_of(text, CONFIGURATIONS, CodeFormer)


def _gfpgan_config(text: str) -> dict[str, Any]:
    return _config_of(text, GFPGAN_CONFIGURATIONS, GFPGANv1Clean)


def _config_of(
    text: str, configurations: Mapping[str, dict[str, Any]], network: type[nn.Module]
) -> dict[str, Any]:
    if text in configurations:
        return configurations[text]
    try:
        config = json.loads(Path(text).read_text(encoding="utf-8"))
        network(**config)
    except (OSError, ValueError, TypeError) as cause:
        known = ", ".join(configurations)
        raise argparse.ArgumentTypeError(f"expected {known} or a usable JSON file: {cause}") from cause
    return dict(config)
