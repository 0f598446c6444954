"""The pre-trained model's losses: made once, kept as Parquet, checked before they are used.

A score file holds one row per sample, keyed by sample id, and in its metadata the fingerprints of the model,
tokenizer, template and data it was made from. While it is being made, every finished batch is a line of a journal
beside it; a killed run loses the batch in flight, and its continuation ends with the same bytes as an undisturbed run,
as do several processes that share the batches.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

import flow_kernels
from flow_finetune.batches import check_batch_tokens, token_batches
from flow_finetune.config import ModelConfig
from flow_finetune.data import Batch, SampleSet, collate
from flow_finetune.errors import InputError
from flow_finetune.journal import Journal, header_differences
from flow_finetune.models import CausalLM, autocast, model_fingerprint, tokenizer_fingerprint
from flow_finetune.packing import packs_texts
from flow_finetune.processes import Processes
from flow_finetune.progress import say, track
from flow_finetune.storage import atomic_path, disk_space_errors, exclusive_file

METADATA_KEY = b"flow_finetune"
NUM_EXTREMES = 5
# A model that gives NaN for this many samples will not recover; the rest of the data is not worth the time.
_MAX_NON_FINITE = 20


@dataclass(frozen=True)
class Scores:
    """Losses in the order of the samples they are for."""

    loss: torch.Tensor  # [S] fp64, nats per target token
    token_losses: list[np.ndarray] | None  # fp32, one array of num_targets entries per sample
    metadata: dict


def scoring_fingerprints(lm: CausalLM, tokenizer: PreTrainedTokenizerBase, samples: SampleSet) -> dict[str, str]:
    """What losses depend on, and what a score file must agree in with the training that uses it."""
    return {
        "model": model_fingerprint(lm.model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **samples.fingerprints,
    }


def score_header(
    lm: CausalLM, tokenizer: PreTrainedTokenizerBase, samples: SampleSet, model_config: ModelConfig, batch_tokens: int,
    tokens: bool,
) -> dict:  # fmt: skip
    """What a score file says of itself; another header, another file."""
    return {
        "fingerprints": scoring_fingerprints(lm, tokenizer, samples),
        "settings": {
            "dtype": model_config.dtype, "precision": model_config.precision, "backend": model_config.backend,
            "batch_tokens": batch_tokens, "tokens": tokens, **({"compile": True} if model_config.compile else {}),
            **({} if model_config.packing else {"packing": False}),
        },
    }  # fmt: skip


def score(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    samples: SampleSet,
    path: Path,
    *,
    model_config: ModelConfig,
    batch_tokens: int = 4096,
    tokens: bool = False,
    overwrite: bool = False,
) -> float:
    """Score every sample in eval mode without gradients and write `path`; returns tokens per second (0 if complete).

    The processes of a launch share the batches; they must see one file system.

    Raises:
        InputError: `path` or its journal belongs to other scores, a loss is NaN or infinite (ids listed), or the disk
            is full.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a file for the scores, for example {path / 'scores.parquet'}")
    check_batch_tokens(batch_tokens)
    lm.check_length(max(len(s.input_ids) for s in samples.samples), "a sample")
    header = score_header(lm, tokenizer, samples, model_config, batch_tokens, tokens)
    processes = Processes(lm.head.weight.device)
    with _alone(path, processes):
        return _score(lm, tokenizer, samples, path, header, processes, model_config, batch_tokens, tokens, overwrite)


@contextmanager
def _alone(path: Path, processes: Processes) -> Iterator[None]:
    """Keep other calls from scoring into `path`: the main process does, for all of a launch."""
    with ExitStack() as stack:
        refused = None
        if processes.is_main:
            try:
                stack.enter_context(exclusive_file(path))
            except InputError as error:
                refused = str(error)
        if refused := processes.agree(refused):
            raise InputError(refused)
        yield


