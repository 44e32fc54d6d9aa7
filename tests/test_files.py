"""Reading and writing pictures: every kind of file compared with known values."""

import io
import struct
import zlib
from typing import Any, Final

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin
from PIL.PngImagePlugin import PngImageFile

from codeformer.errors import ImageError
from codeformer.imaging.files import (
    MAX_ASPECT_RATIO,
    decode_image,
    decode_photo,
    encode_jpeg,
    encode_result,
    size_of,
)
from codeformer.limits import Limits
from codeformer.options import DEFAULT_QUALITY, Output
from tests import shared
from tests.compare import assert_pictures_close
from tests.profiles import gray_profile, ink_profile
from tests.test_detector import PHOTOS


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    """(H, W, 3) uint8 RGB, smooth, with a different colour in each corner."""
    yy, xx = np.mgrid[0:height, 0:width]
    across, down = xx * 255 / max(1, width - 1), yy * 255 / max(1, height - 1)
    channels = [across, down, 255 - across]
    return np.stack(channels, axis=2).round().astype(np.uint8)


def save(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG with a header of the given size and without pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 100, "subsampling": 0}, 4),
        ("JPEG", {"quality": 100, "subsampling": 0, "progressive": True}, 4),
    ],
)
def test_every_format_comes_back_in_bgr(kind: str, options: dict[str, object], tolerance: int) -> None:
    rgb = gradient()
    decoded = decode_image(save(Image.fromarray(rgb), kind, **options))
    assert decoded.flags.c_contiguous
    assert_pictures_close(decoded, rgb[:, :, ::-1], mean=tolerance / 2, within=tolerance)


@pytest.mark.parametrize("name", PHOTOS)
def test_photos_decode_as_opencv_decodes_them(name: str) -> None:
    path = shared.path_of(f"photos/{name}")
    np.testing.assert_array_equal(decode_image(path.read_bytes()), shared.read_picture(path))


def test_the_name_does_not_matter_the_bytes_do() -> None:
    # decode_image gets no name; a PNG that is called .jpg is a PNG.
    assert decode_image(save(Image.fromarray(gradient()), "PNG")).shape == (40, 60, 3)


