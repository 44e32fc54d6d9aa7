"""Operator-only information does not reach clients, and error messages stay short."""

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from codeformer.engine.plan import resolve_plan
from codeformer.errors import ImageError, OptionError
from codeformer.imaging.files import decode_image
from codeformer.log import operator_logger
from codeformer.options import check_fidelity
from codeformer.serving.request import serve
from tests.conftest import CPU
from tests.shared import ROOT
from tests.test_files import gradient, save

SECRET = b"key="


def page() -> bytes:
    return SECRET + b" of an internal page"


def png_with_a_broken_chunk() -> bytes:
    """A PNG with a damaged chunk in its pixel data; Pillow quotes the name of that chunk."""
    picture = save(Image.fromarray(gradient(64, 48)), "PNG")
    start = picture.index(b"IDAT") + 4
    half = int.from_bytes(picture[start - 8 : start - 4]) // 2
    cut = picture[: start - 8] + half.to_bytes(4) + b"IDAT" + picture[start : start + half]
    # Four bytes of checksum, then a chunk with an invalid name.
    return cut + b"\0\0\0\0" + (20).to_bytes(4) + SECRET + b"\0" * 40


@pytest.mark.parametrize("make", [page, png_with_a_broken_chunk])
def test_bytes_of_a_file_go_to_the_log_and_not_into_the_error(
    make: Callable[[], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ImageError) as raised:
        decode_image(make(), 2)
    assert SECRET.decode() not in str(raised.value)
    [line] = [record for record in caplog.records if SECRET.decode() in record.getMessage()]
    assert line.name == operator_logger.name
    assert "image 2" in line.getMessage()


def test_unreadable_metadata_is_quoted_for_the_operator_only(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (64, 48)).save(stream, "WEBP", exif=b"Exif\0\0" + SECRET * 4)
    assert decode_image(stream.getvalue()).shape == (48, 64, 3)
    quoting = [record for record in caplog.records if SECRET.decode() in record.getMessage()]
    assert [record.name for record in quoting] == [operator_logger.name]


PROGRAM = """
import io, logging, sys, warnings
from codeformer.log import configure_server_log, operator_logger

sys.stderr = io.StringIO()  # as Cog puts an object of its own there
configure_server_log()
operator_logger.warning("for the operator")
logging.getLogger("codeformer.serving.request").info("for everyone")
warnings.warn("with a path", UserWarning)
print(sys.stderr.getvalue(), end="")
"""


def test_operator_lines_bypass_cogs_stream() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "INFO codeformer.serving.request: for everyone\n"
    assert done.stderr.startswith("WARNING codeformer.operator: for the operator\nWARNING py.warnings: ")
    assert "with a path" in done.stderr


HUGE: dict[str, object] = {
    "text": "data:image/png;base64," + "A" * 3_000_000,
    "bytes": b"A" * 3_000_000,
    "a list": ["A" * 1000] * 1000,
    "lists in lists": [[["A" * 1000] * 100] * 100] * 100,
    "a mapping": {"A" * 1000 + str(number): "A" * 1000 for number in range(1000)},
    "a number Python does not print": 10**9000,
}


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
def test_an_error_does_not_echo_a_wrong_value_whole(value: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: resolve_plan(value, device=CPU),
        lambda: resolve_plan("fast", value, device=CPU),
        lambda: resolve_plan("fast", "safe", value, device=CPU),
        lambda: check_fidelity(value),
    ]
    for call in calls:
        with pytest.raises(OptionError, match="expected ") as raised:
            call()
        assert len(str(raised.value)) < 1500
        assert raised.value.value is value


def test_a_value_that_is_not_a_picture_is_not_echoed(blind_pipeline: Any) -> None:
    with pytest.raises(ImageError) as raised:
        serve(blind_pipeline, ["A" * 3_000_000])
    assert len(str(raised.value)) < 200