def _score(
    lm, tokenizer, samples: SampleSet, path: Path, header: dict, processes: Processes, model_config: ModelConfig,
    batch_tokens: int, tokens: bool, overwrite: bool,
) -> float:  # fmt: skip
    """`score`, with nobody else at it."""
    if path.exists() and not overwrite:
        differences = header_differences(read_metadata(path), header)
        if not differences:
            return 0.0
        raise InputError(f"{path} holds other scores ({differences}); choose another file or pass --overwrite")
    journal = Journal(path, header, overwrite, processes)
    batches = token_batches([len(s.input_ids) for s in samples.samples], batch_tokens, packed=packs_texts(lm))
    # The batches of a call before may have been others: whether texts are packed is the machine's and the model's answer.
    wanted = {tuple(indices) for indices in batches}
    # Of the main process, before any goes on: all must share out the same batches.
    found = _records_of(wanted, journal) if processes.is_main else []
    done, bad = processes.agree(({tuple(record["samples"]) for record in found}, _non_finite(found, samples)))
    if done:
        say(f"continuing after {len(done)} of {len(batches)} batches of {journal.path}")
    # Batches next to each other are of like length, so that every process has as much to do.
    own = [indices for indices in batches if tuple(indices) not in done][processes.index :: processes.number]
    with track("scoring", len(done) + len(own), visible=processes.is_main) as tracker, disk_space_errors(journal.path):
        tracker.advance(len(done))
        for indices in own:
            batch = collate([samples.samples[i] for i in indices], tokenizer.pad_token_id)
            record = _score_batch(lm, batch, indices, model_config.precision, tokens)
            journal.append(record)
            tracker.advance(1, tokens=int(batch.attention_mask.sum()))
            bad += _non_finite([record], samples)
            # Others would wait for a process that is done early, and time out.
            if len(bad) > _MAX_NON_FINITE and processes.number == 1:
                break
        rate = tracker.tokens_per_second
    processes.agree(None)  # all have written what they have done
    records = _records_of(wanted, journal) if processes.is_main else []
    missing = wanted - {tuple(record["samples"]) for record in records}
    bad, num_missing = processes.agree((_non_finite(records, samples), len(missing)))
    if num_missing and not bad:
        raise InputError(
            f"{num_missing} of {len(batches)} batches are not in {journal.path} and those beside it: the processes of a "
            "launch must see one file system; make the call again, on one machine or with a directory that all share"
        )
    if processes.is_main:
        if not bad:
            with atomic_path(path) as temporary:
                pq.write_table(_table(records, samples, header, tokens), temporary, compression="zstd")
        journal.remove()
    processes.agree(None)
    if bad:
        raise InputError(
            f"the loss of {len(bad)} samples is NaN or infinite, with ids {', '.join(bad[:_MAX_NON_FINITE])}; remove "
            "them, or score in higher precision (--precision full, --dtype float32)"
        )
    return rate * processes.number


def _records_of(wanted: set[tuple[int, ...]], journal: Journal) -> list[dict]:
    return [record for record in journal.read() if tuple(record["samples"]) in wanted]


@torch.no_grad()
def _score_batch(lm: CausalLM, batch: Batch, indices: list[int], precision: str, tokens: bool) -> dict:
    device = lm.head.weight.device
    batch = batch.to(device)
    lm.eval()
    with autocast(device, precision):
        token_scores = lm.score(batch)
    # fp64 sums: the only rounding of a sample's loss is that of its token losses.
    wide = token_scores._replace(loss=token_scores.loss.double())
    sums = flow_kernels.sum_samples(wide, batch.target, batch.cu_seqlens)
    record = {"samples": indices, "loss_sum": sums.loss_sum.tolist(), "num_correct": sums.num_correct.tolist()}
    if tokens:
        values = token_scores.loss.float().cpu().numpy().astype("<f4")
        record["token_losses"] = base64.b64encode(values.tobytes()).decode()
    return record


def _non_finite(records: list[dict], samples: SampleSet) -> list[str]:
    """Ids of the samples whose loss is NaN or infinite."""
    return [
        samples.samples[i].id
        for record in records
        for i, loss in zip(record["samples"], record["loss_sum"], strict=True)
        if not math.isfinite(loss)
    ]