def test_grey_and_palette_and_one_bit() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(ramp[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(save(Image.fromarray(ramp), "PNG")), expected)
    palette = Image.fromarray(ramp).convert("P")
    np.testing.assert_array_equal(decode_image(save(palette, "PNG")), expected)
    bits = decode_image(save(Image.fromarray(ramp > 127), "PNG"))
    np.testing.assert_array_equal(bits, np.where(expected > 127, 255, 0))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_pictures_are_put_on_white(kind: str) -> None:
    rgba = np.zeros((4, 3, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, 0, 3], rgba[:, 1, 3], rgba[:, 2, 3] = 0, 255, 51
    options: dict[str, object] = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    decoded = decode_image(save(Image.fromarray(rgba, "RGBA"), kind, **options))
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[0, 1].tolist() == [0, 0, 200]
    np.testing.assert_allclose(decoded[0, 2], [204, 204, 244], atol=1)


def test_palette_transparency_and_grey_alpha() -> None:
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    assert decode_image(save(picture, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    grey_alpha = Image.fromarray(np.array([[[10, 0], [10, 255]]], np.uint8), "LA")
    assert decode_image(save(grey_alpha, "PNG")).tolist() == [[[255] * 3, [10] * 3]]


def swapped_profile() -> bytes:
    """A profile named sRGB in which the primaries of red and green are exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    # A tag table of 12 bytes each from byte 132: name, offset, size.
    count = int.from_bytes(data[128:132], "big")
    entries = {bytes(data[at : at + 4]): slice(at + 4, at + 8) for at in range(132, 132 + 12 * count, 12)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    data[red], data[green] = data[green], data[red]
    return bytes(data)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_colours_with_a_profile_become_srgb(kind: str, options: dict[str, Any]) -> None:
    rgb = np.zeros((8, 8, 3), np.uint8)
    rgb[:4], rgb[4:] = (220, 30, 60), (128, 128, 128)
    decoded = decode_image(save(Image.fromarray(rgb), kind, icc_profile=swapped_profile(), **options))
    # Red and green are exchanged; greys stay the same.
    assert_pictures_close(decoded[:4], np.full((4, 8, 3), (60, 220, 30), np.uint8), mean=1, within=2)
    assert_pictures_close(decoded[4:], rgb[4:], mean=1, within=2)


def test_a_profile_is_judged_by_its_colours_not_its_name() -> None:
    linear = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag in (b"rTRC", b"gTRC", b"bTRC"):
        # In the tag table: name, offset, size.
        entry = linear.index(tag)
        start, size = struct.unpack(">II", linear[entry + 4 : entry + 12])
        gamma_one = b"para" + bytes(4) + struct.pack(">HHI", 0, 0, 0x10000)
        linear[start : start + size] = gamma_one.ljust(size, b"\0")
    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(bytes(linear))))
    picture = Image.new("RGB", (4, 4), (55, 55, 55))
    # 12.92 and 2.4 are the constants of sRGB.
    expected = round(255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055))
    decoded = decode_image(save(picture, "PNG", icc_profile=bytes(linear)))
    assert np.abs(decoded.astype(int) - expected).max() <= 1


# A profile contains its creation time; without ids, two test processes would collect different tests.
@pytest.mark.parametrize("profile", [b"no profile", swapped_profile()[:200]], ids=["text", "cut short"])
def test_a_picture_with_an_unreadable_profile_is_accepted(
    profile: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    rgb = gradient()
    decoded = decode_image(save(Image.fromarray(rgb), "PNG", icc_profile=profile))
    np.testing.assert_array_equal(decoded, rgb[:, :, ::-1])
    assert "ICC profile cannot be" in caplog.text


def test_a_profile_of_srgb_itself_changes_no_pixel() -> None:
    rgb = gradient()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    decoded = decode_image(save(Image.fromarray(rgb), "PNG", icc_profile=srgb))
    np.testing.assert_array_equal(decoded, rgb[:, :, ::-1])


def encoded_as_srgb(light: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] to uint8, by the formula of IEC 61966-2-1."""
    curve = 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055
    return np.asarray(np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, curve)), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_with_a_profile_becomes_srgb(kind: str) -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (32, 1))
    options = {"quality": 100} if kind == "JPEG" else {}
    decoded = decode_image(save(Image.fromarray(ramp), kind, icc_profile=gray_profile(1.8), **options))
    expected = encoded_as_srgb((ramp / 255) ** 1.8)[:, :, None].repeat(3, axis=2)
    # The colour engine is not precise enough for the darkest levels.
    assert_pictures_close(decoded[:, 16:], expected[:, 16:], mean=0.6, within=3)
    assert np.abs(expected.astype(int) - ramp[:, :, None]).max() > 10


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_is_converted_with_its_profile(kind: str) -> None:
    inks = np.zeros((32, 256, 4), np.uint8)
    inks[..., 3] = np.arange(256)
    # These inks have no effect with this profile, but a large one without it.
    inks[..., 0] = 200
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    decoded = decode_image(save(Image.fromarray(inks, "CMYK"), kind, icc_profile=ink_profile(), **options))
    lightness = 100 * (1 - np.arange(256) / 255)
    light = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    expected = np.broadcast_to(encoded_as_srgb(light)[None, :, None], decoded.shape)
    assert_pictures_close(decoded, expected, mean=0.6, within=3)


def test_a_profile_of_another_colour_space_is_ignored() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    decoded = decode_image(save(Image.fromarray(ramp), "PNG", icc_profile=swapped_profile()))
    assert_pictures_close(decoded, np.repeat(ramp[:, :, None], 3, axis=2), mean=1, within=2)
    for profile in (gray_profile(1.8), ink_profile()):
        decoded = decode_image(save(Image.fromarray(gradient()), "PNG", icc_profile=profile))
        np.testing.assert_array_equal(decoded, gradient()[:, :, ::-1])


@pytest.mark.parametrize("kind", ["text", "compressed text", "international text"])
def test_a_png_may_have_long_text_chunks(kind: str) -> None:
    notes, story = PngImagePlugin.PngInfo(), "a prompt " * 200_000
    if kind == "international text":
        notes.add_itxt("workflow", story, zip=True)
    else:
        notes.add_text("workflow", story, zip=kind == "compressed text")
    decoded = decode_image(save(Image.fromarray(gradient()), "PNG", pnginfo=notes))
    np.testing.assert_array_equal(decoded, gradient()[:, :, ::-1])


def with_empty_scans(progressive: bytes, count: int) -> bytes:
    """A progressive JPEG with additional scans at its end that change nothing."""
    header = struct.pack(">HHBBBBBB", 0xFFDA, 8, 1, 1, 0, 1, 63, 0x00)
    # Each scan is one end-of-band run of up to 2^14 blocks, with a Huffman table of one symbol.
    table = struct.pack(">HHB16BB", 0xFFC4, 20, 0x10, 1, *[0] * 15, 0xE0)
    end = progressive.rindex(b"\xff\xd9")
    return progressive[:end] + (table + header + bytes(2) + b"\x7f") * count + progressive[end:]


def test_a_jpeg_of_very_many_scans_is_refused_before_they_are_decoded() -> None:
    picture = Image.fromarray(np.full((64, 64), 100, np.uint8))
    plain = save(picture, "JPEG", progressive=True, quality=90)
    for count in (0, 50):
        decoded = decode_image(with_empty_scans(plain, count))
        np.testing.assert_array_equal(decoded, decode_image(plain))
    many = with_empty_scans(plain, 101)
    last = plain.rindex(b"\xff\xda")
    # A marker without a segment must not hide the scans that follow.
    for data in (many, many[:last] + b"\xff\x01" + many[last:]):
        with pytest.raises(ImageError, match="at most 100 scans"):
            decode_image(data)


def test_scan_markers_in_metadata_or_after_the_end_are_not_counted() -> None:
    many = b"\xff\xda\x00\x02" * 500
    photo = save(Image.fromarray(gradient()), "JPEG")
    note = b"\xff\xed" + struct.pack(">H", len(many) + 2) + many
    expected = decode_image(photo)
    np.testing.assert_array_equal(decode_image(photo[:2] + note + photo[2:]), expected)
    np.testing.assert_array_equal(decode_image(photo + many), expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_used_and_logged(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    data = save(frames[0], kind, save_all=True, append_images=frames[1:])
    decoded = decode_image(data, 3)
    assert_pictures_close(decoded, np.full((10, 20, 3), (0, 0, 200), np.uint8), mean=3, within=8)
    assert "image 3 has several frames" in caplog.text


GAIN_MAP_NOTE: Final = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" '
    b'hdrgm:Version="1.0"/>'
)


@pytest.mark.parametrize("note", [b"", GAIN_MAP_NOTE], ids=["two pictures", "a picture and its gain map"])
def test_the_first_picture_of_a_jpeg_with_several_is_used(note: bytes) -> None:
    options: dict[str, Any] = {"xmp": note} if note else {}
    first = Image.fromarray(gradient())
    alone = decode_image(save(first, "JPEG", quality=90))
    stream = io.BytesIO()
    first.save(
        stream,
        "MPO",
        save_all=True,
        append_images=[Image.new("RGB", (30, 20), (9, 9, 9))],
        quality=90,
        **options,
    )
    data = stream.getvalue()
    assert b"MPF\0" in data
    np.testing.assert_array_equal(decode_image(data), alone)
    photo = decode_photo(data)
    result = encode_result(photo, photo.image_bgr, Output(metadata="keep"))
    assert b"MPF\0" not in result
    assert b"hdrgm" not in result
    # The second picture may be missing; the first may not.
    end = data.index(b"\xff\xd9")
    np.testing.assert_array_equal(decode_image(data[: end + 30]), alone)
    for cut in range(end // 2, end, 17):
        with pytest.raises(ImageError):
            decode_image(data[:cut])


def test_cmyk() -> None:
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded = decode_image(save(picture, "JPEG", quality=100))
    np.testing.assert_allclose(decoded[8, 8], [0, 0, 255], atol=3)


@pytest.mark.parametrize("extension", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_are_scaled_by_the_known_depth(extension: str, channels: int) -> None:
    # A dark picture, for which a guess by the brightest value would assume 8 bits.
    levels = np.array([0, 128, 129, 257, 200 * 257, 65535], np.uint16)
    samples = np.repeat(levels[None, :, None], channels, axis=2).repeat(4, axis=0)
    if channels == 4:
        samples[..., 3] = 65535
    ok, data = cv2.imencode(extension, samples)
    assert ok
    decoded = decode_image(data.tobytes())
    np.testing.assert_array_equal(decoded[0], np.repeat([[0], [0], [1], [1], [200], [255]], 3, axis=1))


def test_dark_16_bit_picture_stays_dark() -> None:
    ok, data = cv2.imencode(".png", np.full((5, 5, 3), 200, np.uint16))
    assert ok
    assert decode_image(data.tobytes()).max() == 1


def test_16_bit_colours_keep_their_order_and_alpha() -> None:
    bgra = np.zeros((1, 2, 4), np.uint16)
    bgra[0, :, 0] = 65535
    bgra[0, 0, 3] = 65535
    ok, data = cv2.imencode(".png", bgra)
    assert ok
    assert decode_image(data.tobytes()).tolist() == [[[255, 0, 0], [255, 255, 255]]]


# How `gradient` is stored for each orientation.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data), upright[:, :, ::-1])


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied_to_16_bits_too(orientation: int) -> None:
    upright = gradient()
    stored = np.ascontiguousarray(STORED[orientation](upright))
    ok, encoded = cv2.imencode(".png", stored[:, :, ::-1].astype(np.uint16) * 257)
    assert ok
    data, exif = encoded.tobytes(), Image.Exif()
    exif[0x0112] = orientation
    body = exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    np.testing.assert_array_equal(decode_image(data[:33] + chunk + data[33:]), upright[:, :, ::-1])


def stored_with_exif(kind: str, orientation: int, exif: Image.Exif) -> bytes:
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    stored = np.ascontiguousarray(STORED[orientation](gradient()))
    return save(Image.fromarray(stored), kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied_in_other_formats(kind: str, orientation: int) -> None:
    decoded = decode_image(stored_with_exif(kind, orientation, Image.Exif()))
    assert_pictures_close(decoded, gradient()[:, :, ::-1], mean=1, within=4)


def xmp_packet(orientation: int) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/">'
        f"<tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "TIFF", "16-bit TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_the_orientation_of_xmp_is_applied_where_there_is_no_other(kind: str, orientation: int) -> None:
    packet, stored = xmp_packet(orientation), np.ascontiguousarray(STORED[orientation](gradient()))
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", packet.decode())
    if kind.endswith("TIFF"):
        samples: Any = stored.astype(np.uint16) * 257 if kind.startswith("16") else stored
        data = tiff(samples, photometric="rgb", extratags=[(700, "B", len(packet), packet, True)])
    else:
        options: dict[str, dict[str, Any]] = {
            "JPEG": {"quality": 100, "subsampling": 0, "xmp": packet},
            "WEBP": {"lossless": True, "xmp": packet},
            "PNG": {"pnginfo": notes},
        }
        data = save(Image.fromarray(stored), kind, **options[kind])
    assert_pictures_close(decode_image(data), gradient()[:, :, ::-1], mean=1, within=4)


def test_the_orientation_of_exif_data_counts_more_than_that_of_xmp() -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    data = save(Image.fromarray(gradient()), "WEBP", lossless=True, exif=exif, xmp=xmp_packet(6))
    np.testing.assert_array_equal(decode_image(data), gradient()[:, :, ::-1])


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", STORED)
def test_the_orientation_of_a_tiff_is_applied_once(orientation: int, depth: type) -> None:
    upright = gradient()
    unit = 257 if depth is np.uint16 else 1
    stored: Any = np.ascontiguousarray(STORED[orientation](upright)).astype(depth) * unit
    stream = io.BytesIO()
    tifffile.imwrite(stream, stored, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    np.testing.assert_array_equal(decode_image(stream.getvalue()), upright[:, :, ::-1])


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("meaning", "expected"),
    [
        ("unassalpha", [155, 155, 255]),
        ("assocalpha", [155, 155, 255]),
        ("unspecified", [0, 0, 255]),
    ],
)
def test_only_alpha_samples_are_alpha_in_a_tiff(depth: type, meaning: str, expected: list[int]) -> None:
    unit = 257 if depth is np.uint16 else 1
    red = 100 if meaning == "assocalpha" else 255
    samples: Any = np.tile(np.array([red, 0, 0, 100], depth) * unit, (2, 2, 1)).astype(depth)
    stream = io.BytesIO()
    tifffile.imwrite(stream, samples, photometric="rgb", extrasamples=[meaning])
    np.testing.assert_allclose(decode_image(stream.getvalue())[0, 0], expected, atol=1)


def test_a_16_bit_grey_png_with_a_transparent_level() -> None:
    ok, encoded = cv2.imencode(".png", np.array([[1000, 51400]], np.uint16))
    assert ok
    data, body = encoded.tobytes(), struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))
    assert decode_image(data[:33] + chunk + data[33:]).tolist() == [[[255] * 3, [200] * 3]]


def tiff(samples: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, samples, **options)
    return stream.getvalue()


# No multiples of 257, so that both bytes matter.
LEVELS_16_BIT: Final = (50_000, 10_000, 5_000)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"tile": (16, 16)}])
@pytest.mark.parametrize("photometric", ["rgb", "separated"])
def test_a_16_bit_tiff_in_planes_is_refused(photometric: str, options: dict[str, Any]) -> None:
    levels = LEVELS_16_BIT if photometric == "rgb" else (*LEVELS_16_BIT, 700)
    planes = np.stack([np.full((30, 40), level, np.uint16) for level in levels])
    data = tiff(planes, photometric=photometric, planarconfig="separate", **options)
    with pytest.raises(ImageError, match=r"16 bits in separate planes.*convert the picture to 8 bits"):
        decode_image(data)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"tile": (16, 16)}])
