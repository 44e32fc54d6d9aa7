"""Photos by several recipes: measures, times, costs and the page that shows them."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from codeformer.cli.main import main
from codeformer.demo.comparison import (
    Comparison,
    Photo,
    Price,
    Variant,
    chains,
    compare,
    runs_of,
    variants_of,
)
from codeformer.demo.published import ADVICE, CAVEAT
from codeformer.demo.views import Setup, render_comparison, render_file, shown_time
from codeformer.engine.picture import RestoredImage
from codeformer.engine.pipeline import Pipeline
from codeformer.errors import ImageError, OptionError
from codeformer.imaging import quality
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import crop_face
from codeformer.options import Recipe, Step
from codeformer.weights.manifest import load_weight_set
from tests import pictures
from tests.conftest import CPU


class Restored:
    """Restores with the tiny network, and says how long it took as a test wants it."""

    def __init__(self, pipeline: Pipeline, *totals_ms: float) -> None:
        self.pipeline = pipeline
        self.totals_ms = list(totals_ms)
        self.recipes: list[Recipe] = []
        self.results: dict[Recipe, RestoredImage] = {}

    def __call__(self, image_bgr: ImageU8, recipe: Recipe) -> RestoredImage:
        self.recipes.append(recipe)
        if recipe not in self.results:
            [self.results[recipe]] = self.pipeline.restore([image_bgr], recipe=recipe)
        result = self.results[recipe]
        times = {"detect": 10.0, "restore": self.totals_ms.pop(0) - 10.0, "restorers.codeformer": 5.0}
        return RestoredImage(result.image_bgr, result.faces, (), 0, times, 0, 0)


@pytest.fixture
def two() -> list[Variant]:
    return variants_of(["codeformer"], [0.0, 1.0])


def test_measures_are_those_of_the_aligned_faces_and_the_median_run_counts(
    tiny_pipeline: Pipeline, two: list[Variant]
) -> None:
    image = pictures.group()
    clean = cv2.GaussianBlur(image, (5, 5), 2).astype(np.uint8)
    restore = Restored(tiny_pipeline, 9999, 300, 100, 200, 9999, 40, 60, 50)
    steps: list[int] = []
    found = compare(Photo("group", image, 7.0, clean), two, restore, repeats=3, on_step=steps.append)
    assert steps == list(range(1, runs_of(two, 3) + 1)) == list(range(1, 9))
    assert restore.recipes == [two[0].recipe] * 4 + [two[1].recipe] * 4
    assert [outcome.label for outcome in found.references] == ["Input", "Clean original"]
    assert [outcome.label for outcome in found.outcomes] == [
        "CodeFormer, fidelity 0",
        "CodeFormer, fidelity 1",
    ]
    for outcome, total, variant in zip(found.outcomes, (200, 50), two, strict=True):
        assert sum(ms for stage, ms in outcome.stages_ms.items() if stage != "files") == pytest.approx(total)
        # Decoding, and at least some encoding.
        assert outcome.stages_ms["files"] > 7
        assert outcome.faces_per_hour == pytest.approx(4 * 3.6e6 / outcome.total_ms)
        alone = restore.results[variant.recipe]
        np.testing.assert_array_equal(outcome.image_bgr, alone.image_bgr)
        crops = [
            tuple(crop_face(picture, face.picture_to_face) for picture in (alone.image_bgr, image, clean))
            for face in alone.faces
        ]
        measures = outcome.measures
        assert measures is not None
        assert len(crops) == 4
        for got, each in (
            (
                measures.distance,
                [np.sqrt(((after - before.astype(float)) ** 2).mean()) for after, before, _ in crops],
            ),
            (measures.psnr_db, [quality.psnr_db(after, truth) for after, _, truth in crops]),
            (measures.ssim, [quality.ssim(after, truth) for after, _, truth in crops]),
            (measures.colour_shift, [quality.colour_shift(after, before) for after, before, _ in crops]),
            (measures.sharpness, [quality.sharpness(after) for after, _, _ in crops]),
        ):
            assert got == pytest.approx(np.mean(each))
    before, truth = (outcome.measures for outcome in found.references)
    assert before is not None
    assert truth is not None
    assert (before.distance, before.colour_shift, truth.psnr_db, truth.ssim) == (0, 0, 100, 1)


def test_every_restorer_with_every_fidelity_and_those_without_one_once() -> None:
    variants = variants_of(["codeformer", "gfpgan", "gfpgan+codeformer"], [0, 0.5])
    assert [variant.label for variant in variants] == [
        "CodeFormer, fidelity 0",
        "CodeFormer, fidelity 0.5",
        "GFPGAN",
        "GFPGAN, then CodeFormer, fidelity 0",
        "GFPGAN, then CodeFormer, fidelity 0.5",
    ]
    assert variants[3].recipe == Recipe((Step("gfpgan", None), Step("codeformer", 0.0)))


@pytest.mark.parametrize(
    ("restorers", "fidelities"),
    [([], [0.5]), (["codeformer"], []), (["other"], [0.5]), (["codeformer"], [1.1]), (["codeformer"], ["1"])],
)
def test_recipes_that_are_none(restorers: list[str], fidelities: list[Any]) -> None:
    with pytest.raises(OptionError):
        variants_of(restorers, fidelities)


def test_there_is_an_end_to_recipes() -> None:
    assert len(variants_of(["codeformer"], np.linspace(0, 1, 12).tolist())) == 12
    with pytest.raises(OptionError, match="expected 1 to 12 recipes"):
        variants_of(["codeformer"], np.linspace(0, 1, 13).tolist())


def test_only_loaded_restorers_are_offered(tiny_pipeline: Pipeline, tiny_weights: Path) -> None:
    assert chains(tiny_pipeline) == ("codeformer",)
    both = Pipeline.load(tiny_weights, "cpu", restorers=("codeformer", "gfpgan"), download=False)
    assert chains(both) == ("codeformer", "gfpgan", "codeformer+gfpgan", "gfpgan+codeformer")


def test_prices() -> None:
    # 1000 pictures of 3.6 s are one hour.
    assert Price.parse("0.81/h").per_thousand(3600) == pytest.approx(0.81)
    assert Price.parse(" 2.5e-4 / s").per_thousand(3600) == pytest.approx(0.9)
    assert Price.parse("0/h").per_thousand(3600) == 0
    for text in ("", "1", "1/m", "-1/h", "nan/h", "1e999/h", "h/1", "1,5/h"):
        with pytest.raises(OptionError, match="price: expected an amount per hour or per second"):
            Price.parse(text)


def test_a_clean_original_of_another_size_is_refused() -> None:
    image = pictures.plain()
    with pytest.raises(ImageError, match=r"a\.jpg: expected a clean .* 400 x 300 px, got 399 x 300 px"):
        Photo("a.jpg", image, 0.0, image[:, 1:])


@pytest.mark.parametrize(
    ("milliseconds", "shown"),
    [
        (0.4, "< 1 ms"),
        (999.4, "999 ms"),
        (999.6, "1 s"),
        (1234, "1.23 s"),
        (99_960, "100 s"),
        (1e7, "10,000 s"),
    ],
)
def test_times_have_a_unit_that_suits_them(milliseconds: float, shown: str) -> None:
    assert shown_time(milliseconds).replace("\N{NO-BREAK SPACE}", " ") == shown


class Page(HTMLParser):
    """What a page loads, its texts, and whether its tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.alts: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [str(values[name]) for name in ("src", "href", "srcset", "data") if name in values]
        if tag == "img":
            self.alts.append(values.get("alt") or "")
        if tag not in {"img", "meta", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def compared(tiny_pipeline: Pipeline, two: list[Variant]) -> Comparison:
    restore = Restored(tiny_pipeline, *[3610.0] * 4)
    return compare(Photo("<b>&.jpg", pictures.portrait(), 0.0), two, restore)


def test_the_page_needs_nothing_else_and_quotes_names(compared: Comparison) -> None:
    setup = Setup.of(load_weight_set("lite"), CPU)
    html = render_file(render_comparison([compared], setup, "baseline, safe", 1, Price.parse("1/h")))
    page = Page(html)
    assert page.open == []
    # The face and the photo, as input and by two recipes.
    assert len(page.alts) == 6
    assert all(page.alts)
    assert len(page.loads) == 6 + 1
    assert all(address.startswith("data:") for address in page.loads)
    assert "url(" not in html
    assert "@import" not in html
    assert "<script" not in html
    assert "<b>&.jpg" in page.text
    assert "default-src 'none'" in html
    # 3.6 s and a little for encoding: an hour for 1000 pictures.
    assert re.search(r"\b1\.0\d\b", page.text)


def test_words_about_restorers_come_with_the_official_weights_only(
    compared: Comparison, tiny_weights: Path
) -> None:
    texts = {}
    for name in ("official", "lite", str(tiny_weights)):
        setup = Setup.of(load_weight_set(name), CPU)
        texts[name] = Page(render_comparison([compared], setup, "baseline, safe", 1, None)).text
    official, lite, own = texts.values()
    assert ADVICE[0] in official
    assert "They do not tell" not in official
    for text, told in ((lite, "far from the official quality"), (own, "small random networks for tests")):
        assert told in text
        assert "They do not tell how the official CodeFormer or GFPGAN would do" in text
        assert ADVICE[0] not in text
    for text in texts.values():
        assert CAVEAT in text
        assert "secondary copy" in text
        for figure in ("23.83", "0.620", "83.19", "47.59"):
            assert figure in text


def test_a_photo_without_faces_is_told_as_such(blind_pipeline: Pipeline, two: list[Variant]) -> None:
    found = compare(Photo("plain.png", pictures.plain(), 0.0), two, Restored(blind_pipeline, *[20.0] * 4))
    assert found.faces == 0
    assert all(outcome.measures is None for outcome in (*found.references, *found.outcomes))
    setup = Setup.of(load_weight_set("lite"), CPU)
    text = Page(render_comparison([found], setup, "baseline, safe", 1, None)).text
    assert "No face was found in this photo" in text
    assert "Measures of the faces" not in text


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    clean = pictures.portrait()
    assert cv2.imwrite(str(tmp_path / "clean.png"), clean)
    assert cv2.imwrite(str(tmp_path / "photo.png"), cv2.GaussianBlur(clean, (9, 9), 3))
    return [str(tmp_path / "photo.png"), "--weights"]


def test_the_command_writes_a_page(
    photos: list[str], tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    arguments = [
        "compare",
        *photos,
        str(tiny_weights),
        "-o",
        str(output),
        "--clean",
        str(tmp_path / "clean.png"),
    ]
    more = [
        "--restorers",
        "codeformer",
        "gfpgan+codeformer",
        "gfpgan",
        "--fidelities",
        "0.5",
        "--price",
        "1/h",
    ]
    assert main([*arguments, *more]) == 0
    assert "3 recipes on 1 photo" in capsys.readouterr().out
    page = Page(output.read_text())
    assert len(page.alts) == 2 * (2 + 3)
    for text in (
        "GFPGAN, then CodeFormer, fidelity 0.5",
        "Clean original",
        "PSNR, dB",
        "Cost of 1000 photos",
    ):
        assert text in page.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-o", "photo.png"], "--output: expected a name that ends in .html, got photo.png."),
        (["--clean", "a", "b"], "--clean: expected an original for each of the 1 photos, got 2."),
        (["--repeats", "0"], "--repeats: expected a number from 1, got 0."),
        (["--price", "1"], "price: expected an amount per hour"),
        (["--fidelities", "2"], "codeformer_fidelity: expected a number from 0"),
        (["--clean", "notes.txt"], "notes.txt: not a picture that can be read here"),
        (["--clean", "gone.png"], "gone.png: the file cannot be read (No such file or directory)"),
        (["--clean", "x" * 300], f"{'x' * 300}: the file cannot be read (File name too long)"),
        (["-o", "missing/page.html"], "it cannot be written (No such file or directory)"),
    ],
)
def test_the_command_says_what_is_wrong_before_networks_are_loaded(
    photos: list[str],
    more: list[str],
    message: str,
    tmp_path: Path,
    tiny_weights: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "load", None)
    (tmp_path / "notes.txt").write_text("no photo")
    before = (tmp_path / "photo.png").read_bytes()
    assert main(["compare", *photos, str(tiny_weights), "--fidelities", "1", *more]) == 1
    assert f"error: {message}" in capsys.readouterr().err.replace("missing/page.html: ", "")
    assert (tmp_path / "photo.png").read_bytes() == before


@pytest.mark.parametrize("content", [None, "", "a page"])
def test_a_run_that_fails_leaves_the_page_as_it_was(
    photos: list[str], tmp_path: Path, content: str | None
) -> None:
    page = tmp_path / "page.html"
    if content is not None:
        page.write_text(content)
    assert main(["compare", *photos, str(tmp_path / "no_set"), "-o", str(page)]) == 1
    assert (page.read_text() if page.exists() else None) == content


@pytest.mark.parametrize("command", [["compare", "photo.jpg"], ["demo"]])
def test_a_missing_extra_is_named_before_anything_is_loaded(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("codeformer.extras.find_spec", lambda name: None if name == "jinja2" else name)
    assert main([*command, "--weights", "nowhere"]) == 1
    assert "jinja2 is not installed. Run `pip install 'codeformer[demo]'`" in capsys.readouterr().err
