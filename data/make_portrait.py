"""Makes data/1.jpg: a portrait as it comes out of an old album, blurred, noisy and badly compressed.

The source is the portrait of astronaut Eileen Collins by NASA (public domain), which scikit-image
ships. The result is the same byte for byte on every run with the pinned tools.
"""

from pathlib import Path
from typing import Final

import cv2
import numpy as np
from skimage.data import astronaut

TARGET: Final = Path(__file__).with_name("1.jpg")
SEED: Final = 1
# Head and shoulders: rows, then columns.
PORTRAIT: Final = np.s_[0:390, 70:370]
SIZE_WH: Final = (640, 832)
BLUR_SIGMA: Final = 2.4
NOISE_SIGMA: Final = 7.0
JPEG_QUALITY: Final = 45


def main() -> None:
    """Writes the picture."""
    portrait = cv2.cvtColor(astronaut()[PORTRAIT], cv2.COLOR_RGB2BGR)  # type: ignore[no-untyped-call]
    enlarged = cv2.resize(portrait, SIZE_WH, interpolation=cv2.INTER_CUBIC)
    blurred = cv2.GaussianBlur(enlarged, (0, 0), BLUR_SIGMA).astype(np.float64)
    noisy = blurred + np.random.default_rng(SEED).normal(0.0, NOISE_SIGMA, blurred.shape)
    levels = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    ok, data = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not ok:
        raise RuntimeError("OpenCV cannot write JPEG")
    TARGET.write_bytes(data.tobytes())


if __name__ == "__main__":
    main()
