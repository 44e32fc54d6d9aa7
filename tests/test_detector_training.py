"""Training of a detector on degraded pictures, and the scores that tell whether it helps."""

import copy
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from codeformer.engine.detector import FaceDetector, anchors_for, decode_boxes, decode_landmarks
from codeformer.engine.models import load_models
from codeformer.evaluation.degradation import old_photo
from codeformer.imaging.geometry import Detection
from codeformer.networks.retinaface import MEAN_BGR, build_retinaface
from codeformer.training.__main__ import main
from codeformer.training.detection_scores import measure_robustness
from codeformer.training.faceless import TAUGHT, shipped_picture, texture, writing
from codeformer.training.hardening import HardeningStage, match
from codeformer.training.labelled import (
    DOUBT,
    FACE,
    HIDDEN,
    LABEL_WIDTH,
    MAX_LABELS,
    Label,
    LabelledScenes,
    _Canvas,
    teacher_labels,
)
from codeformer.training.loop import Options, digest_of, read_checkpoint, train
from codeformer.training.scenes import SCENE_SIDE
from codeformer.weights.manifest import load_weight_set
from tests import pictures
from tests.conftest import CPU, make_blind_detector

BOX = (120.0, 90.0, 200.0, 190.0)
LANDMARKS = np.array([[140, 120], [180, 122], [160, 140], [145, 165], [175, 165]], np.float32)
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))


def marked_picture() -> tuple[np.ndarray, Detection]:
    """A grey picture with a disc of its own colour at each landmark, and the face it stands for."""
    picture = np.full((320, 300, 3), 128, np.uint8)
    for colour, (x, y) in zip(COLOURS, LANDMARKS, strict=True):
        cv2.circle(picture, (int(x), int(y)), 7, colour, -1)
    return picture, Detection(np.array(BOX, np.float32), 0.99, LANDMARKS)


@pytest.mark.parametrize("seed", range(8))
def test_labels_move_with_the_picture(seed: int) -> None:
    picture, face = marked_picture()
    rng = np.random.default_rng(seed)
    canvas = _Canvas(np.full((SCENE_SIDE, SCENE_SIDE, 3), 128, np.uint8))
    canvas.put(picture, [face], rng, side=350, angle=rng.uniform(-45, 45), overhang=-0.1)
    [label] = canvas.labels
    assert label.kind == FACE
    centres = [
        np.argwhere(np.abs(canvas.scene.astype(int) - colour).max(axis=2) < 40).mean(axis=0)[::-1]
        for colour in COLOURS
    ]
    distances = np.linalg.norm(label.landmarks_xy[:, None] - np.array(centres), axis=2)
    # In a mirrored scene the disc of the right eye lies where the left one's label belongs.
    nearest = distances.argmin(axis=1).tolist()
    assert nearest in ([0, 1, 2, 3, 4], [1, 0, 2, 4, 3])
    assert distances.min(axis=1).max() < 1.5
    assert label.landmarks_xy[0, 0] < label.landmarks_xy[1, 0]
    np.testing.assert_allclose(
        (label.box_xyxy[:2] + label.box_xyxy[2:]) / 2, np.mean(centres, axis=0), atol=0.1 * 350
    )
    grown = (label.box_xyxy[2:] - label.box_xyxy[:2]) / (np.array([80, 100]) * 350 / 300)
    assert grown.min() > 0.9
    assert grown.max() < 1.5


def test_what_is_covered_or_turned_too_far_is_no_face() -> None:
    picture, face = marked_picture()
    rng = np.random.default_rng(0)
    turned = _Canvas(np.zeros((SCENE_SIDE, SCENE_SIDE, 3), np.uint8))
    turned.put(picture, [face], rng, side=300, angle=120, overhang=-0.1)
    assert [label.kind for label in turned.labels] == [DOUBT]
    hidden = _Canvas(np.zeros((SCENE_SIDE, SCENE_SIDE, 3), np.uint8))
    hidden.put(picture, [face], rng, side=300, angle=0, overhang=-0.1)
    box = hidden.labels[0].box_xyxy.round().astype(int)
    for share, kinds in ((0.2, [FACE]), (0.6, [HIDDEN]), (1.0, [])):
        covered = np.zeros((SCENE_SIDE, SCENE_SIDE), bool)
        covered[box[1] : box[1] + round(share * (box[3] - box[1])), box[0] : box[2]] = True
        hidden._hide(covered)
        assert [label.kind for label in hidden.labels] == kinds


