"""HEIF containers (HEIC, AVIF) made by hand around coded pictures.

The coded pictures of HEIC are those of tests/heic: `gradient(64, 128)` of tests/test_files.py in 8 bits, in
10 bits, and with an alpha of 51 in its right half; and the four quarters of `gradient(128, 128)`. libheif's
heif-enc with x265 wrote them once; no encoder is needed to run the tests. Those of AVIF are coded by Pillow.
"""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from tests.shared import ROOT

HEIC_FOLDER = ROOT / "tests" / "heic"


def heic_file(name: str) -> bytes:
    return (HEIC_FOLDER / f"{name}.heic").read_bytes()


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def full_box(kind: bytes, body: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(kind, bytes([version]) + flags.to_bytes(3) + body)


def content(data: bytes, kind: bytes) -> bytes:
    """What follows the first header of this kind."""
    at = data.index(kind)
    return data[at + 4 : at - 4 + int.from_bytes(data[at - 4 : at])]


def irot(quarter_turns: int) -> bytes:
    """Turns counter-clockwise."""
    return box(b"irot", bytes([quarter_turns]))


def imir(axis: int) -> bytes:
    """0 exchanges top and bottom, 1 left and right (ISO/IEC 23008-12:2022, 6.5.12)."""
    return box(b"imir", bytes([axis]))


def ispe(width: int, height: int) -> bytes:
    return full_box(b"ispe", struct.pack(">II", width, height))


def icc(profile: bytes) -> bytes:
    return box(b"colr", b"prof" + profile)


def nclx(primaries: int, transfer: int, matrix: int = 6) -> bytes:
    return box(b"colr", b"nclx" + struct.pack(">HHHB", primaries, transfer, matrix, 0x80))


@dataclass
class Item:
    """An item of a container.

    Attributes:
        kind: its type.
        data: its content.
        properties: its boxes.
        refers: to the items with these numbers, from 1, by these types.
    """

    kind: bytes
    data: bytes
    properties: Sequence[bytes] = ()
    refers: dict[bytes, list[int]] = field(default_factory=dict)


def container(items: Sequence[Item], brand: bytes = b"heic") -> bytes:
    """A container whose first item is the primary one."""
    properties: list[bytes] = []
    associations = struct.pack(">I", len(items))
    entries, references = b"", b""
    for number, item in enumerate(items, start=1):
        associations += struct.pack(">HB", number, len(item.properties))
        for one in item.properties:
            if one not in properties:
                properties.append(one)
            is_essential = one[4:8] in {b"irot", b"imir", b"hvcC", b"av1C"}
            associations += bytes([0x80 * is_essential | properties.index(one) + 1])
        tail = b"application/rdf+xml\0" if item.kind == b"mime" else b""
        hidden = int(item.kind in {b"Exif", b"mime"})
        entries += full_box(
            b"infe", struct.pack(">HH4s", number, 0, item.kind) + b"\0" + tail, version=2, flags=hidden
        )
        for kind, targets in item.refers.items():
            body = struct.pack(f">HH{len(targets)}H", number, len(targets), *targets)
            references += box(kind, body)
    head = box(b"ftyp", brand + bytes(4) + b"mif1" + brand + b"miaf")

    def meta(start: int) -> bytes:
        places = struct.pack(">BBH", 0x44, 0, len(items))
        for number, item in enumerate(items, start=1):
            places += struct.pack(">HHHII", number, 0, 1, start, len(item.data))
            start += len(item.data)
        return full_box(
            b"meta",
            full_box(b"hdlr", bytes(4) + b"pict" + bytes(13))
            + full_box(b"pitm", struct.pack(">H", 1))
            + full_box(b"iloc", places)
            + full_box(b"iinf", struct.pack(">H", len(items)) + entries)
            + (full_box(b"iref", references) if references else b"")
            + box(b"iprp", box(b"ipco", b"".join(properties)) + full_box(b"ipma", associations)),
        )

    before = len(head) + len(meta(0)) + 8
    return head + meta(before) + box(b"mdat", b"".join(item.data for item in items))


def exif_item(exif: bytes) -> Item:
    """EXIF data (a TIFF structure) of the first item, as phones store them."""
    return Item(b"Exif", struct.pack(">I", 6) + b"Exif\0\0" + exif, refers={b"cdsc": [1]})


def xmp_item(packet: bytes) -> Item:
    return Item(b"mime", packet, refers={b"cdsc": [1]})


def heic(*properties: bytes, name: str = "plain", others: Sequence[Item] = ()) -> bytes:
    """A HEIC of one coded picture with further properties and items."""
    data = heic_file(name)
    coded = Item(
        b"hvc1", content(data, b"mdat"), [box(b"hvcC", content(data, b"hvcC")), ispe(128, 64), *properties]
    )
    return container([coded, *others], b"heic" if name == "plain" else b"heix")


def heic_grid(width: int, height: int, *properties: bytes) -> bytes:
    """A HEIC of four tiles of 64 px, cropped to a size."""
    tiles = []
    for number in range(4):
        data = heic_file(f"tile_{number}")
        tiles.append(
            Item(b"hvc1", content(data, b"mdat"), [box(b"hvcC", content(data, b"hvcC")), ispe(64, 64)])
        )
    layout = struct.pack(">BBBBHH", 0, 0, 1, 1, width, height)
    grid = Item(b"grid", layout, [ispe(width, height), *properties], {b"dimg": [2, 3, 4, 5]})
    return container([grid, *tiles])


def avif(rgb: np.ndarray, *properties: bytes, others: Sequence[Item] = ()) -> bytes:
    """An AVIF of a picture, (H, W, 3) uint8 RGB, with further properties and items."""
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "AVIF", quality=95, subsampling="4:4:4")
    data = stream.getvalue()
    height, width = rgb.shape[:2]
    boxes = [box(b"av1C", content(data, b"av1C")), ispe(width, height), box(b"pixi", content(data, b"pixi"))]
    return container([Item(b"av01", content(data, b"mdat"), [*boxes, *properties]), *others], b"avif")
