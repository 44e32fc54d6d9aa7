"""Corrects XMP packets for a picture that has been turned upright and has lost what was stored beside it."""

from typing import Any, Final
from xml.dom import XMLNS_NAMESPACE, Node, minidom
from xml.parsers.expat import ExpatError

# Larger packets are those of editors that store a history of all their steps.
MAX_BYTES: Final = 2**20

_TIFF: Final = "http://ns.adobe.com/tiff/1.0/"
_EXIF: Final = "http://ns.adobe.com/exif/1.0/"
_WIDTHS: Final = {(_TIFF, "ImageWidth"), (_EXIF, "PixelXDimension")}
_HEIGHTS: Final = {(_TIFF, "ImageLength"), (_EXIF, "PixelYDimension")}
_ORIENTATION: Final = (_TIFF, "Orientation")
# They describe what does not belong to the result: gain maps, motion photos, depth maps, thumbnails.
_REMOVED_SPACES: Final = frozenset(
    {
        "http://ns.adobe.com/hdr-gain-map/1.0/",
        "http://ns.apple.com/HDRGainMap/1.0/",
        "http://ns.apple.com/pixeldatainfo/1.0/",
        "http://ns.google.com/photos/1.0/camera/",
        "http://ns.google.com/photos/1.0/container/",
        "http://ns.google.com/photos/1.0/container/item/",
        "http://ns.google.com/photos/1.0/depthmap/",
        "http://ns.google.com/photos/1.0/image/",
        "http://ns.google.com/photos/dd/1.0/device/",
    }
)
_REMOVED: Final = {
    ("http://ns.adobe.com/xap/1.0/", "Thumbnails"),
    ("http://ns.adobe.com/xmp/note/", "HasExtendedXMP"),
}


def corrected(packet: bytes, width: int, height: int) -> bytes:
    """An XMP packet of an upright picture.

    Args:
        packet: the XML of the packet.
        width: of the upright picture, in px.
        height: likewise.

    Raises:
        ValueError: it is damaged, larger than MAX_BYTES, or declares entities.
    """
    packet = packet.strip(b"\0 \r\n\t")
    if len(packet) > MAX_BYTES or b"<!" in packet.replace(b"<!--", b"").replace(b"<![CDATA[", b""):
        raise ValueError("an XMP packet that is too large or declares entities")
    try:
        # Without entities, and of bounded size, it cannot grow in memory.
        document: Any = minidom.parseString(packet)  # noqa: S318
    except (ExpatError, LookupError, UnicodeError) as cause:
        raise ValueError("a damaged XMP packet") from cause
    _correct(document, str(width), str(height))
    return b"".join(node.toxml("utf-8") for node in document.childNodes)


def _correct(node: Any, width: str, height: str) -> None:
    for child in list(node.childNodes):
        if child.nodeType != Node.ELEMENT_NODE:
            continue
        if _is_removed(child):
            node.removeChild(child)
            continue
        if (value := _value_of(child, width, height)) is not None:
            _set_text(child, value)
        _correct(child, width, height)
        attributes = child.attributes
        for attribute in [attributes.item(number) for number in range(attributes.length)]:
            if _is_removed(attribute):
                child.removeAttributeNode(attribute)
            elif (value := _value_of(attribute, width, height)) is not None:
                attribute.value = value


def _is_removed(node: Any) -> bool:
    # A declaration of a space is an attribute.
    space = node.nodeValue if node.namespaceURI == XMLNS_NAMESPACE else node.namespaceURI
    return space in _REMOVED_SPACES or (space, node.localName) in _REMOVED


def _value_of(node: Any, width: str, height: str) -> str | None:
    """The corrected value of an element or attribute; None for one that stays."""
    name = (node.namespaceURI, node.localName)
    # Pillow and others look for the name as text, whatever its space is.
    if name == _ORIENTATION or node.nodeName == "tiff:Orientation":
        return "1"
    return width if name in _WIDTHS else height if name in _HEIGHTS else None


def _set_text(element: Any, text: str) -> None:
    while element.firstChild is not None:
        element.removeChild(element.firstChild)
    element.appendChild(element.ownerDocument.createTextNode(text))
