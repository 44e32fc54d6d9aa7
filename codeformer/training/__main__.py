"""One command per stage of training; docs/training.md shows them in order."""

import argparse
import itertools
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import cv2
import torch
from torch.utils.data import DataLoader

from codeformer.engine.detector import FaceDetector
from codeformer.engine.devices import available_device
from codeformer.engine.models import RESTORERS, load_models
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import torch_switches
from codeformer.errors import CodeFormerError, InputError, TrainingError
from codeformer.evaluation.machine import describe_machine
from codeformer.imaging.files import lift_pillow_limits
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.gfpgan import GFPGANv1Clean
from codeformer.networks.retinaface import build_retinaface
from codeformer.training.align import aligned_faces
from codeformer.training.arguments import parser_of
from codeformer.training.detection_scores import measure_robustness
from codeformer.training.detector import BACKBONE, DistillationStage, load_teacher
from codeformer.training.export import copy_network, export_network, write_manifest
from codeformer.training.faceless import TAUGHT, shipped_picture
from codeformer.training.faces import (
    TRAINING_MIXTURE,
    FacePairs,
    Mixture,
    pictures_in,
    read_photograph,
    split_faces,
    split_pictures,
)
from codeformer.training.gfpgan import GfpganStage, begin_from_correction
from codeformer.training.hardening import HardeningStage, blended
from codeformer.training.labelled import LabelledScenes, teacher_labels
from codeformer.training.loop import Options, digest_of, read_checkpoint, train
from codeformer.training.page import write_page
from codeformer.training.restorer import (
    AUTOENCODER_CROP,
    AutoencoderStage,
    CodePredictionStage,
    CorrectionStage,
    DetailStage,
    Pairs,
    TransformationStage,
    zero_residual_branches,
)
from codeformer.training.scenes import Scenes
from codeformer.training.scores import measure_detector, measure_restorer
from codeformer.weights.checkpoints import build, load_into
from codeformer.weights.manifest import WeightSet, load_weight_set

# The stages that train a network, the last first.
STAGES_OF: Final = {
    "restorer": ("detail", "correction", "transform"),
    "gfpgan": ("gfpgan",),
    "detector": ("hardened", "detector"),
}
START_FACES: Final = 64
VALIDATION_FACES: Final = 12
VALIDATION_SCENES: Final = 60
DETAIL_FOCUS: Final = 0.6
VALIDATION_SEED: Final = 1_000_003


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 on success, 1 if something failed, 2 for wrong usage.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = parser_of(__doc__).parse_args(arguments)
    lift_pillow_limits()
    # OpenCV's threads do not survive forking a worker process, and the workers do not need them.
    cv2.setNumThreads(1)
    try:
        _COMMANDS[options.command](options)
    except CodeFormerError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


def _loop_options(options: argparse.Namespace, stage: str, *after: str) -> Options:
    """The options of a stage that starts from the networks of earlier stages."""
    begun_from = " ".join(digest_of(read_checkpoint(options.run / f"{earlier}.pt")) for earlier in after)
    return Options(
        begun_from=begun_from,
        checkpoint=options.run / f"{stage}.pt",
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        seed=options.seed,
        device=available_device(options.device),
        half=getattr(options, "half", False),
        compiled=getattr(options, "compiled", False),
        workers=options.workers,
        save_every=options.save_every,
        patience=options.patience,
        optimiser=options.optimiser,
    )


def _autoencoder(options: argparse.Namespace) -> None:
    loop = _loop_options(options, "autoencoder")
    training, validation = split_faces(options.faces)
    torch.manual_seed(options.seed)
    network = _network(options, loop)
    zero_residual_branches(network)
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
        header=options.config,
    )


def _codes(options: argparse.Namespace) -> None:
    loop = _loop_options(options, "codes", "autoencoder")
    training, validation = split_faces(options.faces)
    network = _network(options, loop, start="autoencoder")
    stage = CodePredictionStage(network, _fixed_pairs(validation, mixture=TRAINING_MIXTURE), loop)
    train(
        stage,
        lambda count: FacePairs(training, count, options.seed + 1),
        loop,
        header=options.config,
    )


