"""Labelled images from folders, Parquet files or the hub, decoded once into one array of bytes.

An image is cropped to its central square. Where all images of a source are squares of one side no larger than the
wanted size, they are kept as they are and enlarged batch by batch on the device (CIFAR-10: 3 KB an image, not 150 KB);
otherwise they are kept at the wanted size.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flow_finetune.data import is_local
from flow_finetune.errors import InputError
from flow_finetune.progress import say
from flow_finetune.storage import atomic_path, exclusive_file, fingerprint, require_disk_space
from flow_finetune.vision.config import ImageDataConfig, ImageTaskConfig

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
_NUM_NAMED = 5
# Part of a cache's key: 2 since images are turned upright and 16 bits are reduced to 8.
_DECODING = 3


@dataclass(frozen=True)
class Encoded:
    """What was read from a source before anything is decoded."""

    ids: list[str]
    labels: list[int]
    class_names: tuple[str, ...] | None  # None where labels are numbers
    read: Callable[[int], bytes]  # the encoded bytes of one image


@dataclass(frozen=True)
class ImageSet:
    """Decoded images in the order of their source."""

    source: str
    ids: list[str]
    pixels: np.ndarray  # [N, S, S, 3] uint8, perhaps memory-mapped
    labels: np.ndarray  # [N] int64
    class_names: tuple[str, ...] | None
    num_bad: int  # images that did not decode and were left out
    fingerprint: str  # of pixels, labels and ids

    @property
    def num_classes(self) -> int:
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1


def load_images(config: ImageDataConfig | ImageTaskConfig, size: int) -> ImageSet:
    """Read and decode every image of `config.source` for a model that sees `size` pixels a side.

    Raises:
        InputError: no such source, no images, labels that are none, repeated ids, or an image that does not decode
            (all of them are counted, the first are named) unless `bad_images` is "skip".
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise InputError("images need Pillow: pip install pillow") from error
    encoded = _part_of(_read_source(config), config)
    if not encoded.ids:
        raise InputError(f"{config.source} holds no images")
    if len(set(encoded.ids)) < len(encoded.ids):
        raise InputError(f"{config.source}: ids are repeated; give a field with unique ids")
    side = _stored_side(encoded, size, config.crop)
    pixels, bad = _decode_cached(config, encoded, side)
    if bad:
        first = ", ".join(encoded.ids[i] for i in bad[:_NUM_NAMED])
        message = f"{config.source}: {len(bad)} of {len(encoded.ids)} images do not decode, the first: {first}"
        if config.bad_images == "stop":
            raise InputError(f"{message}; mend or remove them, or set bad_images: skip")
        if len(bad) == len(encoded.ids):
            raise InputError(f"{message}; none is left")
        say(f"{message}; they are left out")
    good = np.setdiff1d(np.arange(len(encoded.ids)), bad)
    ids = [encoded.ids[i] for i in good]
    labels = np.asarray(encoded.labels, np.int64)[good]
    # Without this choice a memory-mapped array would be copied into memory.
    pixels = pixels if not bad else pixels[good]
    mark = fingerprint([pixels.data, labels.tobytes(),
                        json.dumps([ids, encoded.class_names]).encode()])  # fmt: skip
    return ImageSet(config.source, ids, pixels, labels, encoded.class_names, len(bad), mark)


