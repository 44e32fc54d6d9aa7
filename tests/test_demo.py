"""The page's routes, in front of a small pipeline: what is kept, for whom, and what is refused."""

import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import requests
import torch
import uvicorn

from codeformer.cli.demo import _restorers as restorers_of_page
from codeformer.cli.main import main
from codeformer.demo.app import Demo
from codeformer.demo.shelf import GoneError, Shelf
from codeformer.demo.tickets import KeepingTicket, PastingTicket
from codeformer.demo.views import Setup
from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.picture import RestoredImage
from codeformer.engine.pipeline import Pipeline, recipe_of
from codeformer.engine.plan import resolve_plan
from codeformer.errors import CancelledError, OptionError
from codeformer.imaging.files import decode_image
from codeformer.imaging.geometry import FFHQ_TEMPLATE_XY, transform_points
from codeformer.limits import Deadline, Limits
from codeformer.options import Recipe, Selection
from codeformer.serving.scheduler import Scheduler, Ticket
from codeformer.weights.manifest import load_weight_set
from tests import pictures
from tests.conftest import CPU, make_tiny_restorer, models_of
from tests.test_faces import FixedDetector
from tests.test_pasting import similarity
from tests.test_scheduler import Gate


class Watched(CodeFormerRestorer):
    """Notes which threads compute, and how many at a time."""

    def __init__(self) -> None:
        super().__init__(make_tiny_restorer())
        self.threads: set[int] = set()
        self.faces = 0
        self._alone = threading.Lock()

    def restore(self, crops_bgr: torch.Tensor, fidelities: Any, **options: Any) -> Any:
        assert self._alone.acquire(blocking=False), "two computations at a time"
        with contextlib.closing(_Released(self._alone)):
            self.threads.add(threading.get_ident())
            self.faces += len(crops_bgr)
            return super().restore(crops_bgr, fidelities, **options)


class _Released:
    def __init__(self, lock: threading.Lock) -> None:
        self.close = lock.release