def test_every_other_16_bit_tiff_is_scaled_from_both_bytes(options: dict[str, Any]) -> None:
    colours = np.tile(np.array(LEVELS_16_BIT, np.uint16), (30, 40, 1))
    expected = np.broadcast_to(np.rint(np.array(LEVELS_16_BIT[::-1]) / 257), (30, 40, 3))
    np.testing.assert_array_equal(decode_image(tiff(colours, photometric="rgb", **options)), expected)
    grey = tiff(colours[:, :, 0], photometric="minisblack", **options)
    np.testing.assert_array_equal(decode_image(grey), np.full((30, 40, 3), expected[0, 0, 2]))


def test_what_opencv_cannot_decode_it_does_not_complain_of(capfd: pytest.CaptureFixture[str]) -> None:
    samples = gradient().astype(np.uint16) * 257
    decoded = decode_image(tiff(samples, photometric="rgb", compression="lzma"))
    assert_pictures_close(decoded, gradient()[:, :, ::-1], mean=0, within=0)
    assert capfd.readouterr().err == ""


def test_grey_tiffs_with_alpha_are_put_on_white_or_refused_by_name() -> None:
    half = np.tile(np.array([64, 128], np.uint8), (4, 4, 1))
    grey = decode_image(tiff(half, photometric="minisblack", extrasamples=["assocalpha"]))
    assert grey[0, 0].tolist() == pytest.approx([64 + 127] * 3, abs=1)
    with pytest.raises(
        ImageError, match=r"unsupported samples \(of this TIFF\); convert the picture to 8 bits"
    ):
        decode_image(tiff(half.astype(np.uint16), photometric="minisblack", extrasamples=["unassalpha"]))


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_tiff_whose_zero_is_white_is_not_inverted(depth: type) -> None:
    unit = 257 if depth is np.uint16 else 1
    ramp = np.arange(256).reshape(16, 16)
    data = tiff((ramp * unit).astype(depth), photometric="miniswhite")
    np.testing.assert_array_equal(decode_image(data)[:, :, 0], 255 - ramp)


