"""Images as their files hold them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.extras import require

__all__ = ["IMAGES", "read_image"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def read_image(path: Path, channels: int) -> Any:
    """Return an image of Pillow's, in grey where a model sees one channel, else in color.

    Raises `SqCpuError`, which names the file, for what is no image, is damaged, or so large that
    Pillow takes it for an attack; and without the extra "vision".
    """
    require("PIL", "vision")
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):  # which conversion would clip
                    raise ValueError(f"mode {image.mode}, more than 8 bits a channel")
                upright = ImageOps.exif_transpose(image)
                return upright.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # the formats' readers raise all kinds
        raise SqCpuError(
            f"{path} cannot be read as an image ({first_line(error)}): repair it, or leave it out"
        ) from error