class Page:
    """The page's server in a thread, and a client of it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.demo = Demo(pipeline, Setup.of(load_weight_set("lite"), CPU), Limits())
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        config = uvicorn.Config(self.demo.application(), log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()
        self.demo.close()

    def post(self, path: str, data: Any, **options: Any) -> requests.Response:
        body = data if isinstance(data, bytes) else json.dumps(data)
        return requests.post(self.url + path, body, timeout=60, **options)

    def upload(self, image: np.ndarray | bytes, name: str = "photo.png") -> requests.Response:
        data = image if isinstance(image, bytes) else cv2.imencode(".png", image)[1].tobytes()
        return self.post(f"/photos?name={name}", data)

    def steps(self, path: str, wanted: Any) -> list[dict[str, Any]]:
        reply = self.post(path, wanted)
        assert reply.status_code == 200, reply.text
        return [json.loads(line) for line in reply.text.splitlines()]

    def picture(self, path: str) -> np.ndarray:
        reply = requests.get(self.url + path, timeout=60)
        assert reply.status_code == 200, reply.text
        return decode_image(reply.content)


@contextlib.contextmanager
def serving(pipeline: Pipeline) -> Iterator[Page]:
    page = Page(pipeline)
    try:
        yield page
    finally:
        page.close()


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def page(detector: FaceDetector, watched: Watched) -> Iterator[Page]:
    with serving(Pipeline(models_of(detector, watched), CPU)) as page:
        yield page


@pytest.mark.parametrize("profile", ["baseline", "max_speed"])
def test_pasting_kept_faces_is_the_same_as_restoring_without_the_others(
    watched: Watched, profile: str
) -> None:
    image = np.random.default_rng(3).integers(0, 256, (600, 700, 3), np.uint8)
    # The first two overlap, so that the order of pasting matters.
    faces_xy = [
        transform_points(similarity(size, 0, x, 300), FFHQ_TEMPLATE_XY)
        for size, x in ((0.6, 200), (0.5, 290), (0.3, 560))
    ]
    pipeline = Pipeline(models_of(FixedDetector(*faces_xy), watched), CPU, second_look=False)
    plan, recipe = resolve_plan(profile, device=CPU), recipe_of("codeformer", 0.3)
    results: list[RestoredImage] = []
    with contextlib.closing(Scheduler(pipeline)) as scheduler:
        full = KeepingTicket(image, pipeline.work_for(recipe, plan=plan), results.append)
        scheduler.submit(full)
        full.done.result(60)

        def pasted(left_out: frozenset[int], strength: float) -> RestoredImage:
            ticket = PastingTicket(image, full.kept(), left_out, strength, Deadline(60), results.append)
            scheduler.submit(ticket)
            ticket.done.result(60)
            return results[-1]

        for numbers, strength in (((), 1.0), ((2,), 1.0), ((1, 3), 0.5), ((1, 2, 3), 1.0), ((3,), 1.0)):
            left_out, computed = frozenset(numbers), watched.faces
            ours = pasted(left_out, strength)
            assert watched.faces == computed, "the networks ran again"
            [expected] = pipeline.restore(
                [image],
                plan=plan,
                recipe=Recipe(recipe.steps, strength),
                selection=Selection(left_out=left_out),
            )
            np.testing.assert_array_equal(ours.image_bgr, expected.image_bgr)
            assert len(ours.faces) == 3 - len(left_out)
            assert (ours.image_bgr == image).all() == (len(left_out) == 3)
        with pytest.raises(OptionError, match="left_out: expected numbers of the 3 faces"):
            pasted(frozenset({4}), 1.0)


def test_a_photo_from_upload_to_download_without_a_face_and_with_it_again(page: Page) -> None:
    image = pictures.group()
    photo = page.upload(image).json()
    assert (photo["width"], photo["height"]) == (960, 540)
    *steps, done = page.steps(f"/photos/{photo['id']}/restore", {"codeformer_fidelity": 0.2})
    assert {step["state"] for step in steps} <= {"waiting", "finding", "restoring"}
    assert [face["number"] for face in done["faces"]] == [1, 2, 3, 4]
    for face in done["faces"]:
        left, top, right, bottom = face["box"]
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert face["size"][0] == pytest.approx((right - left) * 960, abs=1)
    assert "Computed in" in done["times"]
    whole = page.picture(done["download"])
    assert whole.shape == image.shape
    first = (np.array(done["faces"][0]["box"]) * [960, 540, 960, 540]).astype(int)
    changed = np.s_[first[1] : first[3], first[0] : first[2]]
    links = page.post(f"/photos/{photo['id']}/paste", {"left_out": [1], "strength": 1}).json()
    assert links["download"] != done["download"], "the browser would show the old picture"
    without = page.picture(links["download"])
    # JPEG of quality 95.
    assert np.abs(without[changed].astype(int) - image[changed]).mean() < 3
    assert np.abs(whole[changed].astype(int) - image[changed]).mean() > 10
    links = page.post(f"/photos/{photo['id']}/paste", {"left_out": [], "strength": 1}).json()
    np.testing.assert_array_equal(page.picture(links["download"]), whole)


def test_each_error_is_a_sentence(page: Page) -> None:
    photo = page.upload(pictures.plain()).json()["id"]
    unknown = page.post("/photos/none/restore", {})
    assert (unknown.status_code, unknown.json()) == (
        410,
        {"message": "It is no longer kept here; add the photo again."},
    )
    for reply, message in (
        (page.upload(b"no picture"), "Not a picture that can be read here"),
        (page.upload(b""), "The file is empty; use an intact copy."),
        (
            page.post(f"/photos/{photo}/restore", {"restorer": "gfpgan"}),
            "Restorer: expected restorers that are",
        ),
        (page.post(f"/photos/{photo}/restore", {"strength": 2}), "Strength: expected a number from 0"),
        (page.post(f"/photos/{photo}/restore", b"{"), "Expected JSON, got "),
        (page.post(f"/photos/{photo}/restore", [1]), "Expected a JSON object, got list."),
        (page.post(f"/photos/{photo}/restore", b" " * 100_001), "Expected at most 100000 bytes of JSON"),
        (page.post("/compare", {"photo": photo, "restorers": "x"}), "Restorers: expected a list, got 'x'."),
        (
            page.post(
                "/compare", {"photo": photo, "restorers": ["codeformer"], "fidelities": [1], "price": "1"}
            ),
            "Price: expected an amount per hour",
        ),
    ):
        assert reply.status_code == 400, reply.text
        assert reply.json()["message"].startswith(message)
    # Before it is restored there is nothing to paste or to download.
    assert page.post(f"/photos/{photo}/paste", {"left_out": [], "strength": 1}).status_code == 410
    assert requests.get(f"{page.url}/photos/{photo}/download.jpg", timeout=60).status_code == 410


def test_a_failure_during_the_work_is_the_last_step(detector: FaceDetector) -> None:
    restorer = Gate()
    restorer.is_open.set()
    with serving(Pipeline(models_of(detector, restorer), CPU)) as page:
        photo = page.upload(pictures.portrait()).json()["id"]
        page.steps(f"/photos/{photo}/restore", {})
        [[restorer.fails_at]] = restorer.levels
        last = page.steps(f"/photos/{photo}/restore", {})[-1]
        assert last["state"] == "failed"
        assert last["message"].startswith("Restore failed on face 1: RuntimeError: no such kernel")
        last = page.steps("/compare", {"photo": photo, "restorers": ["codeformer"], "fidelities": [1]})[-1]
        assert last["state"] == "failed"


def test_tabs_at_the_same_time_share_one_computing_thread(page: Page, watched: Watched) -> None:
    answers: list[list[dict[str, Any]]] = []

    def tab() -> None:
        photo = page.upload(pictures.small_portrait()).json()["id"]
        answers.append(page.steps(f"/photos/{photo}/restore", {}))
        wanted = {"photo": photo, "restorers": ["codeformer"], "fidelities": [0.5]}
        answers.append(page.steps("/compare", wanted))

    threads = [threading.Thread(target=tab) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [steps[-1]["state"] for steps in answers] == ["done"] * 4
    assert len(watched.threads) == 1
    # One run, and for the comparison one to warm up and one that counts.
    assert watched.faces == 2 * 3


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def is_cancelled(ticket: Ticket) -> bool:
    try:
        ticket.work.deadline.check("anything")
    except CancelledError:
        return True
    return False


def test_the_work_of_a_closed_tab_ends_at_its_next_step(detector: FaceDetector) -> None:
    restorer = Gate()
    with serving(Pipeline(models_of(detector, restorer), CPU)) as page:
        photo = page.upload(pictures.group()).json()["id"]
        gone = requests.post(f"{page.url}/photos/{photo}/restore", "{}", stream=True, timeout=60)
        assert restorer.is_reached.wait(60)
        gone.close()
        other = page.upload(pictures.portrait()).json()["id"]
        answers: list[Any] = []
        waiting = threading.Thread(target=lambda: answers.extend(page.steps(f"/photos/{other}/restore", {})))
        waiting.start()
        assert eventually(lambda: is_cancelled(page.demo._scheduler._turns[0]))
        assert not answers
        restorer.is_open.set()
        waiting.join(60)
        assert answers[-1]["state"] == "done"
        assert restorer.batches == [1, 1], "one face of the closed tab, and the other photo's"


def test_a_comparison_as_a_part_of_the_page_and_as_a_file(page: Page) -> None:
    photo = page.upload(pictures.portrait(), "a%26b.png").json()["id"]
    wanted = {
        "photo": photo,
        "clean": photo,
        "restorers": ["codeformer"],
        "fidelities": [0, 1],
        "price": "0.81/h",
    }
    *steps, done = page.steps("/compare", wanted)
    assert steps[-1]["of"] == 4
    assert "a&amp;b.png" in done["html"]
    for text in ("CodeFormer, fidelity 1", "Clean original", "Cost of 1000 photos", "PSNR, dB"):
        assert text in done["html"]
    file = requests.get(page.url + done["file"], timeout=60).text
    assert done["html"] in file
    assert file.startswith("<!doctype html>")


def test_only_this_page_may_ask(page: Page) -> None:
    host = page.url.removeprefix("http://")
    for headers, status in (
        ({}, 200),
        ({"Origin": page.url}, 200),
        ({"Origin": "https://example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "example.org"}, 400),
        ({"Host": "localhost"}, 200),
    ):
        assert requests.get(page.url, headers=headers, timeout=60).status_code == status, headers
    reply = requests.get(page.url, timeout=60)
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    # The only hosts in the page's own files are none.
    for name in ("", "/static/page.js", "/static/style.css"):
        text = requests.get(page.url + name, timeout=60).text
        assert "//" not in text.replace("// ", "").replace(f"http://{host}", ""), name
    assert requests.get(page.url + "/static/../app.py", timeout=60).status_code == 404


def test_the_page_offers_what_is_loaded_and_says_how_to_get_the_rest(page: Page, tiny_weights: Path) -> None:
    alone = requests.get(page.url, timeout=60).text
    assert "weights fetch official --with gfpgan" in alone
    assert 'value="gfpgan' not in alone
    both = Pipeline.load(tiny_weights, "cpu", restorers=("codeformer", "gfpgan"), download=False)
    with serving(both) as other:
        text = requests.get(other.url, timeout=60).text
    assert "weights fetch official --with gfpgan" not in text
    for chain in ("codeformer", "gfpgan", "codeformer+gfpgan", "gfpgan+codeformer"):
        # In both parts of the page.
        assert text.count(f'value="{chain}"') == 2


def test_the_page_loads_the_restorers_that_are_there(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CODEFORMER_RESTORERS", raising=False)
    folder = tmp_path / "set"
    shutil.copytree(tiny_weights, folder)
    weight_set = load_weight_set(folder)
    assert restorers_of_page(weight_set) == ["codeformer", "gfpgan"]
    weight_set.optional["gfpgan"].path.unlink()
    older = ["gfpgan-1.3"] if "gfpgan-1.3" in weight_set.optional else []
    assert restorers_of_page(weight_set) == ["codeformer", *older]
    monkeypatch.setenv("CODEFORMER_RESTORERS", "codeformer")
    assert restorers_of_page(weight_set) is None


def test_photos_go_when_a_tab_is_closed(page: Page) -> None:
    kept, other = (page.upload(pictures.plain()).json()["id"] for _ in range(2))
    assert page.post("/forget", {"photos": [kept, "unknown"]}).status_code == 204
    assert requests.get(f"{page.url}/photos/{kept}/before.jpg", timeout=60).status_code == 410
    assert requests.get(f"{page.url}/photos/{other}/before.jpg", timeout=60).status_code == 200


class Thing:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_what_is_kept_has_bounds_in_time_and_size() -> None:
    now = 0.0
    shelf: Shelf[Thing] = Shelf(100, 60, lambda: now)
    old, used = shelf.add(Thing(10)), shelf.add(Thing(10))
    now = 50
    shelf.get(used)
    now = 61
    with pytest.raises(GoneError):
        shelf.get(old)
    assert shelf.get(used)
    third = shelf.add(Thing(60))
    shelf.get(used)
    # Of what does not fit, the one used longest ago goes first.
    shelf.add(Thing(40))
    with pytest.raises(GoneError):
        shelf.get(third)
    large = shelf.add(Thing(1000))
    assert len(shelf) == 1
    assert shelf.get(large)
    now = 200
    shelf.tidy()
    assert len(shelf) == 0


def test_a_taken_port_is_told_before_the_networks_are_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port), "--weights", "nowhere"]) == 1
    assert f"--port: expected a free port, got {port} (Address already in use)" in capsys.readouterr().err
    assert main(["demo", "--port", "70000", "--weights", "nowhere"]) == 1
    assert "--port: expected a free port, got 70000 (it is no port)" in capsys.readouterr().err
