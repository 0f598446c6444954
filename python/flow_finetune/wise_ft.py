"""WiSE-FT: the average of a pre-trained and a fine-tuned model, `(1 - alpha) * pre-trained + alpha * fine-tuned`.

Files are read and written piece by piece: the output has the fine-tuned file's header, and each tensor's bytes are
replaced in place of its own, so memory holds a few pieces of at most `PIECE_BYTES`, whatever the size of the model.
Source: Robust fine-tuning of zero-shot models, arXiv 2109.01903.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from flow_finetune.config import MethodConfig
from flow_finetune.errors import InputError
from flow_finetune.progress import say
from flow_finetune.storage import (
    SUMMARY_FILE,
    atomic_path,
    describe_file,
    exclusive_file,
    is_described,
    is_used,
    require_disk_space,
    used_error,
    write_json,
)

# Far below the largest tensor of any model; large enough for the disk.
PIECE_BYTES = 2**22
# What transformers, and of images load_classifier, reads beside the weights; logs and evaluations of the fine-tuned model
# are not the average's.
_COPIED = ("config.json", "classifier.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
           "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template*", "preprocessor_config.json",
           "*.safetensors.index.json", "*.py")  # fmt: skip
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where a safetensors file keeps a tensor."""

    path: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    begin: int  # of its bytes in the file
    end: int


def check_alpha(alpha: float) -> None:
    """Raise `InputError` unless `alpha` is a share."""
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be in [0, 1], got {alpha}")


def wise_ft(pretrained: Path, finetuned: Path, alpha: float, output: Path, *, name: str = "", of: str = "") -> Path:
    """Write the average of two model directories to `output`, which transformers loads; returns `output`.

    The average is made in fp32 (fp64 for fp64 tensors) and stored in the fine-tuned tensor's dtype; alpha = 0 and 1 give
    the two models' own values. Tensors of integers, such as counters, are the fine-tuned model's. An `output` that holds this average
    already is left alone.

    Args:
        pretrained: directory with safetensors weights.
        finetuned: directory with safetensors weights of the same names and shapes, configuration and tokenizer.
        alpha: share of the fine-tuned weights, in [0, 1].
        output: a new or empty directory.
        name: of the row in a report; `output`'s name when empty.
        of: name of the method that gave `finetuned`; its directory's name when empty.

    Raises:
        InputError: alpha out of range, no safetensors weights, a tensor that one model lacks or that differs in shape
            (named), weights in 8 bits or fewer, `output` in use, or too small a disk.
    """
    check_alpha(alpha)
    ours, theirs = read_headers(pretrained), read_headers(finetuned)
    _require_same(ours, theirs, pretrained, finetuned)
    files = sorted({stored.path for stored in theirs.values()})
    sources = [*sorted({stored.path for stored in ours.values()}), *files]
    method = dataclasses.asdict(MethodConfig(name=name or output.name, of=of or finetuned.name, wise_ft=alpha))
    with exclusive_file(output, wait=True):
        if is_used(output):
            _require_this_average(output, method, sources)
            say(f"{output} holds this average already")
            return output
        require_disk_space(output, sum(path.stat().st_size for path in files))
        summary = {"method": method, "model": str(pretrained), "sources": [describe_file(path) for path in sources]}
        _write(ours, theirs, finetuned, alpha, output, summary)
    return output


def _require_this_average(output: Path, method: dict, sources: list[Path]) -> None:
    """Raise `InputError` unless `output` holds the average of these files by `method`, wherever they lay."""
    path = output / SUMMARY_FILE
    found = json.loads(path.read_text()) if path.is_file() else {}
    if "sources" not in found:
        raise used_error(output)
    stored = found["sources"]
    # Averages of before were known by the times of their sources.
    is_same = len(stored) == len(sources) and all(
        is_described(p, s) if isinstance(s, dict) else s == [p.name, p.stat().st_size, p.stat().st_mtime_ns]
        for p, s in zip(sources, stored, strict=True)
    )
    if not is_same or found["method"] != method:
        what = "other models" if not is_same else f"the method {found['method']['name']!r} with other options"
        raise InputError(
            f"{output} holds an average already, of {what}; remove it to average again, or choose another directory"
        )


def _write(ours: dict, theirs: dict, finetuned: Path, alpha: float, output: Path, summary: dict) -> None:
    """Write the average and what stands beside it, whole or not at all."""
    files = sorted({stored.path for stored in theirs.values()})
    with atomic_path(output) as temporary:
        temporary.mkdir()
        for path in files:
            _write_average(ours, theirs, path, temporary / path.name, alpha)
        for pattern in _COPIED:
            for path in finetuned.glob(pattern):
                shutil.copyfile(path, temporary / path.name)
        write_json(temporary / SUMMARY_FILE, summary)