@pytest.fixture(scope="module")
def scenes(detector: FaceDetector, tmp_path_factory: pytest.TempPathFactory) -> LabelledScenes:
    folder = tmp_path_factory.mktemp("pictures")
    for name, picture in (("group", pictures.group()), ("face", pictures.portrait())):
        cv2.imwrite(str(folder / f"{name}.png"), picture)
    labels = teacher_labels(detector, sorted(folder.iterdir()))
    sure = [[face for face in faces if face.score > 0.8] for faces in labels.values()]
    assert [len(faces) for faces in sure] == [1, 4]
    faceless = [shipped_picture(name) for name in TAUGHT]
    return LabelledScenes(labels, labels, faceless, 12, seed=3)


def test_scenes_depend_only_on_seed_and_index(scenes: LabelledScenes) -> None:
    kinds = set()
    for index in range(len(scenes)):
        planes, rows, clean = scenes[index]
        assert planes.shape == clean.shape == (3, SCENE_SIDE, SCENE_SIDE)
        assert rows.shape == (MAX_LABELS, LABEL_WIDTH)
        assert all(torch.equal(a, b) for a, b in zip(scenes[index], (planes, rows, clean), strict=True))
        kinds |= set(rows[:, 0].tolist())
        faces = rows[rows[:, 0] == FACE]
        assert (faces[:, 3:5] > faces[:, 1:3]).all()
    assert kinds == {0, FACE, DOUBT, HIDDEN}


@pytest.mark.parametrize("draw", [texture, writing])
def test_drawn_pictures_without_faces_differ_and_show_something(
    draw: Callable[[np.random.Generator], np.ndarray],
) -> None:
    drawn = [draw(np.random.default_rng(seed)) for seed in range(12)]
    assert all(picture.shape == (400, 400, 3) and picture.dtype == np.uint8 for picture in drawn)
    assert all(float(picture.std()) > 1 for picture in drawn)
    assert len({picture.tobytes() for picture in drawn}) == len(drawn)
    np.testing.assert_array_equal(drawn[3], draw(np.random.default_rng(3)))


def test_matched_anchors_decode_to_their_face() -> None:
    anchors = anchors_for(SCENE_SIDE, SCENE_SIDE, torch.device("cpu"))
    rows = torch.zeros(MAX_LABELS, LABEL_WIDTH)
    truth = ((100, 80, 180, 190), (300, 300, 309, 311))
    for row, box in zip(rows, truth, strict=False):
        row[0], row[1:5] = FACE, torch.tensor(box)
        row[5:] = torch.arange(10) + 100.0
    rows[2, 0], rows[2, 1:5] = DOUBT, torch.tensor([400.0, 50, 460, 130])
    goals = match(anchors * SCENE_SIDE, rows)
    taught = goals.face >= 0
    # Even the face that no anchor resembles has one.
    assert set(goals.face[taught].tolist()) == {0, 1}
    expected = rows[goals.face[taught]]
    boxes = decode_boxes(goals.offsets[:, :4], anchors[taught]) * SCENE_SIDE
    torch.testing.assert_close(boxes, expected[:, 1:5], atol=1e-2, rtol=0)
    points = decode_landmarks(goals.offsets[:, 4:], anchors[taught]) * SCENE_SIDE
    torch.testing.assert_close(points.flatten(1), expected[:, 5:], atol=1e-2, rtol=0)
    centres = anchors[goals.doubtful, :2] * SCENE_SIDE
    assert len(centres)
    assert ((centres > torch.tensor([340, 0])) & (centres < torch.tensor([512, 200]))).all()


def make_stage(scenes: LabelledScenes, detector: FaceDetector) -> HardeningStage:
    torch.manual_seed(0)
    return HardeningStage(build_retinaface("mobile0.25"), detector.network, [scenes.scene(0)[:2]])


