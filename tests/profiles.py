"""ICC profiles, written from the ICC.1 specification (version 2)."""

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)


def gray_profile(gamma: float) -> bytes:
    """A profile for grey samples with the given gamma."""
    return _profile(
        b"GRAY", b"XYZ ", {b"kTRC": b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + bytes(2)}
    )


# Colorants of Display P3, adapted to D50, as profiles of displays publish them: columns for red, green, blue.
P3_COLORANTS = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
P3_GAMMA = 2.2


def p3_profile() -> bytes:
    """The colours of Display P3 with a plain gamma of 2.2, close to the curve of sRGB."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(P3_GAMMA * 256)) + bytes(2)
    tags: dict[bytes, bytes] = {}
    for letter, column in zip((b"r", b"g", b"b"), P3_COLORANTS.T, strict=True):
        tags |= {letter + b"XYZ": b"XYZ " + bytes(4) + _fixed(tuple(column)), letter + b"TRC": curve}
    return _profile(b"RGB ", b"XYZ ", tags)


def ink_profile() -> bytes:
    """A CMYK profile in which only black ink counts: L* falls linearly from 100 to 0."""
    table = np.zeros((2, 2, 2, 2, 3), np.uint8)
    # Lab in 8 bits: 255 is L* = 100, and 128 is neutral.
    table[..., 1:] = 128
    table[:, :, :, 0, 0] = 255
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    lut = b"mft1" + struct.pack(">IBBBx", 0, 4, 3, 2) + matrix + identity * 4 + table.tobytes() + identity * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut})


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"written by hand"
    description = b"desc" + struct.pack(">II", 0, len(text) + 1) + text + bytes(1 + 4 + 4 + 2 + 1 + 67)
    white = b"XYZ " + bytes(4) + _fixed(D50)
    tags = {b"desc": description, b"cprt": b"text" + bytes(4) + text + bytes(1), b"wtpt": white} | tags
    offset = 128 + 4 + 12 * len(tags)
    index, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        index += name + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    device = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4sI", offset + len(body), bytes(4), 0x02400000) + device + space + connection
    header += bytes(12) + b"acsp" + bytes(28) + _fixed(D50)
    return header.ljust(128, b"\0") + index + body


def _fixed(numbers: tuple[float, ...]) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))
