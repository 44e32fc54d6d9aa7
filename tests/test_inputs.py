"""Unusual inputs: each gives the right picture, or an error that names the picture and the reason."""

import base64
import contextlib
import http.server
import io
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from codeformer.engine.pipeline import Pipeline
from codeformer.errors import CancelledError, ImageError, OptionError, TimeLimitError
from codeformer.imaging.files import decode_image
from codeformer.limits import Limits
from codeformer.options import Options
from codeformer.serving.fetching import FetchPolicy
from codeformer.serving.request import serve
from tests.test_files import gradient, png_header, save


def picture_file(kind: str, mode: str = "RGB", *, size: Any = (64, 48), **options: Any) -> bytes:
    return save(Image.fromarray(gradient(size[1], size[0])).convert(mode), kind, **options)


def tiff_16() -> bytes:
    return save(Image.fromarray(np.full((48, 64), 30_000, np.uint16)), "TIFF")


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture_file("JPEG", exif=exif)


# Written by `jpegtran -arithmetic`, because no library in the environment can write such files.
ARITHMETIC_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6j"
    "q62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
    "pKSkpKSkpKT/yQARCAAwAEADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AD3zB7xKcDrLvYQMMswUvSJBWIy5"
    "tlG8xkTLbxVJtHbe1DxybNTn521X3kFyNlutzhPpz7I8847pkYp6dxZnVK2KcJe+fyXfW75dSiUTpr7Y/9k="
)