def test_16_bit_cmyk_tiff() -> None:
    stream = io.BytesIO()
    inks = np.tile(np.array([10_000, 65_535, 50_000, 0], np.uint16), (4, 4, 1))
    tifffile.imwrite(stream, inks, photometric="separated")
    expected = (1 - np.array([50_000, 65_535, 10_000]) / 65_535) * 255
    np.testing.assert_allclose(decode_image(stream.getvalue())[0, 0], expected, atol=1)


@pytest.mark.parametrize("depth", [np.float32, np.int32])
def test_unsupported_samples_are_named_as_such(depth: type) -> None:
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.ones((4, 4), depth))
    with pytest.raises(ImageError, match="unsupported samples"):
        decode_image(stream.getvalue())


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_photo_with_damaged_exif_data_is_accepted() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    exif[0x011A] = 72.0
    original = save(Image.fromarray(gradient()), "JPEG", exif=exif)
    start, size = original.index(b"Exif"), len(exif.tobytes())
    rng = np.random.default_rng(0)
    for _ in range(400):
        data = bytearray(original)
        for place in rng.integers(start, start + size, 2):
            data[place] = rng.integers(256)
        decoded = decode_image(bytes(data))
        assert decoded.shape in {(40, 60, 3), (60, 40, 3)}


def bmp_with_masks(
    masks: tuple[int, int, int, int], alpha: np.ndarray, *, bits: int, header_bytes: int, compression: int = 3
) -> bytes:
    """A BMP of `gradient` whose red, green, blue and alpha lie behind masks; rows go from top to bottom."""
    rgba = np.dstack([gradient(30, 41), alpha]).astype(np.uint32)
    pixels = np.zeros((30, 41), np.uint32)
    for channel, mask in enumerate(masks):
        if mask:
            lowest = mask & -mask
            pixels |= np.rint(rgba[:, :, channel] / 255 * (mask // lowest)).astype(np.uint32) * lowest
    rows = pixels.astype(f"<u{bits // 8}")
    body = b"".join(row.tobytes().ljust(-(-41 * bits // 32) * 4, b"\0") for row in rows)
    header = struct.pack("<IiiHHIIiiII", header_bytes, 41, -30, 1, bits, compression, 0, 2835, 2835, 0, 0)
    header += struct.pack("<4I", *masks)[: 12 if compression == 3 and header_bytes < 56 else 16]
    header = header.ljust(header_bytes, b"\0")
    start = 14 + len(header)
    return struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start) + header + body


SEEDS = {
    "jpeg": save(Image.fromarray(gradient()), "JPEG"),
    "cmyk": save(Image.new("CMYK", (30, 20)), "JPEG"),
    "png": save(Image.fromarray(gradient()), "PNG"),
    "palette": save(Image.fromarray(gradient()).convert("P"), "PNG", transparency=3),
    "16 bit": cv2.imencode(".png", gradient().astype(np.uint16) * 257)[1].tobytes(),
    "webp": save(Image.fromarray(gradient()), "WEBP"),
    "bmp": save(Image.fromarray(gradient()), "BMP"),
    "masked bmp": bmp_with_masks((0xF00, 0xF0, 0xF, 0xF000), np.zeros((30, 41)), bits=16, header_bytes=108),
    "tiff": save(Image.fromarray(gradient()), "TIFF", compression="tiff_lzw"),
    "16 bit tiff": cv2.imencode(".tiff", gradient().astype(np.uint16) * 257)[1].tobytes(),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_damaged_16_bit_file_is_called_damaged(channels: int, damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 65536, (200, 300, channels), dtype=np.uint16)
    data = bytearray(cv2.imencode(".png", noise)[1].tobytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 255
    with pytest.raises(ImageError, match="damaged or cut short"):
        decode_image(bytes(data))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", SEEDS)
def test_damaged_files_give_a_picture_or_our_error(kind: str) -> None:
    rng = np.random.default_rng(1)
    outcomes = {"picture": 0, "error": 0}
    for _ in range(300):
        data = bytearray(SEEDS[kind])
        for place in rng.integers(0, min(len(data), 400), rng.integers(1, 5)):
            data[place] = rng.integers(256)
        try:
            decoded = decode_image(bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.3 else data))
        except ImageError:
            outcomes["error"] += 1
        else:
            outcomes["picture"] += 1
            assert decoded.dtype == np.uint8
            assert decoded.ndim == 3
    assert outcomes["error"] > 0


JPEG = save(Image.fromarray(gradient(200, 300)), "JPEG", quality=90)
PNG = save(Image.fromarray(gradient(200, 300)), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not a picture"),
        (b"<html><body>404</body></html>", "not a picture"),
        (b"%PDF-1.7", "not a picture"),
        (JPEG[:2000], "damaged or cut short"),
        (JPEG[:20], "damaged or cut short"),
        (PNG[:40], "damaged or cut short"),
        (save(Image.fromarray(gradient()), "GIF")[:20], "damaged or cut short"),
        (save(Image.fromarray(gradient()), "BMP")[:40], "damaged or cut short"),
        (PNG[: len(PNG) // 2], "damaged or cut short"),
        (PNG[:300] + b"\x00" * 100 + PNG[400:], "damaged or cut short"),
        (png_header(60_000, 60_000), "pixels"),
        (png_header(11_000, 10_000), "100,000,000 pixels, got 11000 x 10000"),
        (png_header(66_000, 40), "65500"),
        (png_header(1, MAX_ASPECT_RATIO + 1), "times the short one"),
    ],
)
def test_unusable_files_say_which_and_why(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=r"^Image 3: ") as raised:
        decode_image(data, 3)
    assert reason in str(raised.value)
    assert raised.value.index == 3


def test_limits_above_pillows_own_apply() -> None:
    header = png_header(20_000, 10_000)
    with pytest.raises(ImageError, match="damaged or cut short"):
        decode_image(header, 1, Limits(max_megapixels=250))
    with pytest.raises(ImageError, match="at most 190,000,000 pixels, got 20000 x 10000"):
        decode_image(header, 1, Limits(max_megapixels=190))


@pytest.mark.parametrize("library", ["Pillow", "OpenCV"])
def test_too_little_memory_is_not_called_damage(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        if library == "Pillow":
            raise MemoryError
        failure = cv2.error("Insufficient memory")
        failure.code = cv2.Error.StsNoMem
        raise failure

    ok, data = cv2.imencode(".png", np.zeros((9, 9, 3), np.uint16))
    assert ok
    owner, name = (PngImageFile, "load") if library == "Pillow" else (cv2, "imdecode")
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(ImageError, match=r"^Image 2: too little memory to decode it; use a smaller copy"):
        decode_image(data.tobytes(), 2)


def photo_like(mode: str = "RGB") -> Image.Image:
    """A picture with details, so that its data extend to the last rows."""
    noise = np.random.default_rng(0).normal(0, 20, (200, 300, 3))
    return Image.fromarray(np.clip(gradient(200, 300) + noise, 0, 255).astype(np.uint8)).convert(mode)


ENCODINGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "grey": {"mode": "L"},
    "inks": {"mode": "CMYK"},
    "without subsampling": {"subsampling": 0, "quality": 95},
    "progressive": {"progressive": True},
    "with restart markers": {"restart_marker_blocks": 3},
    "with restart markers, progressive": {"restart_marker_rows": 1, "progressive": True},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("tail", [b"", b"\xff", bytes(50), b"\xff" * 9], ids=len)
def test_a_jpeg_that_lacks_only_its_end_marker_is_read_and_the_log_says_so(
    encoding: str, tail: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    options = dict(ENCODINGS[encoding])
    whole = save(photo_like(options.pop("mode", "RGB")), "JPEG", **options)
    assert whole.endswith(b"\xff\xd9")
    np.testing.assert_array_equal(decode_image(whole[:-2] + tail, 2), decode_image(whole))
    assert "image 2 lacks its end marker" in caplog.text


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_jpeg_that_lacks_more_is_damaged(encoding: str) -> None:
    options = dict(ENCODINGS[encoding])
    whole = save(photo_like(options.pop("mode", "RGB")), "JPEG", **options)
    markers = [at for at in range(len(whole) - 1) if whole[at] == 255 and whole[at + 1] not in {0, 255}]
    first_scan = whole.index(b"\xff\xda")
    # In the middle, a few bytes before the end, and at each end of a scan or restart interval.
    cuts = [len(whole) * part // 10 for part in range(6, 10)] + [len(whole) - n for n in (8, 20, 100)]
    for cut in cuts + [at for at in markers[-40:-1] if at > first_scan + 20]:
        for tail in (b"", bytes(500)):
            with pytest.raises(ImageError, match="damaged or cut short"):
                decode_image(whole[:cut] + tail)


def test_a_marker_of_noise_does_not_make_a_jpeg_decode_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = save(Image.fromarray(gradient(200, 300)), "JPEG", restart_marker_rows=1)
    # Seems to begin a segment that is longer than the rest of the file.
    damaged = whole[:-300] + b"\xff\xe5\xff\xf0" + whole[-300:-2]
    opened = 0
    really = Image.open

    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal opened
        opened += 1
        return really(*arguments, **options)

    monkeypatch.setattr(Image, "open", count)
    with pytest.raises(ImageError, match="damaged or cut short"):
        decode_image(damaged)
    assert opened <= 7


@pytest.mark.parametrize("seed", range(6))
def test_missing_data_is_detected_in_a_white_picture(seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 1 + seed, (60, 203, 3))
    white = Image.fromarray(np.clip(255 + noise, 0, 255).astype(np.uint8))
    whole = save(white, "JPEG", quality=60 + 7 * seed)
    expected = decode_image(whole)
    np.testing.assert_array_equal(decode_image(whole[:-2]), expected)
    for cut in range(4, 60):
        try:
            decoded = decode_image(whole[:-cut])
        except ImageError:
            continue
        # The last bits may be padding.
        assert (decoded != expected).any(axis=2).sum() <= 64


def bmp_with_alpha(alpha: int, header_bytes: int = 124) -> bytes:
    """A 32-bit BMP of `gradient` with masks for four channels; rows are stored from bottom to top."""
    rgb = gradient()
    height, width = rgb.shape[:2]
    pixels = np.dstack([rgb[::-1, :, ::-1], np.full((height, width), alpha, np.uint8)]).tobytes()
    header = struct.pack("<IiiHHIIiiII", header_bytes, width, height, 1, 32, 3, len(pixels), 2835, 2835, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = header.ljust(header_bytes, b"\0")
    start = 14 + len(header)
    return struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start) + header + pixels


@pytest.mark.parametrize("header_bytes", [56, 108, 124])
def test_a_bmp_whose_alpha_is_zero_everywhere_is_opaque(header_bytes: int) -> None:
    np.testing.assert_array_equal(decode_image(bmp_with_alpha(0, header_bytes)), gradient()[:, :, ::-1])
    np.testing.assert_array_equal(decode_image(bmp_with_alpha(255, header_bytes)), gradient()[:, :, ::-1])
    half = decode_image(bmp_with_alpha(128, header_bytes))
    assert_pictures_close(half, (gradient()[:, :, ::-1] * 0.5 + 127.5).astype(np.uint8), mean=1, within=2)


# Opaque on the left side.
LEFT = np.where(np.arange(41) < 20, np.full((30, 41), 255), 0)


def on_white(columns: int) -> np.ndarray:
    """`gradient` in BGR order, of which so many columns are opaque."""
    expected = gradient(30, 41)[:, :, ::-1].copy()
    expected[:, columns:] = 255
    return expected


MASKS = {
    "A1R5G5B5": (16, (0x7C00, 0x3E0, 0x1F, 0x8000)),
    "A4R4G4B4": (16, (0xF00, 0xF0, 0xF, 0xF000)),
    "R4G4B4A4": (16, (0xF000, 0xF00, 0xF0, 0xF)),
    "R5G6B5": (16, (0xF800, 0x7E0, 0x1F, 0)),
    "A2R10G10B10": (32, (0x3FF00000, 0xFFC00, 0x3FF, 0xC0000000)),
    "X8B8G8R8": (32, (0xFF, 0xFF00, 0xFF0000, 0)),
    "A8B8G8R8": (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
}


@pytest.mark.parametrize("header_bytes", [56, 108, 124])
@pytest.mark.parametrize("layout", MASKS)
def test_a_bmp_is_read_whatever_its_masks_and_its_alpha_is_applied(layout: str, header_bytes: int) -> None:
    bits, masks = MASKS[layout]
    within = 1 + max(128 // (mask // (mask & -mask)) for mask in masks[:3])
    for alpha, opaque in ((np.zeros((30, 41)), 41), (np.full((30, 41), 255), 41), (LEFT, 20)):
        data = bmp_with_masks(masks, alpha, bits=bits, header_bytes=header_bytes)
        expected = on_white(opaque if masks[3] else 41)
        assert_pictures_close(decode_image(data), expected, mean=within, within=within)
        assert size_of(data) == (41, 30)


def test_masks_behind_a_short_bmp_header() -> None:
    masks = MASKS["A4R4G4B4"][1]
    # Three masks: what would be alpha is nothing. Four: with the compression that says so.
    opaque = bmp_with_masks(masks, LEFT, bits=16, header_bytes=40)
    assert_pictures_close(decode_image(opaque), on_white(41), mean=10, within=10)
    four = bmp_with_masks(masks, LEFT, bits=16, header_bytes=40, compression=6)
    assert_pictures_close(decode_image(four), on_white(20), mean=10, within=10)


def test_an_unusable_bmp_with_masks_is_named_as_what_it_is() -> None:
    data = bmp_with_masks(MASKS["A4R4G4B4"][1], np.zeros((30, 41)), bits=16, header_bytes=108)
    with pytest.raises(ImageError, match="damaged or cut short"):
        decode_image(data[:-2])
    with pytest.raises(ImageError, match="at most 1,000 pixels, got 41 x 30 px"):
        decode_image(data, 1, Limits(max_megapixels=0.001))
    # An embedded JPEG.
    with pytest.raises(ImageError, match=r"unsupported samples \(of this BMP\); convert"):
        decode_image(data[:30] + struct.pack("<I", 4) + data[34:])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_tiff_that_was_cut_short_is_not_called_unsupported() -> None:
    # Here the directory lies behind the pixels, as most programs write it.
    whole = save(Image.fromarray(gradient(200, 300)), "TIFF", compression="tiff_lzw")
    assert int.from_bytes(whole[4:8], "little") > len(whole) / 2
    for length in (4, 8, 20, len(whole) // 2, int.from_bytes(whole[4:8], "little") + 30):
        with pytest.raises(ImageError, match="damaged or cut short"):
            decode_image(whole[:length])


def void_alpha(mode: str) -> Image.Image:
    picture = Image.fromarray(gradient()).convert(mode)
    picture.putalpha(0)
    return picture


def png_of_16_bits(bgra: np.ndarray) -> bytes:
    ok, data = cv2.imencode(".png", bgra.astype(np.uint16) * 257)
    assert ok
    return bytes(data)


VOID: dict[str, Any] = {
    "PNG": lambda: save(void_alpha("RGB"), "PNG"),
    "grey PNG": lambda: save(void_alpha("L"), "PNG"),
    "16-bit PNG": lambda: png_of_16_bits(np.asarray(void_alpha("RGB"))[:, :, [2, 1, 0, 3]]),
    "WebP": lambda: save(void_alpha("RGB"), "WEBP", lossless=True, exact=True),
    "TIFF": lambda: tiff(np.asarray(void_alpha("RGB")), photometric="rgb", extrasamples=["unassalpha"]),
    "premultiplied TIFF": lambda: tiff(
        np.asarray(void_alpha("RGB")), photometric="rgb", extrasamples=["assocalpha"]
    ),
    "16-bit TIFF": lambda: tiff(
        np.asarray(void_alpha("RGB")).astype(np.uint16) * 257, photometric="rgb", extrasamples=["assocalpha"]
    ),
    "palette": lambda: save(Image.fromarray(gradient()).quantize(8), "PNG", transparency=bytes(8)),
}


@pytest.mark.parametrize("case", VOID)
def test_alpha_that_is_zero_everywhere_is_ignored_in_every_format(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    expected = Image.fromarray(gradient())
    if case == "grey PNG":
        expected = expected.convert("L")
    if case == "palette":
        expected = expected.quantize(8)
    np.testing.assert_array_equal(decode_image(VOID[case]()), np.asarray(expected.convert("RGB"))[:, :, ::-1])
    assert "alpha channel is zero everywhere" in caplog.text


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_a_blank_transparent_page_stays_white(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    decoded = decode_image(save(Image.new("RGBA", (20, 10), (7, 7, 7, 0)), kind, **options))
    np.testing.assert_array_equal(decoded, np.full((10, 20, 3), 255))


def png_with(data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    added = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return data[:33] + added + data[33:]


def gamma_chunk(times_100000: int) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", times_100000)


@pytest.mark.parametrize("gamma", [1.0, 0.55556, 0.3])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_the_gamma_of_a_png_is_applied(gamma: float, mode: str) -> None:
    picture = Image.fromarray(gradient()).convert(mode)
    decoded = decode_image(png_with(save(picture, "PNG"), gamma_chunk(round(gamma * 1e5))))
    samples = np.asarray(picture.convert("RGB"))[:, :, ::-1] / 255
    expected = np.rint(255 * samples ** (1 / (2.2 * gamma))).astype(np.uint8)
    assert_pictures_close(decoded, expected, mean=0.01, within=1)


def test_gamma_is_applied_to_all_16_bits_and_not_to_alpha() -> None:
    dark = np.zeros((16, 256, 4), np.uint16)
    dark[..., :3] = np.arange(256)[None, :, None]
    dark[0, :, 3], dark[1:, :, 3] = 65_535, 65_535 // 2
    decoded = decode_image(png_with(cv2.imencode(".png", dark)[1].tobytes(), gamma_chunk(100_000)))
    opaque = 255 * (np.arange(256) / 65_535) ** (1 / 2.2)
    for row, alpha in ((0, 1.0), (1, 0.5)):
        expected = np.rint(opaque * alpha + 255 * (1 - alpha))
        np.testing.assert_allclose(decoded[row, :, 0], expected, atol=1)
    half = Image.new("RGBA", (4, 4), (64, 64, 64, 128))
    expected_level = 255 * (64 / 255) ** (1 / 2.2) * 128 / 255 + 127
    assert decode_image(png_with(save(half, "PNG"), gamma_chunk(100_000))).max() == pytest.approx(
        expected_level, abs=1
    )


def test_gamma_is_ignored_if_it_is_the_usual_one_or_overridden() -> None:
    rgb, srgb = gradient(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain, profiled = (save(Image.fromarray(rgb), "PNG", **o) for o in ({}, {"icc_profile": srgb}))
    for data in (
        png_with(plain, gamma_chunk(45_455)),
        png_with(plain, gamma_chunk(45_000)),
        png_with(plain, gamma_chunk(0)),
        png_with(plain, gamma_chunk(100_000), (b"sRGB", b"\0")),
        png_with(profiled, gamma_chunk(100_000)),
    ):
        np.testing.assert_array_equal(decode_image(data), rgb[:, :, ::-1])


def test_encodes_a_jpeg_of_the_same_size_and_quality() -> None:
    bgr = gradient()[:, :, ::-1]
    data = encode_jpeg(np.ascontiguousarray(bgr))
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (60, 40)
        reference = io.BytesIO()
        Image.new("RGB", (8, 8)).save(reference, "JPEG", quality=DEFAULT_QUALITY)
        assert picture.quantization == Image.open(reference).quantization  # type: ignore[attr-defined]
    assert_pictures_close(decode_image(data), bgr, mean=2, within=12)
