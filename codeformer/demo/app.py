"""The page to try and to compare: a small web application on this machine, in front of one pipeline.

All tabs share one scheduler, whose thread alone computes. Photos and results are kept in memory for a while,
and never written to a file.
"""

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from codeformer.demo.comparison import (
    DEFAULT_FIDELITIES,
    Photo,
    Price,
    chains,
    compare,
    runs_of,
    title_of,
    variants_of,
)
from codeformer.demo.shelf import GoneError, KeptPhoto, Result, Shelf
from codeformer.demo.tickets import KeepingTicket, PastingTicket
from codeformer.demo.views import (
    STATIC,
    Setup,
    render_comparison,
    render_file,
    render_page,
    render_times,
    to_jpeg,
)
from codeformer.engine.picture import RestoredImage
from codeformer.engine.pipeline import Pipeline, recipe_for
from codeformer.engine.plan import ExecutionPlan, plan_for
from codeformer.errors import CodeFormerError, InputError, OptionError
from codeformer.imaging.files import ImageU8, decode_image, encode_jpeg
from codeformer.limits import Deadline, Limits
from codeformer.options import RUNTIME_PROFILES, STABILITY_MODES, Options, Recipe, check_strength
from codeformer.serving.request import SAMPLES
from codeformer.serving.scheduler import Scheduler, Ticket
from codeformer.serving.service import MAX_REQUESTS, PixelBudget, warm_up

ValueT = TypeVar("ValueT")

# The longer side of the pictures that the page shows.
_SHOWN_PX: Final = 2000
# What is kept: photos in memory, with the faces of their results; and comparisons, as HTML.
_KEPT_BYTES: Final = 1_000_000_000
_KEPT_COMPARISONS_BYTES: Final = 200_000_000
_KEPT_S: Final = 3600.0
_TIDY_EVERY_S: Final = 60.0
# How often somebody who waits is looked after: told how far it is, and whether they are still there.
_LOOK_S: Final = 0.2
_MAX_JSON_BYTES: Final = 100_000
_UPLOADS: Final = 2

# The browser itself refuses whatever would leave this machine.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True)
class KeptComparison:
    """A comparison as one HTML file."""

    html: bytes

    @property
    def nbytes(self) -> int:
        return len(self.html)