def webp_with_frames() -> bytes:
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green")]
    return save(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def gif_with_frames() -> bytes:
    frames = [Image.new("P", (64, 48), colour) for colour in (1, 2, 3)]
    return save(frames[0], "GIF", save_all=True, append_images=frames[1:])


def text_bomb() -> bytes:
    """A PNG whose compressed comment is far larger than the file."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    picture = picture_file("PNG")
    comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 80_000_000))
    return picture[:33] + comment + picture[33:]


GOOD: dict[str, tuple[Callable[[], bytes], tuple[int, int]]] = {
    "grey": (lambda: picture_file("JPEG", "L"), (64, 48)),
    "grey and alpha": (lambda: picture_file("PNG", "LA"), (64, 48)),
    "palette": (lambda: picture_file("PNG", "P"), (64, 48)),
    "palette with transparency": (lambda: picture_file("GIF", "P", transparency=3), (64, 48)),
    "CMYK": (lambda: picture_file("JPEG", "CMYK"), (64, 48)),
    "CMYK TIFF": (lambda: picture_file("TIFF", "CMYK"), (64, 48)),
    "one bit": (lambda: picture_file("PNG", "1"), (64, 48)),
    "16 bits": (tiff_16, (64, 48)),
    "progressive": (lambda: picture_file("JPEG", progressive=True), (64, 48)),
    "arithmetic": (lambda: ARITHMETIC_JPEG, (64, 48)),
    "animated GIF": (gif_with_frames, (64, 48)),
    "animated WebP": (webp_with_frames, (64, 48)),
    "a single pixel": (lambda: picture_file("PNG", size=(1, 1)), (1, 1)),
    "one pixel high": (lambda: picture_file("PNG", size=(20, 1)), (20, 1)),
    "narrow": (lambda: picture_file("PNG", size=(30, 600)), (30, 600)),
    "with data after its end": (lambda: picture_file("JPEG") + b"\0" * 999, (64, 48)),
    **{
        f"EXIF orientation {number}": (
            partial(turned, number),
            (64, 48) if number < 5 else (48, 64),
        )
        for number in range(1, 9)
    },
    "an impossible orientation": (lambda: turned(77), (64, 48)),
}

BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "the file is empty"),
    "text": (lambda: b"just words, with a .jpg at the end", "not a picture"),
    "HTML": (lambda: b"<!doctype html><html><body>404</body></html>", "not a picture"),
    "SVG": (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "not a picture",
    ),
    "PDF": (lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "not a picture"),
    "video": (lambda: b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + b"\0" * 99, "not a picture"),
    "ZIP": (lambda: b"PK\3\4" + b"\0" * 60, "not a picture"),
    "cut in half": (lambda: picture_file("JPEG")[:900], "damaged or cut short"),
    "cut in its header": (lambda: picture_file("PNG")[:20], "damaged or cut short|not a picture"),
    "a bomb": (lambda: png_header(60_000, 60_000), "pixels"),
    "a larger bomb": (lambda: png_header(2**31 - 1, 2**31 - 1), "pixels"),
    "no width": (lambda: png_header(0, 100), "damaged|not a picture|expected"),
    "a line": (lambda: picture_file("PNG", size=(1, 5000)), "times the short one"),
    "a strip": (lambda: picture_file("PNG", size=(10_000, 30)), "times the short one"),
    "floats": (lambda: save(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "unsupported samples"),
    "a text bomb": (text_bomb, "damaged|not a picture"),
}


@pytest.fixture
def good_file(tmp_path: Path) -> Path:
    path = tmp_path / "good.jpg"
    path.write_bytes(picture_file("JPEG"))
    return path


@pytest.mark.parametrize("case", GOOD)
def test_unusual_pictures_are_served_at_their_size(
    blind_pipeline: Pipeline, tmp_path: Path, case: str
) -> None:
    make, (width, height) = GOOD[case]
    path = tmp_path / "odd name, ünïcode\nand a line.jpg"
    path.write_bytes(make())
    [result] = serve(blind_pipeline, [path]).results
    assert result.image_bgr.shape == (height, width, 3)


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_with_a_reason(
    blind_pipeline: Pipeline, tmp_path: Path, good_file: Path, case: str
) -> None:
    make, reason = BAD[case]
    path = tmp_path / "bad.jpg"
    path.write_bytes(make())
    with pytest.raises(ImageError, match=f"^Image 2: .*({reason})") as raised:
        serve(blind_pipeline, [good_file, path])
    assert raised.value.index == 2
    assert str(tmp_path) not in str(raised.value), "the message contains a path of the server"
    assert len(serve(blind_pipeline, [good_file]).files) == 1


def test_paths_that_are_not_files_are_refused(
    blind_pipeline: Pipeline, tmp_path: Path, good_file: Path
) -> None:
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe, Path("/dev/zero"), Path("/dev/stdin")):
        with pytest.raises(
            ImageError, match=r"^Image 1: (expected a file, got a folder or a device|the file cannot be read)"
        ):
            serve(blind_pipeline, [path])
    link = tmp_path / "link.jpg"
    link.symlink_to(good_file)
    assert len(serve(blind_pipeline, [link, link, good_file]).files) == 3


# The hosts of these tests are on this machine.
LOCAL = FetchPolicy(allow_private_addresses=True)


class Answers(http.server.BaseHTTPRequestHandler):
    """Serves a picture, and fails in various ways."""

    never = threading.Event()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            photo = picture_file("JPEG")
            if self.path == "/cut":
                self.send_header("Content-Length", str(2 * len(photo)))
            self.end_headers()
            self.wfile.write(photo)
            while self.path == "/endless":
                self.wfile.write(bytes(1 << 16))
            while self.path == "/trickle":
                self.wfile.write(b"-")
                self.never.wait(0.02)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server with its scheme in capital letters, which Cog does not fetch."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"HTTP://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_addresses_and_data_uris_that_cog_ignores_are_fetched(blind_pipeline: Pipeline, address: str) -> None:
    photo = picture_file("JPEG")
    encoded = base64.b64encode(photo).decode()
    percent = "".join(f"%{byte:02x}" for byte in photo)
    inputs = [f"{address}/photo", address.replace("HTTP", "Http") + "/photo"]
    inputs += [f"DATA:image/jpeg;base64,{encoded}", f"Data:image/jpeg,{percent}"]
    for decoded in serve(blind_pipeline, inputs, fetch_policy=LOCAL).photos:
        np.testing.assert_array_equal(decoded.image_bgr, decode_image(photo))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "answered 404"),
        ("/cut", "cannot be fetched"),
        ("/away", "redirects to something that is no http"),
        ("/endless", "at most 72,000,000 bytes"),
    ],
)
def test_an_address_that_delivers_no_picture(
    blind_pipeline: Pipeline, address: str, path: str, reason: str
) -> None:
    with pytest.raises(ImageError, match=f"^Image 1: .*{reason}") as raised:
        serve(blind_pipeline, [f"{address}{path}"], limits=Limits(max_megapixels=1), fetch_policy=LOCAL)
    assert "127.0.0.1" not in str(raised.value)


def test_a_transfer_ends_at_the_deadline_or_when_cancelled(blind_pipeline: Pipeline, address: str) -> None:
    with pytest.raises(TimeLimitError, match="image 1's transfer"):
        serve(blind_pipeline, [f"{address}/trickle"], limits=Limits(max_seconds=0.5), fetch_policy=LOCAL)
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledError):
        serve(blind_pipeline, [f"{address}/trickle"], fetch_policy=LOCAL, stop=stop)


@pytest.mark.parametrize(
    "text", ["DATA:image/png;base64,A", "FTP://127.0.0.1/a.jpg", "HTTP://", "HTTP:photo"]
)
def test_strings_that_are_not_addresses_are_refused(blind_pipeline: Pipeline, text: str) -> None:
    with pytest.raises(ImageError, match=r"^Image 1: (expected|the address cannot be fetched)"):
        serve(blind_pipeline, [text])


@pytest.mark.parametrize("fidelity", ["0.5", float("nan"), float("inf"), -1, 2, None, [0.5], 10**400])
def test_invalid_fidelities_are_refused(blind_pipeline: Pipeline, good_file: Path, fidelity: Any) -> None:
    with pytest.raises(OptionError, match="codeformer_fidelity"):
        serve(blind_pipeline, [good_file], Options(codeformer_fidelity=fidelity))


@pytest.mark.parametrize("fidelity", [0, 1, True - 0.5])
def test_whole_numbers_are_fidelities(blind_pipeline: Pipeline, good_file: Path, fidelity: Any) -> None:
    assert len(serve(blind_pipeline, [good_file], Options(codeformer_fidelity=fidelity)).files) == 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400))
def test_any_bytes_give_a_picture_or_our_error(data: bytes) -> None:
    decodes_or_refuses(data)


VALID = {
    kind: picture_file(kind, **options)
    for kind, options in {
        "JPEG": dict[str, Any](),
        "PNG": {},
        "WEBP": {},
        "BMP": {},
        "TIFF": {"compression": "tiff_lzw"},
        "GIF": {"mode": "P"},
    }.items()
}


CHANGES = ("set", "cut", "repeat", "drop")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=60, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 2**20), st.integers(0, 255), st.sampled_from(CHANGES)),
        min_size=1,
        max_size=8,
    )
)
@pytest.mark.parametrize("kind", VALID)
def test_damaged_pictures_give_a_picture_or_our_error(kind: str, changes: list[tuple[int, int, str]]) -> None:
    data = bytearray(VALID[kind])
    for place, value, change in changes:
        at = place % max(1, len(data))
        if change == "set" and data:
            data[at] = value
        elif change == "cut":
            del data[max(at, 8) :]
        elif change == "repeat":
            data[at:at] = data[at : at + value]
        else:
            del data[at : at + value // 8]
    decodes_or_refuses(bytes(data))


def decodes_or_refuses(data: bytes) -> None:
    """Decodes a file; any exception except our own fails the test."""
    with contextlib.suppress(ImageError):
        decoded = decode_image(data)
        assert decoded.dtype == np.uint8
        with Image.open(io.BytesIO(data)) as picture:
            assert sorted(decoded.shape[:2]) == sorted(picture.size)
