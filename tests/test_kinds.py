"""Files of many kinds, made by hand or by other libraries: their kind and the message about them."""

import io
import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from codeformer.errors import ImageError
from codeformer.imaging.files import FORMATS, decode_image
from codeformer.imaging.kinds import kind_of
from codeformer.limits import Limits
from tests.compare import assert_pictures_close
from tests.test_files import gradient, save

SENSOR = np.full((64, 96), 1000, np.uint16)


def tiff_pages(*pages: dict[str, Any], **file_options: Any) -> bytes:
    """A TIFF written by tifffile; each page is a dict of its arguments, with the samples in "data"."""
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream, **file_options) as writer:
        for page in pages:
            options = dict(page)
            writer.write(options.pop("data"), **options)
    return stream.getvalue()


def directory(order: str, entries: dict[int, tuple[int, int]], at: int, magic: bytes = b"") -> bytes:
    """A TIFF made by hand: one directory at an offset, with a SHORT (3) or LONG (4) value for each tag."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at) + magic
    body = struct.pack(f"{order}H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        field = struct.pack(f"{order}H2x" if kind == 3 else f"{order}I", value)
        body += struct.pack(f"{order}HHI", tag, kind, 1) + field
    return head.ljust(at, b"\0") + body + bytes(4)


def thumbnail(**options: Any) -> dict[str, Any]:
    return {"data": gradient(16, 24), "photometric": "rgb", "metadata": None, **options}


RAW: dict[str, Callable[[], bytes]] = {
    # A thumbnail, and the samples of the sensor in a nested directory.
    "NEF": lambda: tiff_pages(
        thumbnail(subfiletype=1, subifds=1, extratags=[(271, "s", 0, "NIKON CORPORATION", True)]),
        {"data": SENSOR, "photometric": "cfa", "metadata": None},
        byteorder=">",
    ),
    "DNG": lambda: tiff_pages(
        thumbnail(subfiletype=1, subifds=1, extratags=[(50706, "B", 4, (1, 4, 0, 0), True)]),
        {"data": np.dstack([SENSOR] * 3), "photometric": 34892, "metadata": None},
    ),
    "DNG of one image": lambda: tiff_pages(thumbnail(extratags=[(50706, "B", 4, (1, 1, 0, 0), True)])),
    "the sensor's samples alone": lambda: tiff_pages({"data": SENSOR, "photometric": "cfa"}),
    "samples after a thumbnail": lambda: tiff_pages(
        thumbnail(subfiletype=1), {"data": SENSOR, "photometric": "cfa"}
    ),
    "in a BigTIFF": lambda: tiff_pages(
        thumbnail(subfiletype=1, subifds=1), {"data": SENSOR, "photometric": "cfa"}, bigtiff=True
    ),
    "CR2": lambda: directory("<", {256: (3, 8), 257: (3, 8), 259: (3, 6)}, 16, b"CR\2\0"),
    "ARW by its compression": lambda: directory("<", {256: (3, 8), 257: (3, 8), 259: (3, 32767)}, 8),
    "PEF by its compression": lambda: directory(">", {256: (3, 8), 257: (3, 8), 259: (3, 65535)}, 8),
    "IIQ": lambda: directory("<", {256: (3, 8), 257: (3, 8)}, 32, b"IIIITIFF"),
    "CR3": lambda: struct.pack(">I", 24) + b"ftypcrx \0\0\0\1crx isom" + bytes(99),
    "RAF": lambda: b"FUJIFILMCCD-RAW 0201FF129502X-T3" + bytes(99),
    "ORF": lambda: b"IIRO\x08\0\0\0" + bytes(99),
    "RW2": lambda: b"IIU\0\x18\0\0\0" + bytes(99),
    "CRW": lambda: b"II\x1a\0\0\0HEAPCCDR" + bytes(99),
    "X3F": lambda: b"FOVb" + bytes(99),
}


@pytest.mark.parametrize("case", RAW)
def test_a_camera_raw_file_is_refused_and_its_thumbnail_not_used(case: str) -> None:
    with pytest.raises(ImageError, match=r"^Image 2: .*camera RAW.*export it as JPEG"):
        decode_image(RAW[case](), 2)


def with_frame(marker: int, precision: int) -> bytes:
    """A JPEG with a changed frame header."""
    data = bytearray(save(Image.fromarray(gradient()), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = marker, precision
    return bytes(data)


def boxed(brands: bytes) -> bytes:
    return struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(99)


def tiff_compressed(number: int) -> bytes:
    entries = {256: (3, 8), 257: (3, 8), 258: (3, 8), 259: (3, number), 262: (3, 1), 277: (3, 1)}
    return directory("<", entries | {273: (4, 8), 279: (4, 64)}, 72)


REFUSED: dict[str, tuple[bytes, str]] = {
    "12 bits": (with_frame(0xC1, 12), "12 bits per sample.*8 bits"),
    "12 bits, progressive": (with_frame(0xC2, 12), "12 bits per sample"),
    "lossless": (with_frame(0xC3, 16), "lossless JPEG"),
    "JPEG-LS": (with_frame(0xF7, 8), "JPEG-LS"),
    "12 bits behind long notes": (
        with_frame(0xC1, 12)[:2] + (b"\xff\xe2\xff\xff" + bytes(65_533)) * 9 + with_frame(0xC1, 12)[2:],
        "12 bits",
    ),
    "hierarchical": (with_frame(0xC5, 8), "hierarchical JPEG"),
    "JPEG 2000": (save(Image.fromarray(gradient()), "JPEG2000"), "JPEG 2000"),
    "a JPEG 2000 stream": (b"\xff\x4f\xff\x51" + bytes(50), "JPEG 2000"),
    "HEIF of AVC": (boxed(b"avci\0\0\0\0mif1avci"), "HEIF of another codec.*convert it to JPEG"),
    "HEIF of JPEG 2000": (boxed(b"mif1\0\0\0\0mif1j2ki"), "HEIF of another codec"),
    "JPEG XL": (b"\xff\x0a" + bytes(50), "JPEG XL"),
    "boxed JPEG XL": (b"\0\0\0\x0cJXL \r\n\x87\n" + boxed(b"jxl \0\0\0\0jxl "), "JPEG XL"),
    "JPEG XR": (b"II\xbc\x01" + bytes(50), "JPEG XR"),
    "QuickTime": (boxed(b"qt  \0\0\0\0qt  "), "video"),
    "Matroska": (b"\x1aE\xdf\xa3" + bytes(50), "video"),
    "Photoshop": (b"8BPS\0\1" + bytes(50), "Photoshop"),
    "PDF": (b"%PDF-1.7\n", "PDF"),
    "SVG": (b"<?xml version='1.0'?>\n<!-- x -->\n<svg xmlns='x'/>", "SVG"),
    "a web page": (b"\n<!DOCTYPE html><html>", "web page"),
    "AppleDouble": (b"\0\5\x16\7\0\2\0\0Mac OS X        ", "sidecar"),
    "PNM": (save(Image.fromarray(gradient()), "PPM"), "PNM"),
    "TIFF of JPEG 2000": (tiff_compressed(34712), "TIFF with the compression JPEG 2000"),
    "TIFF of JPEG XL": (tiff_compressed(50002), "TIFF with the compression JPEG XL"),
    "TIFF of LERC": (tiff_compressed(34887), "TIFF with the compression LERC"),
    "TIFF of something": (tiff_compressed(12_345), "TIFF with the compression number 12345"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_kinds_are_named_with_what_to_do(case: str) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(ImageError, match=f"^Image 1: not a picture that can be read here, but .*{reason}"):
        decode_image(data, 1)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_kinds_that_are_read_are_known_as_pillow_knows_them(kind: str) -> None:
    known = kind_of(io.BytesIO(save(Image.fromarray(gradient()), kind)))
    assert known is not None
    assert (known.name, known.refusal) == (kind, None)


@pytest.mark.parametrize(
    ("brands", "name"),
    [
        (b"heic\0\0\0\0mif1heic", "HEIC"),
        (b"heix\0\0\0\0mif1heix", "HEIC"),
        (b"mif1\0\0\0\0heicmif1", "HEIC"),
        (b"mif1\0\0\0\0mif1jpegheic", "HEIC"),
        (b"mif1\0\0\0\0avifmiaf", "AVIF"),
        (b"avif\0\0\0\0mif1miaf", "AVIF"),
    ],
)
def test_heif_containers_are_known_by_all_their_brands(brands: bytes, name: str) -> None:
    known = kind_of(io.BytesIO(boxed(brands)))
    assert known is not None
    assert (known.name, known.refusal) == (name, None)
    with pytest.raises(ImageError, match="damaged or cut short"):
        decode_image(boxed(brands))


def test_plain_text_has_no_kind() -> None:
    for text in (b"", b"BM, a letter from afar", b"RIFF-RAFF", b"P for picture", b"\xff\xd8", b"hello" * 99):
        assert kind_of(io.BytesIO(text)) is None


def test_only_the_head_of_a_large_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as stream:
        stream.write(save(Image.fromarray(gradient()), "PNG"))
        stream.truncate(2**33)
    read = 0

    class Counting(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal read
            data = super().read(-1 if size is None else size)
            read += len(data or b"")
            return data or b""

    with Counting(path) as counting:
        known = kind_of(counting)
    assert known is not None
    assert known.name == "PNG"
    assert read < 100_000


def levels(depth: type) -> list[dict[str, Any]]:
    """A picture and three reduced copies, each in its own tone."""
    unit = 257 if depth is np.uint16 else 1
    sizes = ((80, 120), (40, 60), (20, 30), (10, 15))
    pages = []
    for number, (height, width) in enumerate(sizes):
        samples: Any = np.full((height, width, 3), 40 * (number + 1)).astype(depth) * unit
        samples = samples.astype(depth)
        pages.append(
            {"data": samples, "photometric": "rgb", "metadata": None, "subfiletype": 1 if number else 0}
        )
    return pages


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("file_options", [{}, {"byteorder": ">"}, {"bigtiff": True}])
def test_the_full_image_of_a_tiff_pyramid_is_used_in_any_order(
    depth: type, file_options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for pages in itertools.permutations(levels(depth)):
        decoded = decode_image(tiff_pages(*pages, **file_options))
        np.testing.assert_array_equal(decoded, np.full((80, 120, 3), 40))
    assert "several frames" not in caplog.text


def test_a_tiff_pyramid_with_a_nested_full_image_and_one_with_masks() -> None:
    full, half, *_ = levels(np.uint8)
    nested = tiff_pages({**half, "subifds": 1}, full)
    np.testing.assert_array_equal(decode_image(nested), np.full((80, 120, 3), 40))
    mask = {"data": np.zeros((80, 120), bool), "photometric": 4, "subfiletype": 4}
    np.testing.assert_array_equal(decode_image(tiff_pages(mask, half, full)), np.full((80, 120, 3), 40))
    only_reduced = tiff_pages(levels(np.uint8)[2], half)
    assert decode_image(only_reduced).shape == (40, 60, 3)


def test_the_limits_are_those_of_the_full_image() -> None:
    pages = levels(np.uint8)
    data = tiff_pages(*reversed(pages))
    with pytest.raises(ImageError, match="120 x 80 px"):
        decode_image(data, 1, Limits(max_megapixels=0.009))
    assert decode_image(data, 1, Limits(max_megapixels=0.0096)).shape == (80, 120, 3)


def test_the_first_of_several_full_pages_is_used(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    full, half, *_ = levels(np.uint8)
    second = {**full, "data": np.full((90, 90, 3), 200, np.uint8)}
    decoded = decode_image(tiff_pages(half, full, second))
    assert_pictures_close(decoded, np.full((80, 120, 3), 40, np.uint8), mean=0, within=0)
    assert "several frames" in caplog.text


def test_circular_tiff_directories_are_read_once() -> None:
    data = bytearray(tiff_pages({"data": gradient(), "photometric": "rgb", "metadata": None}))
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    struct.pack_into("<I", data, first + 2 + 12 * count, first)
    np.testing.assert_array_equal(decode_image(bytes(data)), gradient()[:, :, ::-1])
    # Each directory refers to itself as nested.
    for order in "<>":
        looped = directory(order, {256: (3, 8), 257: (3, 8), 330: (4, 8)}, 8)
        assert kind_of(io.BytesIO(looped)) is not None
