"""What belongs to a photo besides its pixels: read, corrected, written, and read back by Pillow."""

import io
import struct
import zlib
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from codeformer.errors import ImageError, OptionError
from codeformer.imaging.encoding import encode, encode_jpeg
from codeformer.imaging.files import decode_image, decode_photo, encode_result, read_metadata
from codeformer.imaging.metadata import NO_METADATA, Metadata
from codeformer.options import MetadataPolicy, Output
from tests import pictures
from tests.heif_files import avif, exif_item, heic, irot, xmp_item
from tests.profiles import gray_profile, ink_profile, p3_profile
from tests.test_files import STORED, gradient, save

OUTPUTS = {
    "jpg": Output("jpg", metadata="keep"),
    "png": Output("png", metadata="keep"),
    "webp": Output("webp", metadata="keep"),
}
MAKER_NOTE = b"Maker\0" + bytes(range(200))
THUMBNAIL = b"\xff\xd8thumbnail of the face before\xff\xd9"
XMP = """<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/"
 xmlns:Container="http://ns.google.com/photos/1.0/container/"
 tiff:Orientation="6" hdrgm:Version="1.0" exif:PixelXDimension="9">
 <dc:rights><rdf:Alt><rdf:li xml:lang="x-default">© a photographer</rdf:li></rdf:Alt></dc:rights>
 <exif:PixelYDimension>9</exif:PixelYDimension>
 <Container:Directory><rdf:Seq><rdf:li>a gain map</rdf:li></rdf:Seq></Container:Directory>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""


def exif_block(order: str = "<", orientation: int = 6) -> bytes:
    """EXIF data as a camera writes them: with GPS, maker note and thumbnail, at known places."""

    def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
        return struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")

    def number(value: int, code: str = "I") -> bytes:
        return struct.pack(order + code, value)

    first, exif, gps, second = 8, 200, 300, 400
    note, copyright_at, thumbnail = 500, 450, 800
    block = bytearray(thumbnail + len(THUMBNAIL))
    block[:8] = (b"II*\0" if order == "<" else b"MM\0*") + number(first)

    def directory(at: int, entries: list[bytes], following: int = 0) -> None:
        body = struct.pack(order + "H", len(entries)) + b"".join(entries) + number(following)
        block[at : at + len(body)] = body

    directory(
        first,
        [
            entry(0x0100, 3, 1, number(4000, "H")),
            entry(0x0101, 3, 1, number(3000, "H")),
            entry(0x0112, 3, 1, number(orientation, "H")),
            entry(0x8298, 2, 15, number(copyright_at)),
            entry(0x8769, 4, 1, number(exif)),
            entry(0x8825, 4, 1, number(gps)),
        ],
        second,
    )
    directory(
        exif,
        [
            entry(0x927C, 7, len(MAKER_NOTE), number(note)),
            entry(0xA002, 4, 1, number(4000)),
            entry(0xA003, 4, 1, number(3000)),
        ],
    )
    directory(gps, [entry(1, 2, 2, b"N"), entry(5, 1, 1, b"\1")])
    directory(second, [entry(0x0201, 4, 1, number(thumbnail)), entry(0x0202, 4, 1, number(len(THUMBNAIL)))])
    block[copyright_at : copyright_at + 15] = b"a photographer\0"
    block[note : note + len(MAKER_NOTE)] = MAKER_NOTE
    block[thumbnail:] = THUMBNAIL
    return bytes(block)


def source(kind: str, exif: bytes, packet: bytes, **options: Any) -> bytes:
    """A photo that is stored on its side, in a format."""
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](gradient())))
    if kind == "HEIC":
        return heic(irot(3), others=[exif_item(exif), xmp_item(packet)])
    if kind == "AVIF":
        return avif(np.asarray(stored), irot(3), others=[exif_item(exif), xmp_item(packet)])
    if kind == "PNG":
        notes = PngImagePlugin.PngInfo()
        notes.add_itxt("XML:com.adobe.xmp", packet.decode())
        return save(stored, kind, exif=exif, pnginfo=notes, **options)
    return save(stored, kind, exif=b"Exif\0\0" + exif if kind == "JPEG" else exif, xmp=packet, **options)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("file_format", OUTPUTS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "HEIC", "AVIF"])
def test_a_photos_metadata_are_in_its_result(kind: str, file_format: str, order: str) -> None:
    block = exif_block(order)
    photo = decode_photo(source(kind, block, XMP.encode()))
    height, width = photo.image_bgr.shape[:2]
    data = encode_result(photo, photo.image_bgr, OUTPUTS[file_format])
    with Image.open(io.BytesIO(data)) as result:
        assert result.size == (width, height)
        exif, written = result.getexif(), bytes(result.info["exif"]).removeprefix(b"Exif\0\0")
        packet = result.info["xmp"]
    assert exif[0x0112] == 1
    assert (exif[0x0100], exif[0x0101]) == (width, height)
    assert exif[0x8298] == "a photographer"
    details, gps = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
    assert (details[0xA002], details[0xA003]) == (width, height)
    assert details[0x927C] == MAKER_NOTE
    assert gps[1] == "N"
    # At the same place, because cameras refer to it by offsets.
    assert written.index(MAKER_NOTE) == block.index(MAKER_NOTE)
    assert not exif.get_ifd(1)
    assert b"thumbnail" not in written
    described = ElementTree.fromstring(packet)[0][0]
    text = ElementTree.tostring(described, "unicode")
    assert described.attrib["{http://ns.adobe.com/tiff/1.0/}Orientation"] == "1"
    assert described.attrib["{http://ns.adobe.com/exif/1.0/}PixelXDimension"] == str(width)
    assert described.findtext("{http://ns.adobe.com/exif/1.0/}PixelYDimension") == str(height)
    assert "© a photographer" in text
    assert "gain" not in text
    # The result is upright: nothing turns it a second time.
    np.testing.assert_array_equal(decode_image(data).shape, photo.image_bgr.shape)


def test_a_tiffs_metadata_are_in_its_result() -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x8298], exif[0x0112] = "a camera", "a photographer", 6
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 10:00:00"
    exif.get_ifd(0x8825)[1] = "N"
    exif[0x8769], exif[0x8825] = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](gradient())))
    photo = decode_photo(save(stored, "TIFF", exif=exif, dpi=(300, 200)))
    with Image.open(io.BytesIO(encode_result(photo, photo.image_bgr, OUTPUTS["jpg"]))) as result:
        found = result.getexif()
        assert result.size == (60, 40)
        assert (found[0x010F], found[0x8298], found.get(0x0112, 1)) == ("a camera", "a photographer", 1)
        assert found.get_ifd(0x8769)[0x9003] == "2026:01:01 10:00:00"
        assert found.get_ifd(0x8825)[1] == "N"
        # No tag of the layout of the TIFF's samples.
        assert not {256, 258, 259, 273, 277, 278, 279} & set(found)
        assert result.info["dpi"] == (200, 300)


@pytest.mark.parametrize("file_format", ["jpg", "png"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("policy", ["keep", "strip"])
def test_the_resolution_is_kept(kind: str, file_format: str, policy: MetadataPolicy) -> None:
    photo = decode_photo(save(Image.fromarray(gradient()), kind, dpi=(300, 150)), policy=policy)
    with Image.open(io.BytesIO(encode_result(photo, photo.image_bgr, OUTPUTS[file_format]))) as result:
        assert result.info["dpi"] == pytest.approx((300, 150), abs=0.1)


@pytest.mark.parametrize("file_format", OUTPUTS)
def test_strip_keeps_pixels_in_srgb_and_their_resolution(file_format: str) -> None:
    data = source("JPEG", exif_block(), XMP.encode(), icc_profile=p3_profile(), dpi=(150, 300))
    photo = decode_photo(data, policy="strip")
    np.testing.assert_array_equal(photo.image_bgr, decode_image(data))
    result = encode_result(photo, photo.image_bgr, Output(file_format))
    # Orientation 6: what was across is now down.
    assert result == encode(decode_image(data), Output(file_format), Metadata(dpi=(300, 150)))
    with Image.open(io.BytesIO(result)) as picture:
        assert not {"exif", "xmp", "icc_profile"} & set(picture.info)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_metadata_are_left_out_and_never_stop_a_photo() -> None:
    rng = np.random.default_rng(0)
    block = exif_block()
    left_out = 0
    for _ in range(150):
        damaged, packet = bytearray(block), bytearray(XMP.encode())
        for place in rng.integers(8, 420, 6):
            damaged[place] = rng.integers(256)
        for place in rng.integers(0, len(packet), 2):
            packet[place] = rng.integers(32, 127)
        photo = decode_photo(
            save(Image.fromarray(gradient()), "JPEG", exif=b"Exif\0\0" + bytes(damaged), xmp=bytes(packet))
        )
        left_out += photo.metadata.exif is None or photo.metadata.xmp is None
        data = encode_result(photo, photo.image_bgr, OUTPUTS["jpg"])
        assert decode_image(data).shape == photo.image_bgr.shape
        assert b"thumbnail" not in data or photo.metadata.exif is not None
    assert left_out > 10


def test_metadata_behind_the_pixels_of_a_png_count_too() -> None:
    plain = save(Image.fromarray(np.ascontiguousarray(STORED[6](gradient()))), "PNG")
    body = b"eXIf" + exif_block()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = plain[:-12] + chunk + plain[-12:]
    photo = decode_photo(data)
    np.testing.assert_array_equal(photo.image_bgr, gradient()[:, :, ::-1])
    assert photo.metadata == read_metadata(data)
    assert photo.metadata.exif is not None
    # Damage of the pixels is not taken for damage of metadata.
    at = data.index(b"IDAT") + 40
    for damaged in (data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :], data[:at]):
        with pytest.raises(ImageError, match="damaged or cut short"):
            decode_photo(damaged)


def test_entities_and_huge_packets_are_not_parsed(caplog: pytest.LogCaptureFixture) -> None:
    bomb = b'<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;">]><a>&c;</a>'
    for packet in (bomb, b"<a>" + b" " * 2**20 + b"</a>", b"not XML"):
        stream = io.BytesIO()
        notes = PngImagePlugin.PngInfo()
        notes.add_itxt("XML:com.adobe.xmp", packet.decode())
        Image.fromarray(gradient()).save(stream, "PNG", pnginfo=notes)
        assert read_metadata(stream.getvalue()).xmp is None
        assert "not carried over" in caplog.text
        caplog.clear()


def test_metadata_too_large_for_a_jpeg_are_left_out_there_only(caplog: pytest.LogCaptureFixture) -> None:
    metadata = Metadata(exif=exif_block() + bytes(70_000))
    image = gradient()[:, :, ::-1]
    with Image.open(io.BytesIO(encode(image, OUTPUTS["jpg"], metadata))) as picture:
        assert not picture.getexif()
    assert "do not fit into a JPEG" in caplog.text
    with Image.open(io.BytesIO(encode(image, OUTPUTS["png"], metadata))) as picture:
        assert picture.getexif()[0x8298] == "a photographer"


def test_a_profile_of_many_segments_is_joined_again() -> None:
    profile = p3_profile() + bytes(150_000)
    with Image.open(io.BytesIO(encode(gradient(), OUTPUTS["jpg"], icc_profile=profile))) as picture:
        assert picture.info["icc_profile"] == profile


def wide() -> np.ndarray:
    """RGB samples of which many are beyond sRGB when they are taken for P3."""
    rng = np.random.default_rng(3)
    return np.asarray(rng.integers(0, 256, (600, 40, 3)), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_photo_comes_back_in_its_own_colours(kind: str) -> None:
    own = wide()
    options = {"lossless": True} if kind == "WEBP" else {}
    photo = decode_photo(save(Image.fromarray(own), kind, icc_profile=p3_profile(), **options))
    restored = photo.image_bgr.copy()
    # More than one band of rows; and a region whose pixels are partly as before.
    restored[250:270, 10:20] = (30, 120, 200)
    changed = (restored != photo.image_bgr).any(axis=2)
    data = encode_result(photo, restored, OUTPUTS["png"])
    with Image.open(io.BytesIO(data)) as result:
        assert result.info["icc_profile"] == p3_profile()
        written = np.asarray(result)
    np.testing.assert_array_equal(written[~changed], own[~changed])
    srgb, p3 = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(p3_profile()))
    expected = ImageCms.profileToProfile(Image.new("RGB", (1, 1), (200, 120, 30)), srgb, p3)
    assert expected is not None
    assert {tuple(pixel) for pixel in written[changed].tolist()} == {expected.getpixel((0, 0))}
    # The engine's copy is clipped: it could not have been converted back.
    clipped = Image.fromarray(photo.image_bgr[:, :, ::-1].copy())
    back = ImageCms.profileToProfile(clipped, srgb, p3)
    assert np.abs(np.array(back, dtype=np.int16) - own).max() > 40


def test_an_srgb_profile_stays_and_others_become_srgb() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = decode_photo(save(Image.fromarray(gradient()), "PNG", icc_profile=srgb))
    assert (photo.icc_profile, photo.own_bgr) == (srgb, None)
    grey = Image.fromarray(gradient()[:, :, 0])
    for picture, profile in (
        (grey, gray_profile(1.8)),
        (grey, srgb),
        (Image.fromarray(gradient()).convert("CMYK"), ink_profile()),
        (Image.fromarray(gradient()), gray_profile(1.8)),
        (Image.fromarray(gradient()), b"no profile"),
    ):
        data = save(picture, "TIFF", icc_profile=profile)
        photo = decode_photo(data)
        assert (photo.icc_profile, photo.own_bgr) == (None, None)
        np.testing.assert_array_equal(photo.image_bgr, decode_image(data))


def test_a_profile_that_colours_cannot_be_converted_to_gives_srgb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageCms, "isIntentSupported", lambda *_: -1)
    photo = decode_photo(save(Image.fromarray(wide()), "PNG", icc_profile=p3_profile()))
    assert (photo.icc_profile, photo.own_bgr) == (None, None)


def red_writing(on: np.ndarray) -> np.ndarray:
    image = on.copy()
    cv2.putText(image, "Red writing 0123", (10, 60), cv2.FONT_HERSHEY_SIMPLEX, 1.2, (0, 0, 255), 2)
    return image


def sampling(data: bytes) -> int:
    """Of the first component of a JPEG: 0x22 if colours have half the resolution, 0x11 if the whole."""
    return data[data.index(b"\xff\xc0") + 11]


def test_saturated_details_keep_their_colours_in_a_jpeg() -> None:
    for photo in (pictures.portrait(), pictures.group(), pictures.small_portrait()):
        ok, plain = cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, 95])
        assert ok
        # As upstream writes it.
        assert encode_jpeg(photo) == plain.tobytes()
        assert sampling(plain.tobytes()) == 0x22
    written = red_writing(pictures.portrait())
    data = encode_jpeg(written)
    assert sampling(data) == 0x11
    halved = decode_image(cv2.imencode(".jpg", written, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
    errors = [np.abs(one.astype(int) - written).max(axis=2) for one in (decode_image(data), halved)]
    assert np.percentile(errors[0], 99.5) * 2 < np.percentile(errors[1], 99.5)
    for shape in ((1, 1), (15, 40), (20, 1), (17, 33)):
        assert decode_image(encode_jpeg(np.full((*shape, 3), 99, np.uint8))).shape[:2] == shape


def test_the_quality_is_that_of_the_encoder() -> None:
    image = pictures.portrait()
    sizes = {q: len(encode(image, Output("jpg", q))) for q in (30, 95)}
    assert sizes[30] * 3 < sizes[95]
    assert encode(image, Output("jpg", 95)) == encode_jpeg(image)
    webp = {q: len(encode(image, Output("webp", q))) for q in (30, 95)}
    assert webp[30] * 3 < webp[95]
    np.testing.assert_array_equal(decode_image(encode(image, Output("png"))), image)


@pytest.mark.parametrize(
    ("file_format", "quality", "message"),
    [("jpg", 0, "1 to 100"), ("webp", 101, "1 to 100"), ("png", 90, "lossless"), ("gif", None, "one of")],
)
def test_impossible_outputs_are_refused(file_format: str, quality: int | None, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Output(file_format, quality)


def test_a_picture_too_large_for_its_format_is_refused_by_name() -> None:
    image = np.zeros((1000, 16_384, 3), np.uint8)
    with pytest.raises(ImageError, match=r"^Image 2: .*at most 16383 px, the limit of the format webp"):
        encode(image, Output("webp"), index=2)
    assert encode(image, Output("png"))


def test_a_file_without_metadata_has_none() -> None:
    assert read_metadata(save(Image.fromarray(gradient()), "PNG")) == NO_METADATA
    assert read_metadata(b"no picture") == NO_METADATA