def test_doubtful_faces_are_not_taught(scenes: LabelledScenes, detector: FaceDetector) -> None:
    stage = make_stage(scenes, detector)
    picture = torch.zeros(1, 3, SCENE_SIDE, SCENE_SIDE)
    rows = torch.zeros(1, MAX_LABELS, LABEL_WIDTH)
    rows[0, 0, 0], rows[0, 0, 1:5] = DOUBT, torch.tensor([0.0, 0, SCENE_SIDE, SCENE_SIDE])
    rows[0, 1] = rows[0, 0]
    anchors = anchors_for(SCENE_SIDE, SCENE_SIDE, torch.device("cpu")) * SCENE_SIDE
    doubtful = match(anchors, rows[0]).doubtful
    largest = anchors[:, 2] == 512
    assert doubtful[largest].any()
    with torch.no_grad():
        none = stage.losses([picture, torch.zeros_like(rows), picture], 0.5)
        doubt = stage.losses([picture, rows, picture], 0.5)
    assert float(none["scores"]) > 0
    assert float(doubt["boxes"]) == float(doubt["landmarks"]) == float(none["boxes"]) == 0


def network_input(scene: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(scene.transpose(2, 0, 1)).float() - torch.tensor(MEAN_BGR).view(3, 1, 1)


def test_the_teacher_answers_for_faces_that_are_hidden_or_moved(
    scenes: LabelledScenes, detector: FaceDetector
) -> None:
    scene = np.asarray(cv2.resize(pictures.portrait(), (SCENE_SIDE, SCENE_SIDE)), np.uint8)
    [[face]] = detector.detect_at_size(scene[None])
    picture = network_input(scene)[None]
    nothing = torch.full_like(picture, 0.0)

    def losses(kind: float, shift: float, clean: Tensor) -> dict[str, float]:
        rows = torch.zeros(1, MAX_LABELS, LABEL_WIDTH)
        rows[0, 0, 0], rows[0, 0, 1:5] = kind, torch.from_numpy(face.box_xyxy)
        rows[0, 0, 5:] = torch.from_numpy(face.landmarks_xy).flatten() + shift
        # The network to be trained is the teacher itself: what the teacher says costs nothing.
        stage = HardeningStage(copy.deepcopy(detector.network), detector.network, [scenes.scene(0)[:2]])
        return {
            name: float(term.detach()) for name, term in stage.losses([picture, rows, clean], 0.5).items()
        }

    side = float((face.box_xyxy[2:] - face.box_xyxy[:2]).mean())
    hidden = losses(HIDDEN, 0.03 * side, picture)
    assert hidden["landmarks"] == 0
    assert hidden["hidden"] < 1e-3
    # Anchors at the face's edge, where the teacher is not sure, have the label's.
    labelled = losses(FACE, 0.03 * side, nothing)["landmarks"]
    assert losses(FACE, 0.03 * side, picture)["landmarks"] < 0.7 * labelled
    # Another face's landmarks are not corrected.
    assert losses(FACE, 0.5 * side, picture)["landmarks"] == losses(FACE, 0.5 * side, nothing)["landmarks"]
    # If nothing can be seen of it, to see it is a mistake, where it is hidden; a labelled face is one.
    unseen = losses(HIDDEN, 0.0, nothing)
    assert unseen["hidden"] > 0.5
    assert unseen["boxes"] == unseen["landmarks"] == 0
    assert losses(FACE, 0.0, nothing)["hidden"] == 0


def test_hardening_learns_and_leaves_the_statistics(
    scenes: LabelledScenes, detector: FaceDetector, tmp_path: Path
) -> None:
    stage = make_stage(scenes, detector)
    options = Options(tmp_path / "stage.pt", steps=12, batch=2, learning_rate=1e-2, workers=0, save_every=12)
    statistics = {n: v.clone() for n, v in stage.network.state_dict().items() if "running" in n}

    class Few(Dataset[tuple[Tensor, Tensor, Tensor]]):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
            return scenes[index % 2]

    batch = [torch.stack(parts) for parts in zip(*(scenes[index] for index in range(2)), strict=True)]
    before = sum(float(term.detach()) for term in stage.losses(batch, 0.0).values())
    train(stage, lambda _: Few(), options, header={})
    assert sum(float(term.detach()) for term in stage.losses(batch, 0.0).values()) < 0.95 * before
    for name, value in statistics.items():
        assert torch.equal(stage.network.state_dict()[name], value)


def test_a_stage_scores_what_it_finds(scenes: LabelledScenes, detector: FaceDetector) -> None:
    scene = np.asarray(cv2.resize(pictures.portrait(), (SCENE_SIDE, SCENE_SIDE)), np.uint8)
    labels = [
        Label(FACE, face.box_xyxy.astype(float), face.landmarks_xy.astype(float))
        for face in detector.detect_at_size(scene[None])[0]
    ]
    assert labels
    new = build_retinaface("mobile0.25")
    seeing = HardeningStage(new, detector.network, [(scene, labels)])
    assert seeing.score(detector.network) == 1
    assert seeing.score(make_blind_detector()) == 0
    ghosts = HardeningStage(new, detector.network, [(scene, labels), (scene, [])])
    assert ghosts.score(detector.network) == 0


def test_an_old_photo_has_the_same_size_and_other_colours() -> None:
    picture = pictures.portrait()
    results = [old_photo(picture, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert all(result.shape == picture.shape for result in results)
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0].astype(int) - results[2]).mean() > 5
    # One tone: the three channels are proportional, up to noise and compression.
    small = cv2.resize(results[2], (16, 16), interpolation=cv2.INTER_AREA).reshape(-1, 3).astype(float)
    assert np.corrcoef(small.T).min() > 0.98


def test_robustness_is_measured_against_the_clean_picture(detector: FaceDetector, tmp_path: Path) -> None:
    for name, picture in (("group", pictures.group()), ("portrait", pictures.portrait())):
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture)
    blind = FaceDetector(make_blind_detector())
    scores = measure_robustness({"blind": blind}, detector, sorted(tmp_path.iterdir()))
    assert scores["faces"] == 5
    assert scores["faceless_crops"] > 60
    assert set(scores["detectors"]) == {"blind", "teacher"}
    assert scores["detectors"]["teacher"]["recall"]["clean"] == 1
    assert scores["detectors"]["teacher"]["recall"]["moderate"] > 0.5
    assert set(scores["detectors"]["blind"]["recall"].values()) == {0}
    assert scores["detectors"]["blind"]["ghosts"] == 0


