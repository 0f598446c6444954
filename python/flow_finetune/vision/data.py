"""Labelled images from folders, Parquet files or the hub: which there are, of which class, and how classes match."""

from __future__ import annotations

import json
import os
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
from flow_finetune.storage import fingerprint
from flow_finetune.vision.config import ImageDataConfig, ImageTaskConfig
from flow_finetune.vision.decoding import Encoded, decode_cached, stored_side

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
# Read where this Pillow can; one of before 11.3, for example, has no AVIF.
_MORE_SUFFIXES = {".jfif", ".jpe", ".jp2", ".avif"}
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
_NUM_NAMED = 5


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


def load_images(config: ImageDataConfig | ImageTaskConfig, size: int, crop: float = 1.0) -> ImageSet:
    """Read and decode every image of `config.source` for a model that sees `size` pixels a side.

    Args:
        crop: the share of the short side that is seen, where `config` gives none.

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
    crop = crop if config.crop is None else config.crop
    side = stored_side(encoded, size, crop)
    pixels, undecoded = decode_cached(encoded, side, crop, config.cache)
    if bad := undecoded.indices:
        first = ", ".join(encoded.ids[i] for i in bad[:_NUM_NAMED])
        message = f"{config.source}: {len(bad)} of {len(encoded.ids)} images do not decode, the first: {first}"
        if undecoded.reason:
            message += f"; why {encoded.ids[bad[0]]} does not: {undecoded.reason}"
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


def align_labels(
    images: ImageSet, class_names: tuple[str, ...] | None, num_classes: int, match: str = "name"
) -> np.ndarray:
    """The labels of `images` as outputs of a head with these classes, `[N]` int64.

    Classes with names on both sides are matched by name; numbers are taken as they are.

    Args:
        match: "number" for names on both sides that differ and stand in one order.

    Raises:
        InputError: a class that the head does not have, or of which it has several.
    """
    if images.class_names and class_names:
        if match == "name":
            return _by_name(images, class_names)
        if len(images.class_names) != len(class_names):
            raise InputError(
                f"{images.source} has {len(images.class_names)} classes, the model {len(class_names)}; match_classes: "
                "number is for as many in the same order"
            )
        return _by_number(images, class_names)
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


def _by_name(images: ImageSet, class_names: tuple[str, ...]) -> np.ndarray:
    names = images.class_names
    # transformers' ImageNet has "crane" twice, the bird and the machine.
    repeated = {name for name, count in Counter(class_names).items() if count > 1}
    number = {name: index for index, name in enumerate(class_names) if name not in repeated}
    unclear, unknown = ([name for name in names if name in these] for these in (repeated, {*names} - {*class_names}))
    if not unclear and not unknown:
        return np.array([number[name] for name in names], np.int64)[images.labels]
    same_count = len(names) == len(class_names)
    moved = [name for index, name in enumerate(names) if number.get(name, index) != index]
    if repeated and same_count and not moved:
        return _by_number(images, class_names, f"the model has several classes named {min(repeated)!r}; ")
    remedy = "rename the classes, or give labels as numbers of the model's classes"
    if same_count and not moved:
        remedy = f"where the order is the same, set match_classes: number (--match-classes number); else {remedy}"
    if unclear:
        places = " and ".join(str(index) for index, name in enumerate(class_names) if name == unclear[0])
        raise InputError(
            f"{images.source} has the class {unclear[0]!r}, and the model several of that name ({places}); {remedy}"
        )
    raise InputError(
        f"{images.source} has the class {unknown[0]!r}, which the model was not trained on; its classes are "
        f"{', '.join(class_names[:_NUM_NAMED])}{', ...' if len(class_names) > _NUM_NAMED else ''}; {remedy}"
    )


def _by_number(images: ImageSet, class_names: tuple[str, ...], why: str = "") -> np.ndarray:
    say(
        f"{why}the classes of {images.source} are matched by number: its {images.class_names[0]!r} is taken for "
        f"{class_names[0]!r}, its {images.class_names[-1]!r} for {class_names[-1]!r}"
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
    from PIL import Image

    suffixes = _SUFFIXES | (_MORE_SUFFIXES & Image.registered_extensions().keys())
    files, labels, others = [], [], Counter()
    for label, name in enumerate(names):
        found = []
        for file in (path / name).rglob("*"):
            if file.suffix.lower() in suffixes:
                found += [file] if file.is_file() else []
            elif not file.name.startswith(".") and file.is_file():
                others[file.suffix.lower() or "none"] += 1
        files += sorted(found)
        labels += [label] * len(found)
    if others:
        counts = ", ".join(f"{count:,} of {suffix}" for suffix, count in others.most_common(_NUM_NAMED))
        more = ", ..." if len(others) > _NUM_NAMED else ""
        say(f"{path}: files left out for their ending, which is no image's: {others.total():,} ({counts}{more})")
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