def align_labels(images: ImageSet, class_names: tuple[str, ...] | None, num_classes: int) -> np.ndarray:
    """The labels of `images` as outputs of a head with these classes, `[N]` int64.

    Classes with names on both sides are matched by name; numbers are taken as they are.

    Raises:
        InputError: a class that the head does not have.
    """
    if images.class_names and class_names:
        unknown = [name for name in images.class_names if name not in class_names]
        if unknown:
            raise InputError(
                f"{images.source} has the class {unknown[0]!r}, which the model was not trained on; its classes are "
                f"{', '.join(class_names[:_NUM_NAMED])}{', ...' if len(class_names) > _NUM_NAMED else ''}"
            )
        return np.array([class_names.index(name) for name in images.class_names], np.int64)[images.labels]
    if images.class_names and len(images.class_names) != num_classes:
        raise InputError(
            f"{images.source} has {len(images.class_names)} classes by name, the model {num_classes} without names; "
            "give labels as numbers"
        )
    if bool(images.class_names) != bool(class_names):
        said = class_names or images.class_names
        say(
            f"{images.source} has classes by {'name' if images.class_names else 'number'}, the model by "
            f"{'name' if class_names else 'number'}: 0 is taken for {said[0]}, 1 for {said[min(1, len(said) - 1)]} and so on"
        )
    worst = int(images.labels.argmax())
    if images.labels[worst] >= num_classes:
        raise InputError(
            f"{images.source}: image {images.ids[worst]} has label {images.labels[worst]}, but the model has "
            f"{num_classes} classes, 0 to {num_classes - 1}"
        )
    return images.labels


def is_here(source: str) -> bool:
    """Whether a source is a folder or a Parquet file, and no hub id."""
    path = Path(source).expanduser()
    return path.is_dir() or path.suffix == ".parquet"


def _read_source(config) -> Encoded:
    path = Path(config.source).expanduser()
    if is_here(config.source):
        for name in ("split", "subset"):
            if getattr(config, name) is not None:
                raise InputError(
                    f"{name} {getattr(config, name)!r} is of a hub data set; {config.source} is here, and read as a whole"
                )
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".parquet":
        if not path.is_file():
            raise InputError(f"no such file: {path}")
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise InputError(f"{path} is not a Parquet file: {error}") from error
        return _read_columns(config, {name: table[name].to_pylist for name in table.column_names}, None)
    if is_local(config.source):
        raise InputError(f"{config.source} is neither a folder with a folder per class nor a .parquet file")
    return _read_hub(config)


def _part_of(encoded: Encoded, config) -> Encoded:
    """The images that `part`, `holdout` and `limit` leave, in their order; those of a folder's `limit` of all classes."""
    num_images = len(encoded.ids)
    # One permutation for both parts, so that they are disjoint and together everything.
    held_out = np.random.default_rng(0).permutation(num_images)[: round(config.holdout * num_images)]
    kept = np.arange(num_images)
    if config.part != "all":
        kept = np.sort(held_out) if config.part == "validation" else np.setdiff1d(kept, held_out)
    kept = kept.tolist()
    if config.limit is not None and Path(config.source).expanduser().is_dir():
        # One image of each class in turn: the first ones of the folders in order would be of one class.
        kept = _in_turn(kept, encoded.labels)
    kept = kept[: config.limit]
    return Encoded(
        [encoded.ids[i] for i in kept], [encoded.labels[i] for i in kept], encoded.class_names,
        lambda index: encoded.read(kept[index]),
    )  # fmt: skip