def test_a_set_can_be_trained_further(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    assert main(["begin", "--run", run, "--weights", str(tiny_weights)]) == 0
    weight_set = load_weight_set(tiny_weights)
    target = tmp_path / "set"
    assert main(["export", "--run", run, "--to", str(target), "--description", "x", "--licence", "x"]) == 0
    copied = load_weight_set(target)
    assert (copied.restorer.config, copied.detector.config) == (
        weight_set.restorer.config,
        weight_set.detector.config,
    )
    states = [load_models(one, CPU) for one in (weight_set, copied)]
    for network in ("detector", "restorer"):
        theirs, ours = (
            (
                models.detector if network == "detector" else models.restorers["codeformer"]
            ).network.state_dict()
            for models in states
        )
        assert set(theirs) == set(ours)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
    assert main(["begin", "--run", run, "--weights", str(tiny_weights)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_the_exported_detector_lies_between_the_one_before_and_the_hardened_one(
    tiny_weights: Path, tmp_path: Path
) -> None:
    run, target = tmp_path / "run", tmp_path / "set"
    assert main(["begin", "--run", str(run), "--weights", str(tiny_weights)]) == 0
    before = read_checkpoint(run / "detector.pt")
    hardened = {
        name: value + 1 if value.is_floating_point() else value + 7
        for name, value in before["average"].items()
    }
    recipe = {"begun_from": digest_of(before)}
    torch.save({**before, "average": hardened, "recipe": recipe}, run / "hardened.pt")
    arguments = ["export", "--run", str(run), "--to", str(target), "--description", "x", "--licence", "x"]
    assert main(arguments) == 0
    exported = load_models(load_weight_set(target), CPU).detector.network.state_dict()
    for name, value in before["average"].items():
        moved = value + (0.35 if value.is_floating_point() else 7)
        torch.testing.assert_close(exported[name], moved, rtol=1e-3, atol=1e-3)