class Demo:
    """What the routes of the page do.

    Args:
        pipeline: loaded; nobody else may use it.
        setup: what it was loaded from.
        limits: of each photo and request.
    """

    def __init__(self, pipeline: Pipeline, setup: Setup, limits: Limits) -> None:
        self._pipeline = pipeline
        self._setup = setup
        self._limits = limits
        self._scheduler = Scheduler(pipeline)
        self._files = ThreadPoolExecutor(4, thread_name_prefix="codeformer-files")
        self._comparing = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="codeformer-compare")
        self._uploads = asyncio.Semaphore(_UPLOADS)
        self._pixels = PixelBudget(int(limits.max_megapixels_in_work * 1e6))
        self._photos: Shelf[KeptPhoto] = Shelf(_KEPT_BYTES, _KEPT_S)
        self._comparisons: Shelf[KeptComparison] = Shelf(_KEPT_COMPARISONS_BYTES, _KEPT_S)

    def warm_up(self) -> None:
        """As `serving.service.warm_up`."""
        warm_up(self._pipeline, self._scheduler)

    def close(self) -> None:
        """Ends the thread that computes, when it has done what it has taken."""
        self._scheduler.close()

    def application(self) -> Starlette:
        """The routes."""
        return Starlette(
            routes=[
                Route("/", self.page),
                Mount("/static", StaticFiles(directory=STATIC)),
                Route("/sample.jpg", self.sample),
                Route("/photos", self.upload, methods=["POST"]),
                Route("/photos/{photo}/restore", self.restore, methods=["POST"]),
                Route("/photos/{photo}/paste", self.paste, methods=["POST"]),
                Route("/photos/{photo}/{picture}.jpg", self.picture),
                Route("/compare", self.compare, methods=["POST"]),
                Route("/comparisons/{comparison}.html", self.comparison),
                Route("/forget", self.forget, methods=["POST"]),
            ],
            middleware=[
                Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
                Middleware(_OwnPagesOnly),
            ],
            exception_handlers={CodeFormerError: _refuse, ClientDisconnect: _nobody_there},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async def tidy() -> None:
            while True:
                await asyncio.sleep(_TIDY_EVERY_S)
                self._photos.tidy()
                self._comparisons.tidy()

        task = asyncio.create_task(tidy())
        yield
        task.cancel()

    async def page(self, _: Request) -> Response:
        loaded = chains(self._pipeline)
        html = render_page(
            setup=self._setup,
            restorers={name: title_of(name) for name in loaded},
            lacks_gfpgan="gfpgan" not in loaded,
            profiles=RUNTIME_PROFILES,
            modes=STABILITY_MODES,
            defaults=Options(),
            fidelities={value / 4: value / 4 in DEFAULT_FIDELITIES for value in range(5)},
        )
        return Response(html, media_type="text/html")

    async def sample(self, _: Request) -> Response:
        return FileResponse(SAMPLES / "1.jpg", media_type="image/jpeg")

    async def upload(self, request: Request) -> Response:
        """Decodes the photo that is the body, and keeps it."""
        name = request.query_params.get("name", "photo")
        async with self._uploads:
            data = bytearray()
            async for chunk in request.stream():
                data += chunk
                self._limits.check_bytes(len(data), 1)
            photo = await self._in_thread(partial(self._decode, name, bytes(data)))
        height, width = photo.image_bgr.shape[:2]
        kept = self._photos.add(photo)
        return JSONResponse(
            {"id": kept, "width": width, "height": height, "before": f"/photos/{kept}/before.jpg"}
        )

    def _decode(self, name: str, data: bytes) -> KeptPhoto:
        started = time.perf_counter()
        image = decode_image(data, limits=self._limits)
        decode_ms = (time.perf_counter() - started) * 1e3
        return KeptPhoto(name, image, decode_ms, to_jpeg(image, _SHOWN_PX))

    async def picture(self, request: Request) -> Response:
        """A photo before and after, to look at, and the result to download."""
        photo = self._photos.get(request.path_params["photo"])
        result = photo.result
        pictures = {"before": photo.shown}
        if result is not None:
            pictures |= {"after": result.shown, "download": result.jpeg}
        name = request.path_params["picture"]
        if name not in pictures:
            raise GoneError
        return Response(pictures[name], media_type="image/jpeg")

    async def forget(self, request: Request) -> Response:
        """Removes photos of a tab that is closed, or that were taken off the page."""
        wanted = await _json(request)
        for name in wanted.get("photos", ()):
            self._photos.remove(str(name))
        return Response(status_code=204)

    async def restore(self, request: Request) -> Response:
        """Restores all faces of a photo; the answer is a line of JSON for each step."""
        wanted = await _json(request)
        name = request.path_params["photo"]
        photo = self._photos.get(name)
        options, plan = self._options_of(wanted)
        stop = threading.Event()
        recipe = recipe_for(options)
        work = self._pipeline.work_for(recipe, None, plan, self._limits, self._deadline(stop))
        results: list[RestoredImage] = []

        async def steps() -> AsyncIterator[dict[str, Any]]:
            height, width = photo.image_bgr.shape[:2]
            yield {"state": "waiting"}
            async with self._pixels.taken(width * height):
                ticket = KeepingTicket(photo.image_bgr, work, results.append)
                self._scheduler.submit(ticket)
                async for step in _until(ticket.done, partial(_progress_of, ticket)):
                    yield step
                [result] = results
                jpeg, shown = await self._in_thread(partial(_encode, result.image_bgr))
                photo.result = Result(ticket.kept(), jpeg, shown)
                self._photos.tidy()
            yield {
                "state": "done",
                "faces": [
                    {
                        "number": number,
                        "score": round(face.score, 3),
                        "box": (face.box_xyxy / [width, height, width, height]).round(5).tolist(),
                        "size": (face.box_xyxy[2:] - face.box_xyxy[:2]).round().astype(int).tolist(),
                    }
                    for number, face in enumerate(result.faces, start=1)
                ],
                "skipped": [face.reason for face in result.skipped_faces],
                "losing_detail": result.faces_losing_detail,
                "times": render_times(result.elapsed_ms),
                **_links(name),
            }

        return self._stream(steps(), stop)

    async def paste(self, request: Request) -> Response:
        """Leaves faces of the latest result out, or takes them back in, and changes the strength."""
        wanted = await _json(request)
        name = request.path_params["photo"]
        photo = self._photos.get(name)
        if photo.result is None:
            raise GoneError
        kept = photo.result.kept
        results: list[RestoredImage] = []
        ticket = PastingTicket(
            photo.image_bgr,
            kept,
            frozenset(_list_of(wanted, "left_out")),
            check_strength(wanted.get("strength")),
            self._deadline(threading.Event()),
            results.append,
        )
        self._scheduler.submit(ticket)
        async for _ in _until(ticket.done, dict):
            pass
        jpeg, shown = await self._in_thread(partial(_encode, results[0].image_bgr))
        if photo.result.kept is kept:
            # Not restored again meanwhile.
            photo.result = Result(kept, jpeg, shown)
        return JSONResponse(_links(name))

    async def compare(self, request: Request) -> Response:
        """Restores a photo by several recipes; the answer is a line of JSON for each step."""
        wanted = await _json(request)
        kept = self._photos.get(str(wanted.get("photo")))
        clean = self._photos.get(str(wanted["clean"])).image_bgr if wanted.get("clean") else None
        options, plan = self._options_of(wanted)
        variants = variants_of(_list_of(wanted, "restorers"), _list_of(wanted, "fidelities"))
        price = Price.parse(str(wanted["price"])) if wanted.get("price") else None
        photo = Photo(kept.name, kept.image_bgr, kept.decode_ms, clean)
        for variant in variants:
            self._pipeline.check(plan, variant.recipe)
        stop = threading.Event()
        runs, done = runs_of(variants), 0

        def restore(image_bgr: ImageU8, recipe: Recipe) -> RestoredImage:
            return self._run(image_bgr, recipe, plan, stop)

        def count(finished: int) -> None:
            nonlocal done
            done = finished

        async def steps() -> AsyncIterator[dict[str, Any]]:
            yield {"state": "waiting"}
            height, width = photo.image_bgr.shape[:2]
            async with self._pixels.taken(width * height):
                work = self._comparing.submit(compare, photo, variants, restore, on_step=count)
                async for step in _until(work, lambda: {"state": "comparing", "done": done, "of": runs}):
                    yield step
            plan_in_words = f"{options.runtime_profile}, {options.stability_mode}"
            part = await self._in_thread(
                partial(render_comparison, [work.result()], self._setup, plan_in_words, 1, price)
            )
            name = self._comparisons.add(KeptComparison(render_file(part).encode()))
            yield {"state": "done", "html": part, "file": f"/comparisons/{name}.html"}

        return self._stream(steps(), stop)

    async def comparison(self, request: Request) -> Response:
        html = self._comparisons.get(request.path_params["comparison"]).html
        return Response(
            html,
            media_type="text/html",
            headers={"content-disposition": 'attachment; filename="comparison.html"'},
        )

    def _run(
        self, image_bgr: ImageU8, recipe: Recipe, plan: ExecutionPlan, stop: threading.Event
    ) -> RestoredImage:
        """Restores one picture in its turn; for a thread that may wait."""
        results: list[RestoredImage] = []
        work = self._pipeline.work_for(recipe, None, plan, self._limits, self._deadline(stop))
        ticket = Ticket([image_bgr], work, lambda _, result: results.append(result))
        self._scheduler.submit(ticket)
        ticket.done.result()
        return results[0]

    def _options_of(self, wanted: Mapping[str, Any]) -> tuple[Options, ExecutionPlan]:
        names = {field.name for field in dataclasses.fields(Options)} - {
            "faces",
            "min_face_px",
            "compile_backend",
        }
        chosen = {name: wanted[name] for name in names & set(wanted)}
        options = Options(compile_backend="none", **chosen)
        return options, plan_for(options, self._pipeline.device)

    def _deadline(self, stop: threading.Event) -> Deadline:
        return Deadline(self._limits.max_seconds, stop)

    async def _in_thread(self, call: Callable[[], ValueT]) -> ValueT:
        return await asyncio.get_running_loop().run_in_executor(self._files, call)

    def _stream(self, steps: AsyncIterator[dict[str, Any]], stop: threading.Event) -> Response:
        """Each step as a line of JSON; the last one says what went wrong, if something did.

        When the connection is closed, Starlette cancels the stream, and the work ends at its next step.
        """

        async def lines() -> AsyncIterator[bytes]:
            try:
                async for step in steps:
                    yield json.dumps(step).encode() + b"\n"
            except CodeFormerError as failure:
                yield json.dumps({"state": "failed", "message": _sentence(failure)}).encode() + b"\n"
            finally:
                stop.set()

        return StreamingResponse(lines(), media_type="application/x-ndjson")


class _OwnPagesOnly:
    """Refuses requests that another site's page has made the browser send, and adds the headers of safety."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            refusal = PlainTextResponse("expected a request of this page, got one of another site.", 403)
            await refusal(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


async def _until(done: Any, describe: Callable[[], dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """Gives what `describe` says whenever it changes, until a `concurrent.futures.Future` is done.

    Raises:
        BaseException: what the future failed with.
    """
    loop = asyncio.get_running_loop()
    is_done = asyncio.Event()
    done.add_done_callback(lambda _: loop.call_soon_threadsafe(is_done.set))
    last: dict[str, Any] = {}
    while not is_done.is_set():
        step = describe()
        if step != last:
            yield step
            last = step
        try:
            await asyncio.wait_for(is_done.wait(), _LOOK_S)
        except TimeoutError:
            continue
    done.result()


def _progress_of(ticket: Ticket) -> dict[str, Any]:
    if ticket.ready_at is None:
        return {"state": "waiting"}
    progress = ticket.progress
    if not progress.found:
        return {"state": "finding"}
    return {"state": "restoring", "done": progress.restored, "of": progress.found}


def _links(photo: str) -> dict[str, str]:
    # Another address after each change, so that the browser loads it.
    version = time.monotonic_ns()
    return {
        "after": f"/photos/{photo}/after.jpg?{version}",
        "download": f"/photos/{photo}/download.jpg?{version}",
    }


def _encode(image_bgr: ImageU8) -> tuple[bytes, bytes]:
    return encode_jpeg(image_bgr), to_jpeg(image_bgr, _SHOWN_PX)


async def _json(request: Request) -> dict[str, Any]:
    """The body, a JSON object.

    Raises:
        InputError: it is something else.
    """
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > _MAX_JSON_BYTES:
            raise InputError(f"expected at most {_MAX_JSON_BYTES} bytes of JSON, got more.")
    try:
        value = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as cause:
        raise InputError(f"expected JSON, got {cause}.") from cause
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, got {type(value).__name__}.")
    return value


def _list_of(wanted: Mapping[str, Any], name: str) -> list[Any]:
    value = wanted.get(name)
    if not isinstance(value, list) or any(isinstance(item, list | dict) for item in value):
        raise OptionError(name, value, "a list")
    return value


async def _refuse(_: Request, failure: Exception) -> Response:
    if not isinstance(failure, CodeFormerError):
        raise failure
    status = 410 if isinstance(failure, GoneError) else 400 if isinstance(failure, InputError) else 500
    return JSONResponse({"message": _sentence(failure)}, status)


async def _nobody_there(_: Request, __: Exception) -> Response:
    return Response(status_code=400)


def _sentence(failure: CodeFormerError) -> str:
    text = failure.local
    return text[:1].upper() + text[1:]