def _transform(options: argparse.Namespace) -> None:
    loop = _loop_options(options, "transform", "codes", "autoencoder")
    training, validation = split_faces(options.faces)
    stage = TransformationStage(
        _network(options, loop, start="codes"),
        _fixed_pairs(validation, mixture=TRAINING_MIXTURE),
        loop,
        codes_from=_network(options, loop, start="autoencoder"),
        adversarial=options.adversarial,
    )
    train(
        stage,
        lambda count: FacePairs(training, count, options.seed + 2, crop=options.crop),
        loop,
        header=options.config,
    )


def _correction(options: argparse.Namespace) -> None:
    loop = _loop_options(options, "correction", "transform")
    training, validation = split_faces(options.faces)
    stage = CorrectionStage(
        _network(options, loop, start="transform"),
        _fixed_pairs(validation, mixture=TRAINING_MIXTURE),
        loop,
    )
    train(
        stage,
        lambda count: FacePairs(training, count, options.seed + 3, crop=options.crop),
        loop,
        header=options.config,
    )


def _detail(options: argparse.Namespace) -> None:
    loop = _loop_options(options, "detail", "correction")
    training, validation = split_faces(options.faces)
    stage = DetailStage(
        _network(options, loop, start="correction"),
        _fixed_pairs(validation, mixture=TRAINING_MIXTURE),
        loop,
        adversarial=options.adversarial,
    )
    train(
        stage,
        lambda count: FacePairs(training, count, options.seed + 5, crop=options.crop, focus=DETAIL_FOCUS),
        loop,
        header=options.config,
    )