def _table(records: list[dict], samples: SampleSet, header: dict, tokens: bool) -> pa.Table:
    num_samples = len(samples.samples)
    loss_sum, num_correct = np.empty(num_samples), np.empty(num_samples, dtype=np.int32)
    token_losses: list[np.ndarray | None] = [None] * num_samples
    for record in records:
        loss_sum[record["samples"]] = record["loss_sum"]
        num_correct[record["samples"]] = record["num_correct"]
        if tokens:
            values = np.frombuffer(base64.b64decode(record["token_losses"]), dtype="<f4")
            ends = np.cumsum([samples.samples[i].num_targets for i in record["samples"]])
            for i, part in zip(record["samples"], np.split(values, ends[:-1]), strict=True):
                token_losses[i] = part
    num_targets = np.array([s.num_targets for s in samples.samples], dtype=np.int32)
    loss = loss_sum / num_targets
    columns = {
        "id": pa.array([s.id for s in samples.samples]),
        "loss_sum": pa.array(loss_sum),
        "num_targets": pa.array(num_targets),
        "num_correct": pa.array(num_correct),
        "loss": pa.array(loss),
        "truncated": pa.array([s.truncated for s in samples.samples]),
    }
    if tokens:
        columns["token_losses"] = pa.array(token_losses, type=pa.list_(pa.float32()))
    metadata = {
        **header,
        "num_read": samples.num_read,
        "dropped": samples.dropped,
        "num_truncated": samples.num_truncated,
        "temperature": float(np.median(loss)),
        "extremes": _extremes(loss, samples),
    }
    table = pa.table(columns)
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})


def _extremes(loss: np.ndarray, samples: SampleSet) -> dict[str, list[dict]]:
    """The easiest and hardest samples as text, so that a report needs no second look at the data."""
    order = np.argsort(loss, kind="stable")

    def describe(indices):
        return [
            {"id": s.id, "loss": float(loss[i]), "prompt": s.prompt, "response": s.response}
            for i, s in ((i, samples.samples[i]) for i in indices)
        ]

    return {"easiest": describe(order[:NUM_EXTREMES]), "hardest": describe(order[::-1][:NUM_EXTREMES])}


def read_metadata(path: Path) -> dict:
    """The metadata of a score file."""
    if not path.is_file():
        raise InputError(f"no such file: {path}; make it with flow-finetune score")
    try:
        metadata = (pq.read_schema(path).metadata or {}).get(METADATA_KEY)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {error}; make it with flow-finetune score") from error
    if metadata is None:
        raise InputError(f"{path} was not written by flow-finetune score; make it with that")
    return json.loads(metadata)


def read_scores(path: Path, samples: SampleSet, fingerprints: dict[str, str], *, tokens: bool = False) -> Scores:
    """The losses of `samples`, in their order.

    Raises:
        InputError: ids missing or repeated, scores made from another model, tokenizer, template or data (it says
            which), or no token losses where `tokens` asks for them.
    """
    metadata = read_metadata(path)
    table = pq.read_table(path)
    ids = table.column("id").to_pylist()
    repeated = [value for value, count in Counter(ids).items() if count > 1]
    if repeated:
        raise InputError(f"{path} has {len(repeated)} repeated ids, the first is {repeated[0]!r}; score again")
    differences = header_differences({"fingerprints": metadata["fingerprints"]}, {"fingerprints": fingerprints})
    if differences:
        if "settings" not in metadata:
            raise InputError(f"{path} has the scores of images; score this data with flow-finetune score")
        raise InputError(
            f"{path} does not belong to this training: {differences}; score again with this model (its dtype counts: "
            f"scored in {metadata['settings']['dtype']}), tokenizer, template and data"
        )
    row_of = {value: row for row, value in enumerate(ids)}
    missing = [s.id for s in samples.samples if s.id not in row_of]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of {len(samples.samples)} ids, the first is {missing[0]!r}; score again"
        )
    rows = [row_of[s.id] for s in samples.samples]
    token_losses = None
    if tokens:
        if "token_losses" not in table.column_names:
            raise InputError(f"{path} has no token losses, which token weights need; score again with --tokens")
        column = table.column("token_losses").combine_chunks()
        values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        token_losses = [values[offsets[row] : offsets[row + 1]] for row in rows]
    loss = torch.from_numpy(table.column("loss").to_numpy().copy())[rows]
    return Scores(loss, token_losses, metadata)


def describe_weights(path: Path) -> str:
    """What FLOW would make of the losses of a score file, in one line: where nearly all weigh the same, no difference."""
    loss = torch.from_numpy(pq.read_table(path, columns=["loss"]).column("loss").to_numpy().copy())
    try:
        weights = flow_kernels.flow_weights(loss, read_metadata(path)["temperature"])
    except ValueError as error:
        return str(error)
    size = float(flow_kernels.effective_sample_size(weights))
    return f"exp(-loss / median): mean weight {float(weights.mean()):.3f}, effective sample size {size:,.1f} of {len(loss):,}"
