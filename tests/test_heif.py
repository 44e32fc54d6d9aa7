"""HEIC and AVIF, in containers made by hand: each property of a phone's picture, with known values."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from codeformer.errors import ImageError
from codeformer.imaging import boxes
from codeformer.imaging.files import decode_image, decode_photo, read_metadata, size_of
from codeformer.imaging.kinds import kind_of
from codeformer.limits import Limits
from tests.compare import assert_pictures_close
from tests.heif_files import (
    Item,
    avif,
    box,
    container,
    content,
    exif_item,
    heic,
    heic_file,
    heic_grid,
    icc,
    imir,
    irot,
    ispe,
    nclx,
    xmp_item,
)
from tests.profiles import P3_COLORANTS, P3_GAMMA, gray_profile, p3_profile
from tests.test_files import STORED, encoded_as_srgb, gradient

CODED = gradient(64, 128)
# The boxes that undo what STORED does. For HEIC and AVIF: turn first, then mirror.
BOXES = {
    1: (),
    2: (imir(1),),
    3: (irot(2),),
    4: (imir(0),),
    5: (irot(1), imir(0)),
    6: (irot(3),),
    7: (irot(3), imir(0)),
    8: (irot(1),),
}
# What each does to a picture as it is coded.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 3),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
MAKERS = {"HEIC": heic, "AVIF": lambda *properties, **options: avif(CODED, *properties, **options)}


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x8298] = "a photographer"
    return exif.tobytes().removeprefix(b"Exif\0\0")


def close(decoded: np.ndarray, rgb: np.ndarray) -> None:
    assert_pictures_close(decoded, np.ascontiguousarray(rgb[:, :, ::-1]), mean=2, within=8)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("orientation", STORED)
def test_the_container_alone_says_how_a_picture_is_turned(kind: str, orientation: int) -> None:
    turned = UPRIGHT[orientation](CODED)
    # Tests the tables above: a picture that is stored so comes back as it was.
    np.testing.assert_array_equal(UPRIGHT[orientation](STORED[orientation](CODED)), CODED)
    for noted in (1, 3, 6):
        data = MAKERS[kind](*BOXES[orientation], others=[exif_item(exif_of(noted))])
        close(decode_image(data), turned)
        exif = Image.Exif()
        exif.load(read_metadata(data).exif or b"")
        assert exif.get(0x0112, 1) == 1
        assert exif[0x8298] == "a photographer"
    close(decode_image(MAKERS[kind](*BOXES[orientation])), turned)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_orientation_of_xmp_is_not_applied_either(kind: str) -> None:
    space = b'xmlns:x="adobe:ns:meta/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
    packet = b"<x:xmpmeta " + space + b' tiff:Orientation="6"/>'
    close(decode_image(MAKERS[kind](others=[xmp_item(packet)])), CODED)
    if kind == "AVIF":
        close(decode_image(avif(CODED, irot(3), others=[xmp_item(packet)])), UPRIGHT[6](CODED))


def test_files_as_an_encoder_writes_them() -> None:
    for name in ("plain", "ten_bit"):
        close(decode_image(heic_file(name)), CODED)
    half = CODED.astype(float)
    half[:, 64:] = half[:, 64:] * 51 / 255 + 204
    # Alpha is coded with loss, too; its edge is not.
    assert_pictures_close(
        decode_image(heic_file("alpha")), half.round().astype(np.uint8)[:, :, ::-1], mean=2, within=20
    )


def test_ten_bits_are_scaled_and_not_cut() -> None:
    decoded = decode_image(heic_file("ten_bit"))
    assert decoded.min() == 0
    assert decoded.max() == 255
    assert_pictures_close(decoded, CODED[:, :, ::-1], mean=0.7, within=3)


def test_tiles_are_joined_and_cropped_and_turned() -> None:
    whole = gradient(128, 128)[:100, :120]
    close(decode_image(heic_grid(120, 100)), whole)
    close(decode_image(heic_grid(120, 100, irot(3))), np.rot90(whole, 3))


@pytest.mark.parametrize("make", [heic, lambda *p: avif(CODED, *p), lambda *p: heic_grid(120, 100, *p)])
def test_a_cut_file_is_never_a_picture(make: Any) -> None:
    data = make(irot(1))
    whole = decode_image(data)
    assert len(whole)
    for length in [*range(1, 64), *range(64, len(data) - 64, 23), *range(len(data) - 64, len(data))]:
        with pytest.raises(ImageError):
            decode_image(data[:length])
    np.testing.assert_array_equal(decode_image(data + b"\0" * 50), whole)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", MAKERS)
def test_damaged_containers_give_a_picture_or_our_error(kind: str) -> None:
    seed = MAKERS[kind](irot(1), nclx(9, 16), others=[exif_item(exif_of(6))])
    rng = np.random.default_rng(2)
    outcomes = {"picture": 0, "error": 0}
    for _ in range(200):
        data = bytearray(seed)
        for place in rng.integers(0, 700, rng.integers(1, 4)):
            data[place] = rng.integers(256)
        size_of(bytes(data))
        read_metadata(bytes(data))
        try:
            decoded = decode_image(bytes(data), None, Limits(max_megapixels=1))
        except ImageError:
            outcomes["error"] += 1
        else:
            outcomes["picture"] += 1
            assert decoded.dtype == np.uint8
            assert decoded.ndim == 3
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize("kind", MAKERS)
def test_the_limits_are_checked_before_pixels_are_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = MAKERS[kind](irot(1))
    assert sorted(size_of(data)) == [64, 128]

    def fail(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("codeformer.imaging.files.samples_of", fail)
    monkeypatch.setattr("codeformer.imaging.heif.HeifFile.decode", fail)
    with pytest.raises(ImageError, match="at most 8,191 pixels"):
        decode_image(data, 1, Limits(max_megapixels=0.008191))
    narrow = data.replace(struct.pack(">4xII", 128, 64), struct.pack(">4xII", 128, 4))
    with pytest.raises(ImageError, match="times the short one"):
        decode_image(narrow)


def as_srgb(levels: np.ndarray) -> np.ndarray:
    """P3 with a gamma of 2.2 to sRGB, clipped: by the published matrices, both adapted to D50."""
    to_srgb = np.array(
        [[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]]
    )
    light = (levels / 255.0) ** P3_GAMMA @ (to_srgb @ P3_COLORANTS).T
    return encoded_as_srgb(np.clip(light, 0, 1))


@pytest.mark.parametrize("kind", MAKERS)
def test_display_p3_by_profile_and_by_number(kind: str) -> None:
    expected = as_srgb(CODED)
    # Both are far from the samples, so that the conversion is visible.
    assert np.abs(expected.astype(int) - CODED).max() > 30
    photo = decode_photo(MAKERS[kind](icc(p3_profile())))
    assert photo.icc_profile == p3_profile()
    for decoded in (photo.image_bgr, decode_image(MAKERS[kind](nclx(12, 13)))):
        assert_pictures_close(decoded[:, :, ::-1], expected, mean=3, within=20, share=0.999)
    close(photo.own_bgr, CODED)  # type: ignore[arg-type]
    # A profile takes precedence over numbers.
    both = decode_image(MAKERS[kind](icc(p3_profile()), nclx(9, 16)))
    np.testing.assert_array_equal(both, photo.image_bgr)


def test_a_profile_made_from_numbers_is_that_of_displays() -> None:
    profile = decode_photo(heic(nclx(12, 13))).icc_profile
    assert profile is not None
    with Image.new("RGB", (1, 1)) as one:
        stream = io.BytesIO()
        one.save(stream, "PNG", icc_profile=profile)
    for letter, column in zip(b"rgb", P3_COLORANTS.T, strict=True):
        at = profile.index(bytes([letter]) + b"XYZ")
        offset = struct.unpack_from(">I", profile, at + 4)[0]
        found = np.array(struct.unpack_from(">3i", profile, offset + 8)) / 65_536
        np.testing.assert_allclose(found, column, atol=4e-4)


@pytest.mark.parametrize("kind", MAKERS)
def test_colours_by_number_that_are_those_of_srgb_change_nothing(kind: str) -> None:
    for numbers in ((1, 13), (1, 1), (2, 2), (6, 6)):
        photo = decode_photo(MAKERS[kind](nclx(*numbers)))
        assert photo.icc_profile is None
        close(photo.image_bgr, CODED)


def light_of(signal: np.ndarray, transfer: int) -> np.ndarray:
    """Brightness in cd/m² by ITU-R BT.2100: PQ, or HLG on a display of 1000 cd/m²."""
    if transfer == 16:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        power = signal ** (1 / m2)
        return np.asarray(10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1))
    scene = np.where(
        signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
    )
    return np.asarray(1000 * scene**1.2)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_keeps_plausible_tones(kind: str, transfer: int) -> None:
    """Dark and middle tones are kept; white paper is nearly white, and what is brighter still differs."""
    decoded = decode_image(MAKERS[kind](nclx(1, transfer)))
    light = light_of(CODED / 255.0, transfer)
    # Of 203 cd/m², the brightness of white paper.
    dark = (light < 0.55 * 203).all(axis=2)
    expected = encoded_as_srgb(np.clip(light / 203, 0, 1))
    error = np.abs(decoded[:, :, ::-1].astype(int) - expected)[dark]
    assert dark.sum() > 100
    assert np.median(error) <= 3
    paper = np.abs(light - 203) < 20
    assert 220 <= np.median(decoded[:, :, ::-1][paper]) <= 250
    # Along the top row, red rises from nothing to the brightest.
    row = decoded[0, :, 2].astype(int)
    assert row[0] < 5
    assert row[-1] > 250
    assert (np.diff(row) >= -3).all()


def test_a_grey_profile_does_not_apply_to_colours() -> None:
    close(decode_image(heic(icc(gray_profile(1.8)))), CODED)


def test_several_pictures_in_a_file_give_the_primary_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    first, second = heic_file("plain"), heic_file("tile_0")
    items = [
        Item(b"hvc1", content(data, b"mdat"), [box(b"hvcC", content(data, b"hvcC")), ispe(*size)])
        for data, size in ((first, (128, 64)), (second, (64, 64)))
    ]
    close(decode_image(container(items), 3), CODED)
    assert "image 3 has several frames" in caplog.text


def test_colour_numbers_are_those_of_the_primary_item() -> None:
    assert boxes.coded_colours(avif(CODED, nclx(12, 13))) == (12, 13)
    assert boxes.coded_colours(heic_grid(120, 100, nclx(9, 18))) == (9, 18)
    assert boxes.coded_colours(avif(CODED)) is None
    assert boxes.coded_colours(b"no container") is None
    other = Item(b"hvc1", b"", [nclx(9, 16)])
    assert boxes.coded_colours(container([Item(b"grid", b"", [ispe(1, 1)]), other])) is None


def test_the_names_of_the_kinds() -> None:
    for kind, make in MAKERS.items():
        known = kind_of(io.BytesIO(make()))
        assert known is not None
        assert (known.name, known.refusal) == (kind, None)