def _gfpgan(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    network: GFPGANv1Clean = GFPGANv1Clean(**options.config)
    starts = ["correction"] if network.correction is not None else []
    loop = _loop_options(options, "gfpgan", *starts)
    for start in starts:
        trained = read_checkpoint(options.run / f"{start}.pt")
        codeformer = CodeFormer(**trained["header"])
        codeformer.load_state_dict(trained["average"])
        begin_from_correction(network, codeformer)
    training, validation = split_faces(options.faces)
    stage = GfpganStage(
        network.to(loop.device),
        _fixed_pairs(validation, mixture=TRAINING_MIXTURE),
        loop,
        adversarial=options.adversarial,
    )
    judged = options.run / "detail.pt"
    if judged.exists():
        # Its discriminator knows already what sharp faces look like.
        stage.memory.load_state_dict(read_checkpoint(judged)["memory"])
    train(stage, lambda count: FacePairs(training, count, options.seed + 6), loop, header=options.config)


def _detector(options: argparse.Namespace) -> None:
    loop = _loop_options(options, "detector")
    photographs, validation = split_pictures(options.photographs)
    faces, _ = split_faces(options.faces)
    torch.manual_seed(options.seed)
    stage = DistillationStage(
        _on_device(build_retinaface(BACKBONE), loop.device),
        _on_device(load_teacher(options.teacher), loop.device),
        [read_photograph(file) for file in validation[:VALIDATION_FACES]],
    )
    train(
        stage,
        lambda count: Scenes(photographs, faces, count, options.seed),
        loop,
        header={"backbone": BACKBONE},
    )


def _harden(options: argparse.Namespace) -> None:
    loop = _loop_options(options, "hardened", "detector")
    network = _on_device(build_retinaface(BACKBONE), loop.device)
    network.load_state_dict(read_checkpoint(options.run / "detector.pt")["average"])
    teacher_network = _on_device(load_teacher(options.teacher), loop.device)
    teacher = FaceDetector(teacher_network)
    photographs, held_photographs = split_pictures(options.photographs)
    faces, held_faces = split_faces(options.faces)
    faceless = [shipped_picture(name) for name in TAUGHT]
    held_out = LabelledScenes(
        teacher_labels(teacher, held_photographs),
        teacher_labels(teacher, held_faces),
        faceless,
        VALIDATION_SCENES,
        VALIDATION_SEED,
    )
    validation = [held_out.scene(index)[:2] for index in range(VALIDATION_SCENES)]
    stage = HardeningStage(network, teacher_network, validation)
    labels = [teacher_labels(teacher, files) for files in (photographs, faces)]
    train(
        stage,
        lambda count: LabelledScenes(labels[0], labels[1], faceless, count, options.seed + 4),
        loop,
        header={"backbone": BACKBONE},
    )


def _begin(options: argparse.Namespace) -> None:
    options.run.mkdir(parents=True, exist_ok=True)
    weight_set = load_weight_set(options.weights)
    detector = build_retinaface(BACKBONE)
    load_into(detector, weight_set.detector)
    kept: Any = build("restorer", weight_set.restorer, CodeFormer)
    load_into(kept, weight_set.restorer)
    config = options.config or dict(weight_set.restorer.config)
    restorer = CodeFormer(**config)
    zero_residual_branches(restorer)
    state = restorer.state_dict()
    state |= {name: value for name, value in kept.state_dict().items() if name in state}
    for stage, average, header in (
        ("detector", detector.state_dict(), {"backbone": BACKBONE}),
        ("correction", state, config),
    ):
        path = options.run / f"{stage}.pt"
        if path.exists():
            raise TrainingError(f"{path}: is there already; name another --run.")
        begun = {"header": header, "average": average, "recipe": {}, "step": 0, "steps": 0}
        torch.save(begun, path)


def _export(options: argparse.Namespace) -> None:
    options.to.mkdir(parents=True, exist_ok=True)
    entries = {}
    for role, stages in STAGES_OF.items():
        found = [path for stage in stages if (path := options.run / f"{stage}.pt").exists()]
        for later, earlier in itertools.pairwise(found):
            _check_begun_from(later, read_checkpoint(later), earlier)
        for path in found[:1]:
            checkpoint = read_checkpoint(path)
            if path.stem == "hardened":
                before = read_checkpoint(options.run / "detector.pt")["average"]
                checkpoint["average"] = blended(before, checkpoint["average"])
            entries[role] = export_network(checkpoint, role, options.to, options.licence)
            print(
                f"{options.to / entries[role]['file']}: {entries[role]['bytes'] / 1e6:.2f} MB, from step "
                f"{checkpoint['step']} of {checkpoint['steps']}"
            )
    if not entries:
        raise TrainingError(f"{options.run}: expected transform.pt or detector.pt, found neither.")
    if options.detector_from:
        entries["detector"] = copy_network(options.detector_from, "detector", options.to)
    write_manifest(options.to, options.description, entries)
    # Reports what is missing, for example a detector (--detector-from).
    load_models(load_weight_set(options.to), torch.device("cpu"))


def _check_begun_from(path: Path, checkpoint: Mapping[str, Any], earlier: Path) -> None:
    if digest_of(read_checkpoint(earlier)) != checkpoint["recipe"].get("begun_from"):
        raise TrainingError(
            f"{path}: expected a stage that started from the network in {earlier.name}, but that was trained "
            f"further since; remove {path.name} and run its stage again."
        )


def _evaluate(options: argparse.Namespace) -> None:
    if not options.faces and not (options.photographs and options.teacher):
        raise InputError("expected --faces, or --photographs with --teacher, or all three.")
    device = available_device(options.device)
    weight_set = load_weight_set(options.weights)
    models = load_models(weight_set, device, _restorers_of(weight_set))
    other = load_models(load_weight_set(options.compared_with), device) if options.compared_with else None
    scores: dict[str, Any] = {
        "weights": options.weights,
        "sha256": {
            file.role: file.sha256
            for file in (*dict(weight_set.files()).values(), *weight_set.optional.values())
        },
        "machine": describe_machine(device),
    }
    if options.faces:
        files = pictures_in(options.faces)
        scores["faces"] = len(files)
        with torch_switches(cudnn_benchmark=False):
            # The rewritten networks compute the same in less time.
            scores["restorer"] = measure_restorer(models.optimized(None).restorers, files)
            if other is not None:
                restorers = other.optimized(None).restorers
                scores["restorer_compared"] = measure_restorer(restorers, files, ("moderate",))
        for title in ("restorer", "restorer_compared"):
            for kind, methods in scores.get(title, {}).items():
                for method, quality in methods.items():
                    print(
                        f"{title} {kind:9} {method:7} PSNR {quality['psnr_db']:6.2f} dB  "
                        f"SSIM {quality['ssim']:.3f}  colour shift {quality['colour_shift']:.2f}  "
                        f"sharpness of the eyes {quality['eye_sharpness']:.2f}"
                    )
    if options.photographs and options.teacher:
        teacher = FaceDetector(load_teacher(options.teacher).to(device))
        photographs = pictures_in(options.photographs)
        detectors = {"this": models.detector} | ({"compared": other.detector} if other else {})
        with torch_switches(cudnn_benchmark=False):
            scores["detector"] = measure_detector(models.detector, teacher, photographs)
            held_out = [*photographs, *(pictures_in(options.faces) if options.faces else [])]
            scores["robustness"] = measure_robustness(detectors, teacher, held_out)
        for name, value in scores["detector"].items():
            print(f"detector {name}: {value:.4g}")
        for name, result in scores["robustness"]["detectors"].items():
            shares = ", ".join(f"{kind} {share:.3f}" for kind, share in result["recall"].items())
            print(f"detector {name}: ghosts {result['ghosts']}, recall {shares}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(scores, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _page(options: argparse.Namespace) -> None:
    weight_set = load_weight_set(options.weights)
    pipeline = Pipeline.load(
        weight_set, available_device(options.device), restorers=_restorers_of(weight_set)
    )
    print(write_page(pipeline, pictures_in(options.faces), pictures_in(options.photographs), options.to))


def _restorers_of(weight_set: WeightSet) -> list[str]:
    """All restorers of a set, each in its newest version."""
    return [name for name in RESTORERS if name == "codeformer" or name in weight_set.optional]


def _align(options: argparse.Namespace) -> None:
    detector = load_models(load_weight_set(options.weights), available_device(options.device)).detector
    options.to.mkdir(parents=True, exist_ok=True)
    numbers: Counter[Path] = Counter()
    for file, face in aligned_faces(detector, pictures_in(options.photographs)):
        _, data = cv2.imencode(".png", face)
        # Named after the photograph, so that a second run replaces these files.
        (options.to / f"{file.name}_{numbers[file]}.png").write_bytes(data.tobytes())
        numbers[file] += 1
    print(f"{options.to}: {numbers.total()} faces of {len(numbers)} photographs")


def _fixed_pairs(files: Sequence[Path], *, mixture: Mixture | None) -> Pairs:
    """The few pairs that are used for every validation."""
    files = files[:VALIDATION_FACES]
    return list(DataLoader(FacePairs(files, len(files), VALIDATION_SEED, mixture=mixture, augment=False)))


def _on_device(network: Any, device: torch.device) -> Any:
    return network.to(device, memory_format=torch.channels_last)


def _network(options: argparse.Namespace, loop: Options, start: str | None = None) -> CodeFormer:
    """The restorer on its device: new, or from the checkpoint of a stage."""
    network: CodeFormer = _on_device(CodeFormer(**options.config), loop.device)
    if start is not None:
        state = read_checkpoint(options.run / f"{start}.pt")
        if state["header"] != options.config:
            raise TrainingError(
                f"{options.run}: expected a network of {options.config}, found one of {state['header']}; "
                "correct --config or --run."
            )
        network.load_state_dict(state["average"])
    return network


_COMMANDS: Final[Mapping[str, Callable[[argparse.Namespace], None]]] = {
    "autoencoder": _autoencoder,
    "codes": _codes,
    "transform": _transform,
    "correction": _correction,
    "detail": _detail,
    "gfpgan": _gfpgan,
    "detector": _detector,
    "harden": _harden,
    "begin": _begin,
    "export": _export,
    "evaluate": _evaluate,
    "page": _page,
    "align": _align,
}


if __name__ == "__main__":
    sys.exit(main())
