"""What a transformers classifier wants to see, from the file of its image processor."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils import cached_file

from flow_finetune.errors import InputError


def processor_file(source: str, revision: str | None) -> dict:
    """The image processor's entries, of several processors' file first, as transformers looks for them; {} for none."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = cached_file(source, name, revision=revision, **options)
        found = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        found = found.get("image_processor", {}) if name == "processor_config.json" else found
        if found:
            return found
    return {}


def preprocessing(source: str, found: dict, config) -> tuple[int, tuple, tuple, bool]:
    """Size, mean and std in units of 0..255, and whether channels are BGR, of `processor_file`'s entries.

    (x * rescale_factor - image_mean) / image_std  =  (x - mean) / std
    """
    found = found or _of_timm(config)
    crop_size = found.get("crop_size") if found.get("do_center_crop") is not False else None
    size = crop_size or found.get("size") or getattr(config, "image_size", None)
    # Of models with several parts.
    size = size or getattr(getattr(config, "vision_config", None), "image_size", None) or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    size = size[-1] if isinstance(size, list | tuple) else size
    if found.get("rescale_offset"):
        raise InputError(f"the image processor of {source} sets rescale_offset, which is not done here")
    factor = found.get("rescale_factor") or 1 / 255 if found.get("do_rescale") is not False else 1.0
    normalizes = found.get("do_normalize")
    if normalizes is None:
        # MobileViT's processor, the one that flips channels, writes a mean that it has no use for.
        normalizes = not found or (bool(found.get("image_mean")) and not found.get("do_flip_channel_order"))
    mean = (found.get("image_mean") or (0.485, 0.456, 0.406)) if normalizes else (0.0,) * 3
    std = (found.get("image_std") or (0.229, 0.224, 0.225)) if normalizes else (1.0,) * 3
    if normalizes and found.get("include_top"):  # EfficientNet's: it divides once more
        std = tuple(v * v for v in std)
    mean, std = (tuple(round(v / factor, 10) for v in values) for values in (mean, std))
    return int(size), mean, std, bool(found.get("do_flip_channel_order"))


def _of_timm(config) -> dict:
    """What timm's models on the hub say in config.json in place of an image processor's file."""
    found = getattr(config, "pretrained_cfg", None)
    names = {"input_size": "size", "mean": "image_mean", "std": "image_std"}
    return {names[key]: found[key] for key in names if (found or {}).get(key)}


def _side(size):
    size = (size.get("shortest_edge") or size.get("height")) if isinstance(size, dict) else size
    return size[-1] if isinstance(size, list | tuple) and size else size


def share_seen(found: dict, holder: object = None) -> float:
    """The side of the central square that an image processor sees, as a share of the short side.

    Args:
        found: `processor_file`'s entries.
        holder: what has timm's `pretrained_cfg`, which says so of models without that file: a network or a config.
    """
    if not found:
        of_timm = getattr(holder, "pretrained_cfg", None) or {}
        return min(1.0, float(of_timm.get("crop_pct") or 1.0))
    short, side = _side(found.get("size")), _side(found.get("crop_size"))
    if found.get("crop_pct") and (short or 0) < 384:  # ConvNeXt's and ResNet's, which enlarge by it before they crop
        return float(found["crop_pct"])
    if found.get("do_center_crop") is False or not side or not isinstance(short, int):
        return 1.0
    return min(1.0, side / short)
