"""Encoded images to one array of bytes, in memory or kept in a cache.

An image is cropped to its central square. Where all images of a source are squares of one side no larger than the
wanted size, they are kept as they are and enlarged batch by batch on the device (CIFAR-10: 3 KB an image, not 150 KB);
otherwise they are kept at the wanted size.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from flow_finetune.storage import atomic_path, exclusive_file, fingerprint, require_disk_space

# Part of a cache's key: 2 since images are turned upright and 16 bits are reduced to 8.
_DECODING = 3


@dataclass(frozen=True)
class Encoded:
    """What was read from a source before anything is decoded."""

    ids: list[str]
    labels: list[int]
    class_names: tuple[str, ...] | None  # None where labels are numbers
    read: Callable[[int], bytes]  # the encoded bytes of one image


def _open(encoded: Encoded, index: int):
    from PIL import Image

    content = encoded.read(index)
    if not isinstance(content, bytes):
        raise OSError("no encoded bytes")
    with warnings.catch_warnings():
        # Its guard against decompression bombs: a warning is an image that is refused.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(content))
        except Image.DecompressionBombError as error:
            raise OSError(str(error)) from error


# What Pillow raises for a damaged file depends on the format; every one of these means that there is no image.
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, RuntimeError, Warning)


def stored_side(encoded: Encoded, size: int, crop: float) -> int:
    """Pixels a side that images for a model of `size` are kept at."""
    sides = set()
    for index in range(len(encoded.ids)):
        try:
            sides.update(_open(encoded, index).size)
        except _DECODE_ERRORS:
            continue
        if len(sides) > 1 or crop != 1.0:
            return size
    return min([size, *sides])


@dataclass(frozen=True)
class Undecoded:
    """The indices of images that did not decode, and why the first of them did not."""

    indices: list[int]
    reason: str | None = None  # None where none is undecoded, and in caches that were made before it was kept


def decode_cached(encoded: Encoded, side: int, crop: float, cache: str | None) -> tuple[np.ndarray, Undecoded]:
    """Pixels of all images, and what did not decode, whose pixels are 0; mapped from a file in `cache` where given."""
    shape = (len(encoded.ids), side, side, 3)
    if cache is None:
        pixels = np.zeros(shape, np.uint8)
        return pixels, _decode_into(pixels, encoded, crop)
    key = fingerprint(
        [json.dumps([shape, crop, _DECODING]).encode(), *map(_bytes_or_nothing(encoded), range(shape[0]))]
    )
    path = Path(cache).expanduser() / f"{key}.npy"
    bad_path = path.with_suffix(".json")
    # Runs that share a cache would write to one temporary file. Its directory may be locked by a run of its own.
    with exclusive_file(path, wait=True):
        if not (path.is_file() and bad_path.is_file()):
            require_disk_space(path, int(np.prod(shape)))
            with atomic_path(path) as temporary:
                pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
                bad = _decode_into(pixels, encoded, crop)
                pixels.flush()
                del pixels
            with atomic_path(bad_path) as temporary:
                temporary.write_text(json.dumps(asdict(bad)))
    found = json.loads(bad_path.read_text())
    # Before the reason was kept, the file was the list of indices.
    bad = Undecoded(found) if isinstance(found, list) else Undecoded(**found)
    return np.load(path, mmap_mode="r"), bad


def _bytes_or_nothing(encoded: Encoded) -> Callable[[int], bytes]:
    def read(index: int) -> bytes:
        try:
            content = encoded.read(index)
        except _DECODE_ERRORS:
            return b""
        return content if isinstance(content, bytes) else b""

    return read


def _decode_into(pixels: np.ndarray, encoded: Encoded, crop: float) -> Undecoded:
    indices, reason = [], None
    for index in range(len(pixels)):
        try:
            pixels[index] = _square(_to_rgb(_open(encoded, index)), pixels.shape[1], crop)
        except _DECODE_ERRORS as error:
            indices.append(index)
            reason = reason or _reason(error)
    return Undecoded(indices, reason)


def _reason(error: BaseException) -> str:
    # Pillow names the buffer that it was given, by its address.
    text = re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error)).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_ORIENTATION = 0x0112


def _to_rgb(image):
    """Upright (EXIF), 8 bits a channel."""
    from PIL import Image

    image.load()  # what is wrong with the pixels is not to be taken for a damaged block
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # whatever a damaged block makes Pillow raise: the pixels are as they are stored
        orientation = None
    # In the order of EXIF's numbers; 1 is upright.
    turns = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE",
                            "ROTATE_90"), start=2))  # fmt: skip
    if orientation in turns:
        image = image.transpose(Image.Transpose[turns[orientation]])
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, np.uint16) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        # Pillow would clip them to 0..255, whatever their range is.
        raise ValueError(f"mode {image.mode} has no range that is known")
    return image.convert("RGB")


def _square(image, side: int, crop: float) -> np.ndarray:
    """The central square of `crop` times the short side, at `side` pixels, `[side, side, 3]` uint8."""
    from PIL import Image

    if image.size != (side, side) or crop != 1.0:
        width, height = image.size
        length = crop * min(width, height)
        left, top = (width - length) / 2, (height - length) / 2
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + length, top + length))
    return np.asarray(image)