def read_headers(directory: Path) -> dict[str, Stored]:
    """Where each tensor of a model directory's safetensors files is, by name."""
    files = _weight_files(directory)
    if not files:
        raise InputError(
            f"{directory} has no safetensors weights; give a model directory (train writes one, of images in "
            "DIR/model, and from a hub id or a .gguf file so does transformers' save_pretrained)"
        )
    found = {}
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise InputError(f"{path} is not a safetensors file")
            try:
                stored = _stored(json.loads(file.read(length)), path, 8 + length)
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise InputError(f"{path} is not a safetensors file: {type(error).__name__}: {error}") from error
        for name, tensor in stored.items():
            if tensor.end > size:
                raise InputError(f"{path} is cut off: {name} ends at byte {tensor.end} of {size}; copy it again")
        found |= stored
    return found


def _weight_files(directory: Path) -> list[Path]:
    """The files that transformers would load: others beside them may hold the weights again under other names."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"{index} does not say which files hold the weights: {type(error).__name__}: {error}"
        ) from error
    for name in names:
        if not (directory / name).is_file():
            raise InputError(f"{directory} lacks {name}, which {index.name} names; copy it again")
    return [directory / name for name in names]


def _stored(header: dict, path: Path, start: int) -> dict[str, Stored]:
    stored = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            stored[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), begin, end)
    return stored


def _require_same(ours: dict, theirs: dict, pretrained: Path, finetuned: Path) -> None:
    for name in sorted({*ours, *theirs}):
        for holder, directory in ((ours, pretrained), (theirs, finetuned)):
            if name not in holder:
                raise InputError(
                    f"{directory} lacks the tensor {name}, so the two models cannot be averaged; give two states of the "
                    "same model (a linear probe of tied embeddings has a head of its own), with the same names: a "
                    "download can be loaded and saved again with save_pretrained"
                )
        a, b = ours[name], theirs[name]
        if a.shape != b.shape:
            raise InputError(
                f"the tensor {name} has shape {a.shape} in {pretrained} and {b.shape} in {finetuned}; give two states "
                "of the same model"
            )
        for dtype, directory in ((a.dtype, pretrained), (b.dtype, finetuned)):
            packed = dtype in ("I8", "U8") and name.endswith("weight")
            if packed or (dtype.startswith("F") and dtype not in _DTYPES):
                raise InputError(
                    f"the tensor {name} of {directory} is {dtype}, quantised, and cannot be averaged; save the model in "
                    "bf16, fp16 or fp32"
                )
        if (a.dtype in _DTYPES) != (b.dtype in _DTYPES):
            raise InputError(f"the tensor {name} is {a.dtype} in {pretrained} and {b.dtype} in {finetuned}")


def _write_average(ours: dict, theirs: dict, source: Path, target: Path, alpha: float) -> None:
    """The file `source` of the fine-tuned model with every tensor averaged."""
    stored = sorted((s.begin, name) for name, s in theirs.items() if s.path == source)
    with open(source, "rb") as file, open(target, "wb") as out:
        shutil.copyfileobj(_Limited(file, stored[0][0] if stored else source.stat().st_size), out)
        for _, name in stored:
            a, b = ours[name], theirs[name]
            if b.dtype not in _DTYPES:
                file.seek(b.begin)
                shutil.copyfileobj(_Limited(file, b.end - b.begin), out)
                continue
            with open(a.path, "rb") as other:
                num = PIECE_BYTES // 8  # elements, the same for every dtype
                for start in range(0, math.prod(b.shape), num):
                    out.write(_average(_piece(other, a, start, num), _piece(file, b, start, num), alpha))


def _average(pretrained: torch.Tensor, finetuned: torch.Tensor, alpha: float) -> memoryview:
    """The bytes of the average; the arguments may be overwritten."""
    if alpha in (0, 1):
        # 0 times infinity is NaN.
        return (finetuned if alpha == 1 else pretrained.to(finetuned.dtype)).view(torch.uint8).numpy().data
    wide = torch.promote_types(torch.promote_types(pretrained.dtype, finetuned.dtype), torch.float32)
    average = pretrained.to(wide).mul_(1 - alpha).add_(finetuned.to(wide).mul_(alpha))
    return average.to(finetuned.dtype).view(torch.uint8).numpy().data


def _piece(file: BinaryIO, stored: Stored, start: int, num: int) -> torch.Tensor:
    """Elements `start` to `start + num` of a flat tensor, or up to its end, from an open file, in new memory."""
    dtype = _DTYPES[stored.dtype]
    begin = stored.begin + start * dtype.itemsize
    data = np.empty(min(num * dtype.itemsize, stored.end - begin), dtype=np.uint8)
    file.seek(begin)
    file.readinto(data)
    return torch.from_numpy(data).view(dtype)


class _Limited:
    """The next `length` bytes of a file, for `shutil.copyfileobj`."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._left = file, length

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data
