"""Recognises the kind of a file by its first bytes: formats that are read, and kinds that are refused."""

import re
from dataclasses import dataclass
from typing import BinaryIO, Final

from codeformer.imaging import jpeg, tiff

AVIF: Final = "AVIF"
HEIC: Final = "HEIC"
# The formats that Pillow reads here; HEIC has its own reader.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", AVIF)
# The names of pictures in folders, in lower case; what a file is tells only its content.
PICTURE_SUFFIXES: Final = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".heic", ".heif", ".avif"),
)

_HEAD_BYTES: Final = 4096
_NO_PICTURE: Final = "not a picture that can be read here"
# The refusal of a file of unknown kind.
UNKNOWN: Final = f"{_NO_PICTURE}; use a JPEG, HEIC, AVIF, PNG, WebP, BMP, TIFF or GIF"


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: HEIC or Pillow's name of a format that is read; otherwise a description of the kind.
        remedy: what to do with a file of a kind that is not read; None for a format that is read.
    """

    name: str
    remedy: str | None = None

    @property
    def refusal(self) -> str | None:
        """Why such a file is refused and what to do; None if it is read."""
        return None if self.remedy is None else f"{_NO_PICTURE}, but {self.name}; {self.remedy}."


_CONVERT: Final = "convert it to JPEG or PNG"
_EIGHT_BITS: Final = "save it as an ordinary JPEG of 8 bits"
_NO_PHOTO: Final = "use a photo instead"


def _raw(of: str) -> Kind:
    return Kind(f"a camera RAW file ({of})", "export it as JPEG")


_BMP_HEADERS: Final = frozenset({12, 40, 52, 56, 64, 108, 124})
_VIDEO: Final = Kind("a video", "save one of its frames as JPEG")
_JPEG_2000: Final = Kind("JPEG 2000", _CONVERT)
_JPEG_XL: Final = Kind("JPEG XL", _CONVERT)
_ARCHIVE: Final = Kind("an archive", "unpack it and use the photos in it")
_PDF: Final = Kind("a PDF document", "export its pages as JPEG")
_HEIF_OF_OTHERS: Final = Kind("HEIF of another codec than HEVC and AV1", _CONVERT)
_AVIF: Final = Kind(AVIF)
_HEIC: Final = Kind(HEIC)
# Major brands that tell nothing of the codec.
_GENERIC_BRANDS: Final = frozenset({b"mif1", b"msf1", b"mif2"})
_FTYP: Final = {
    **dict.fromkeys((b"avif", b"avis"), _AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), _HEIC),
    **dict.fromkeys((b"avci", b"avcs", b"jpeg", b"jpgs", b"j2ki", b"j2is", b"vvic"), _HEIF_OF_OTHERS),
    b"crx ": _raw("Canon CR3"),
    **dict.fromkeys((b"jp2 ", b"jpx ", b"jpm ", b"jph "), _JPEG_2000),
    b"jxl ": _JPEG_XL,
}  # fmt: skip
# Signatures at the very beginning of a file.
_MAGIC: Final = (
    (b"\x89PNG\r\n\x1a\n", Kind("PNG")),
    (b"GIF87a", Kind("GIF")),
    (b"GIF89a", Kind("GIF")),
    (b"FUJIFILMCCD-RAW", _raw("Fujifilm RAF")),
    (b"IIRO", _raw("Olympus ORF")),
    (b"IIRS", _raw("Olympus ORF")),
    (b"MMOR", _raw("Olympus ORF")),
    (b"IIU\0", _raw("Panasonic RW2")),
    (b"\0MRM", _raw("Minolta MRW")),
    (b"FOVb", _raw("Sigma X3F")),
    (b"II\xbc\x01", Kind("JPEG XR", _CONVERT)),
    (b"\xff\x4f\xff\x51", _JPEG_2000),
    (b"\0\0\0\x0cjP  \r\n\x87\n", _JPEG_2000),
    (b"\xff\x0a", _JPEG_XL),
    (b"\0\0\0\x0cJXL \r\n\x87\n", _JPEG_XL),
    (b"BPG\xfb", Kind("BPG", _CONVERT)),
    (b"8BPS", Kind("a Photoshop file", "export it as JPEG or PNG")),
    (b"gimp xcf", Kind("a GIMP file", "export it as JPEG or PNG")),
    (b"\0\0\1\0", Kind("an icon", _CONVERT)),
    (b"v/1\1", Kind("OpenEXR", _CONVERT)),
    (b"#?RADIANCE", Kind("Radiance HDR", _CONVERT)),
    (b"#?RGBE", Kind("Radiance HDR", _CONVERT)),
    (b"qoif", Kind("QOI", _CONVERT)),
    (b"DDS ", Kind("a DirectDraw texture", _CONVERT)),
    (b"SIMPLE  =", Kind("FITS", _CONVERT)),
    (b"\x8aMNG\r\n\x1a\n", Kind("MNG", _CONVERT)),
    (b"AT&TFORM", Kind("DjVu", _CONVERT)),
    (b"%PDF-", _PDF),
    (b"%!PS", Kind("PostScript", _CONVERT)),
    (b"\xc5\xd0\xd3\xc6", Kind("PostScript", _CONVERT)),
    (b"\xd7\xcd\xc6\x9a", Kind("a Windows metafile", _CONVERT)),
    (b"\x1aE\xdf\xa3", _VIDEO),
    (b"\0\0\1\xba", _VIDEO),
    (b"\0\0\1\xb3", _VIDEO),
    (b"0&\xb2u\x8ef\xcf\x11", _VIDEO),
    (b"FLV\1", _VIDEO),
    (b"PK\3\4", _ARCHIVE),
    (b"\x1f\x8b", _ARCHIVE),
    (b"7z\xbc\xaf\x27\x1c", _ARCHIVE),
    (b"Rar!\x1a\7", _ARCHIVE),
    (b"\0\5\x16\7", Kind("a sidecar of macOS (AppleDouble)", "use the photo it belongs to")),
    (b"\0\5\x16\0", Kind("a sidecar of macOS (AppleSingle)", "use the photo it belongs to")),
)  # fmt: skip
_RIFF: Final = {b"WEBP": Kind("WEBP"), b"AVI ": _VIDEO}
_PORTABLE: Final = re.compile(rb"P(?:[1-7]|[Ff])[\s#]")
_SVG: Final = re.compile(rb"^\s*<(?:svg|\?xml|!--|!DOCTYPE svg).*?<?svg\b", re.IGNORECASE | re.DOTALL)
_HTML: Final = re.compile(rb"^\s*<(?:!doctype html|html|head|body)\b", re.IGNORECASE)
_LOSSLESS: Final = frozenset({0xC3, 0xC7, 0xCB, 0xCF})
_HIERARCHICAL: Final = frozenset({0xC5, 0xC6, 0xCD, 0xCE})
_JPEG_LS: Final = 0xF7


def kind_of(stream: BinaryIO) -> Kind | None:
    """The kind of a file; None if it is unknown.

    Args:
        stream: the file, seekable. Its head is read, and for JPEG and TIFF a few other parts.
    """
    stream.seek(0)
    head = stream.read(_HEAD_BYTES)
    if head.startswith(jpeg.MAGIC):
        return _kind_of_jpeg(stream)
    if head.startswith(b"II\x1a\0\0\0HEAPCCDR"):
        return _raw("Canon CRW")
    if head.startswith(tiff.MAGIC):
        return _kind_of_tiff(stream)
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return Kind("BMP")
    if head.startswith(b"RIFF"):
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _kind_of_boxes(head)
    if head[4:8] in {b"moov", b"mdat", b"wide", b"pnot"}:
        return _VIDEO
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    return _kind_of_text(head)


def _kind_of_jpeg(stream: BinaryIO) -> Kind:
    marker, bits = jpeg.frame_of(stream) or (0xC0, 8)
    if marker == _JPEG_LS:
        return Kind("JPEG-LS", _EIGHT_BITS)
    if marker in _LOSSLESS:
        return Kind(f"lossless JPEG of {bits} bits per sample", _EIGHT_BITS)
    if marker in _HIERARCHICAL:
        return Kind("hierarchical JPEG", _EIGHT_BITS)
    if bits != 8:
        return Kind(f"JPEG of {bits} bits per sample ({bits}-bit JPEG)", _EIGHT_BITS)
    return Kind("JPEG")


def _kind_of_tiff(stream: BinaryIO) -> Kind:
    directories = tiff.Directories(stream)
    if directories.is_raw:
        return _raw("such as NEF, DNG, CR2 or ARW")
    if compression := directories.unread_compression:
        return Kind(f"TIFF with the compression {compression}", "save it with LZW or Deflate")
    return Kind("TIFF")


def _kind_of_boxes(head: bytes) -> Kind:
    """The kind of an ISO media file, by its major brand or, for generic brands, its compatible brands."""
    size = min(max(16, int.from_bytes(head[:4])), len(head))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, size - 3, 4))]
    if brands[0] in _GENERIC_BRANDS:
        known = [_FTYP[brand] for brand in brands[1:] if brand in _FTYP]
        return next((kind for kind in (_AVIF, _HEIC) if kind in known), known[0] if known else _HEIC)
    return _FTYP.get(brands[0], _VIDEO)


def _kind_of_text(head: bytes) -> Kind | None:
    text = head.removeprefix(b"\xef\xbb\xbf")
    if _SVG.match(text):
        return Kind("an SVG drawing", "export it as PNG")
    if _HTML.match(text):
        return Kind("a web page", _NO_PHOTO)
    if b"%PDF-" in head[:1024]:
        return _PDF
    if head[128:132] == b"DICM":
        return Kind("DICOM", _CONVERT)
    return Kind("a PNM or PFM picture", _CONVERT) if _PORTABLE.match(head) else None
