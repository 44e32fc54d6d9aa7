"""What waits, what is bounded and what is left over when many requests are served at a time."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codeformer.engine.detector import resize_for_detection
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import resolve_plan
from codeformer.errors import ImageError, OptionError, TimeLimitError
from codeformer.imaging.files import decode_image, size_of
from codeformer.limits import Deadline, Limits
from codeformer.options import Options
from codeformer.serving import service as service_module
from codeformer.serving.scheduler import Ticket
from codeformer.serving.service import MAX_REQUESTS, PixelBudget, Service
from tests.conftest import CPU, service_of
from tests.test_files import gradient, png_header, save


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(save(Image.fromarray(gradient()), "PNG"))
    return path


def test_requests_side_by_side_give_what_they_give_alone(tiny_pipeline: Pipeline, photo: Path) -> None:
    service = service_of(tiny_pipeline)
    sources: list[list[object]] = [["data/1.jpg"], [photo, "data/1.jpg"], [photo], ["data/1.jpg", photo]]
    every = [Options(fidelity, profile) for fidelity in (0.0, 1.0) for profile in ("baseline", "max_speed")]

    async def serve(number: int) -> list[bytes]:
        paths, metrics = await service.serve(sources[number % 4], every[number % 3])
        assert metrics["faces.restored"] == sources[number % 4].count("data/1.jpg")
        assert float(metrics["timing.wait"]) >= 0  # type: ignore[arg-type]
        return [path.read_bytes() for path in paths]

    async def together() -> list[list[bytes]]:
        return list(await asyncio.gather(*(serve(number) for number in range(12))))

    async def one_by_one() -> list[list[bytes]]:
        return [await serve(number) for number in range(12)]

    with asyncio.Runner() as loop:
        for ours, expected in zip(loop.run(together()), loop.run(one_by_one()), strict=True):
            assert len(ours) == len(expected)
            for one, other in zip(ours, expected, strict=True):
                assert np.abs(decode_image(one).astype(int) - decode_image(other)).max() <= 1


def test_each_hears_of_its_own_failure(blind_pipeline: Pipeline, photo: Path, tmp_path: Path) -> None:
    service = service_of(blind_pipeline)
    bad = tmp_path / "bad.png"
    bad.write_bytes(photo.read_bytes()[:-40])

    async def all_at_once() -> list[Any]:
        requests = [[photo], [photo, bad], [], [photo] * 5, [photo, photo]]
        return list(
            await asyncio.gather(
                *(service.serve(sources, Options()) for sources in requests), return_exceptions=True
            )
        )

    good, damaged, none, five, two = asyncio.run(all_at_once())
    assert len(good[0]) == 1
    assert isinstance(damaged, ImageError)
    assert str(damaged).startswith("Image 2: ")
    assert isinstance(none, OptionError)
    assert isinstance(five, OptionError)
    assert len(two[0]) == 2


def test_pictures_wait_until_there_is_room_and_a_large_one_comes_in_alone() -> None:
    budget = PixelBudget(100)
    inside: list[int] = []
    most = 0

    async def work(pixels: int) -> None:
        nonlocal most
        async with budget.taken(pixels):
            inside.append(pixels)
            most = max(most, sum(inside))
            assert sum(inside) <= 100 or inside == [250]
            await asyncio.sleep(0.001)
            inside.remove(pixels)

    async def all_at_once() -> None:
        await asyncio.wait_for(
            asyncio.gather(*(work(pixels) for pixels in [40, 60, 1, 250, 99, 100, 30, 30, 30, 30] * 5)), 60
        )

    asyncio.run(all_at_once())
    assert most == 250
    assert inside == []


def test_who_waits_for_room_hears_that_it_is_too_late() -> None:
    async def scenario() -> None:
        budget = PixelBudget(10)
        deadline = Deadline(0.05)
        async with budget.taken(10):
            with pytest.raises(TimeLimitError):
                async with budget.taken(5, lambda: deadline.check("decoding")):
                    pass
        async with asyncio.timeout(20), budget.taken(10):
            pass

    asyncio.run(scenario())


def test_a_claimed_size_is_refused_before_it_waits_for_room(blind_pipeline: Pipeline, tmp_path: Path) -> None:
    huge = tmp_path / "huge.png"
    huge.write_bytes(png_header(60_000, 60_000))
    service = service_of(blind_pipeline)

    async def scenario() -> None:
        async with service._pixels.taken(1):
            with pytest.raises(ImageError, match="expected at most"):
                await asyncio.wait_for(service.serve([huge], Options()), 20)

    asyncio.run(scenario())


def test_a_cancelled_wait_gives_its_place_back() -> None:
    async def scenario() -> None:
        budget = PixelBudget(10)
        async with budget.taken(10):
            waiting = [asyncio.create_task(_hold(budget, 5)) for _ in range(3)]
            await asyncio.sleep(0.01)
            for task in waiting[:2]:
                task.cancel()
            await asyncio.sleep(0.01)
        await asyncio.wait_for(waiting[2], 20)
        async with asyncio.timeout(20), budget.taken(10):
            pass

    asyncio.run(scenario())


async def _hold(budget: PixelBudget, pixels: int) -> None:
    async with budget.taken(pixels):
        pass


def test_no_more_are_in_work_than_the_service_takes(
    blind_pipeline: Pipeline, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(blind_pipeline)
    in_work = most = 0
    restore = Service._restore

    async def counted(self: Service, *arguments: Any) -> Any:
        nonlocal in_work, most
        in_work += 1
        most = max(most, in_work)
        try:
            return await restore(self, *arguments)
        finally:
            in_work -= 1

    monkeypatch.setattr(Service, "_restore", counted)

    async def all_at_once() -> None:
        tasks = [asyncio.create_task(service.serve([photo], Options())) for _ in range(40)]
        await asyncio.sleep(0.02)
        # Cog lets others in as soon as it has cancelled these.
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(result, tuple) for result in results) >= 20

    asyncio.run(all_at_once())
    assert most == MAX_REQUESTS
    assert in_work == 0


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_a_header_that_tells_no_size_reserves_nothing(data: bytes) -> None:
    assert size_of(data) == (0, 0)


def test_sizes_come_from_the_header_alone(photo: Path) -> None:
    height, width = gradient().shape[:2]
    # The pixels are gone, the header is whole.
    assert size_of(photo.read_bytes()[:-30]) == (width, height)


def test_the_service_takes_as_many_as_cog_lets_in() -> None:
    source = Path(service_module.__file__).parents[2].joinpath("predict.py").read_text()
    assert f"@cog.concurrent(max={MAX_REQUESTS})" in source


def test_the_budget_is_the_limits(blind_pipeline: Pipeline, photo: Path) -> None:
    width, height = size_of(photo.read_bytes())
    tight = Limits(max_megapixels_in_work=1.5 * width * height / 1e6)
    service = service_of(blind_pipeline, tight)

    async def all_at_once() -> None:
        await asyncio.gather(*(service.serve([photo], Options()) for _ in range(20)))

    asyncio.run(asyncio.wait_for(all_at_once(), 100))
    assert service._pixels._taken == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_starts_with_plans_for_the_shapes_that_cameras_take(
    blind_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    seen: list[Any] = []

    def watched(images: Any, *arguments: Any) -> Ticket:
        seen.extend(resize_for_detection(image)[0].shape[:2] for image in images)
        return Ticket(images, *arguments)

    monkeypatch.setattr(service_module, "Ticket", watched)
    service = service_of(blind_pipeline)
    plan = resolve_plan(device=CPU)
    # Only what it does for the GPU is to be seen: it goes on computing on the CPU.
    monkeypatch.setattr(blind_pipeline, "device", torch.device(device))
    monkeypatch.setattr(service_module, "half_dtype_of", lambda _: None)
    monkeypatch.setattr(service_module, "describe_device", str)
    monkeypatch.setattr(
        blind_pipeline, "work_for", lambda recipe: Pipeline.work_for(blind_pipeline, recipe, plan=plan)
    )
    monkeypatch.setattr(blind_pipeline, "check", lambda *_: None)
    service.warm_up()
    cameras_wh = [(3000, 3000), (4000, 3000), (6000, 4000), (3840, 2160)]
    shapes = {resize_for_detection(np.zeros((h, w, 3), np.uint8))[0].shape[:2] for w, h in cameras_wh}
    shapes |= {shape[::-1] for shape in shapes}
    assert (set(seen) >= shapes) == (device == "cuda")
    assert len(seen) == 1 + (len(shapes) if device == "cuda" else 0)