def _in_turn(indices: list[int], labels: list[int]) -> list[int]:
    """The first image of each class, then the second of each, and so on."""
    seen = Counter()
    ranked = []
    for index in indices:
        ranked.append((seen[labels[index]], index))
        seen[labels[index]] += 1
    return [index for _, index in sorted(ranked)]


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class names as the classes are numbered: numbers by value, so that 10 comes after 9, and others as text."""
    names = list(names)
    are_numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if are_numbers else 0, name)))


def _read_folder(path: Path) -> Encoded:
    """The images of a folder per class, class by class."""
    names = _in_order(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{path} has no folder per class, as in {path}/cat/1.jpg")
    if set(names) <= _SPLITS:
        raise InputError(
            f"{path} has a folder per split ({', '.join(names)}), not one per class; give one of them, as {path / names[-1]}"
        )
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(f for f in (path / name).rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())
        files += found
        labels += [label] * len(found)
    # A name that is no UTF-8 is no text that Parquet could hold.
    ids = [os.fsencode(file.relative_to(path).as_posix()).decode("utf-8", "backslashreplace") for file in files]
    return Encoded(ids, labels, names, lambda index: files[index].read_bytes())


def _read_hub(config) -> Encoded:
    import datasets

    split = config.split or ("train" if isinstance(config, ImageDataConfig) else "test")
    try:
        data = datasets.load_dataset(config.source, config.subset, split=split)
        if config.image_field in data.column_names:
            data = data.cast_column(config.image_field, datasets.Image(decode=False))
    except Exception as error:
        raise InputError(f"{config.source} (split {split}) cannot be read from the hub: {error}") from error
    feature = data.features.get(config.label_field)
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return _read_columns(config, {name: lambda name=name: data[name][:] for name in data.column_names}, names)


def _read_columns(config, columns: dict[str, Callable[[], list]], names: tuple[str, ...] | None) -> Encoded:
    wanted = [config.image_field, config.label_field, *([config.id_field] if config.id_field else [])]
    for name in wanted:
        if name not in columns:
            raise InputError(f"{config.source} has no column {name!r}; it has {', '.join(columns)}")
    images, labels = (columns[name]() for name in wanted[:2])
    ids = [str(i) for i in (columns[config.id_field]() if config.id_field else range(len(images)))]
    for id, label in zip(ids, labels, strict=True):
        if not isinstance(label, int | str) or (isinstance(label, int) and label < 0):
            raise InputError(f"{config.source}: image {id} has the label {label!r}; a class number or name is needed")
    if any(isinstance(image, str) for image in images):
        raise InputError(
            f"{config.source}: {config.image_field!r} holds text, not encoded bytes; put the files' content into the column, "
            "or give a folder with a folder per class"
        )
    if any(isinstance(label, str) for label in labels):
        names = _in_order({str(label) for label in labels})
        number = {name: index for index, name in enumerate(names)}
        labels = [number[str(label)] for label in labels]

    def read(index: int) -> bytes:
        image = images[index]
        # The hub's image feature is a mapping of bytes and path.
        if isinstance(image, dict):
            image = image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()
        return image

    return Encoded(ids, labels, names, read)


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


def _stored_side(encoded: Encoded, size: int, crop: float) -> int:
    sides = set()
    for index in range(len(encoded.ids)):
        try:
            sides.update(_open(encoded, index).size)
        except _DECODE_ERRORS:
            continue
        if len(sides) > 1 or crop != 1.0:
            return size
    return min([size, *sides])


def _decode_cached(config, encoded: Encoded, side: int) -> tuple[np.ndarray, list[int]]:
    """Pixels of all images and the indices of those that did not decode, whose pixels are 0."""
    shape = (len(encoded.ids), side, side, 3)
    if config.cache is None:
        pixels = np.zeros(shape, np.uint8)
        return pixels, _decode_into(pixels, encoded, config.crop)
    key = fingerprint(
        [json.dumps([shape, config.crop, _DECODING]).encode(), *map(_bytes_or_nothing(encoded), range(shape[0]))]
    )
    path = Path(config.cache).expanduser() / f"{key}.npy"
    bad_path = path.with_suffix(".json")
    # Runs that share a cache would write to one temporary file. The cache's directory may be locked by a run of its own.
    with exclusive_file(path, wait=True):
        if not (path.is_file() and bad_path.is_file()):
            require_disk_space(path, int(np.prod(shape)))
            with atomic_path(path) as temporary:
                pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
                bad = _decode_into(pixels, encoded, config.crop)
                pixels.flush()
                del pixels
            with atomic_path(bad_path) as temporary:
                temporary.write_text(json.dumps(bad))
    return np.load(path, mmap_mode="r"), json.loads(bad_path.read_text())


def _bytes_or_nothing(encoded: Encoded) -> Callable[[int], bytes]:
    def read(index: int) -> bytes:
        try:
            content = encoded.read(index)
        except _DECODE_ERRORS:
            return b""
        return content if isinstance(content, bytes) else b""

    return read


def _decode_into(pixels: np.ndarray, encoded: Encoded, crop: float) -> list[int]:
    bad = []
    for index in range(len(pixels)):
        try:
            pixels[index] = _square(_to_rgb(_open(encoded, index)), pixels.shape[1], crop)
        except _DECODE_ERRORS:
            bad.append(index)
    return bad


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
