"""What a model can do: perplexity of a text, loss and answers on questions, multiple choice, with standard errors.

Every metric is `Σ value / Σ weight` over items, and every item's value and weight are kept (`items.parquet`), so two
models are compared item by item.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from flow_finetune.batches import check_batch_tokens
from flow_finetune.choices import score_groups
from flow_finetune.compiled_layers import is_compiled
from flow_finetune.config import DataConfig, TaskConfig, choose
from flow_finetune.data import template_fingerprint
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import exponential, metric_record, require_unused, write_evaluation
from flow_finetune.finished_tasks import Finished, FinishedTasks
from flow_finetune.generate import compile_answer_pattern, extract_answer, generate_texts, same_answer
from flow_finetune.harness import run_harness
from flow_finetune.models import CausalLM, model_fingerprint, tokenizer_fingerprint
from flow_finetune.progress import say
from flow_finetune.shots import stop_texts
from flow_finetune.statistics import Items
from flow_finetune.tasks import Task, prepare


def evaluate(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskConfig],
    output: Path,
    *,
    batch_tokens: int = 4096,
    precision: str = "bf16",
    source: str = "",
    overwrite: bool = False,
    prepared: Sequence[Task] | None = None,
    summary: dict | None = None,
) -> dict:
    """Run every task in eval mode without gradients and write `evaluation.json`, the last file, into `output`.

    Args:
        tasks: what to measure; all are read before the first is run.
        output: directory for `evaluation.json`, `items.parquet` and, if answers were generated, `generations.jsonl`.
        batch_tokens: padded tokens of one forward pass.
        precision: "bf16" (autocast) or "full".
        source: where the model came from, for the record.
        overwrite: replace an evaluation that is already there.
        prepared: `tasks.prepare(tasks, tokenizer)`, where the caller has it already.
        summary: of the training that made the model, for a report of `output` alone.

    Tasks that a call before had finished, of the same model, items and settings, when it was killed or failed are not
    run again.

    Returns:
        The content of `evaluation.json`: for each task its metrics, each `{"value", "standard_error", "num_items"}`.

    Raises:
        InputError: a task that cannot be read, an output that holds an evaluation, or a model that gives NaN.
    """
    output = Path(output)
    require_unused(output, overwrite, source)
    if not tasks:
        raise InputError("there is nothing to evaluate: give at least one task")
    choose("precision", precision, ("bf16", "full"))
    check_batch_tokens(batch_tokens)
    prepared = prepare(tasks, tokenizer) if prepared is None else prepared
    lm.eval()
    for task in prepared:
        _check_lengths(lm, task)
        _say_another_template(task, tokenizer, summary)
    fingerprints = {"model": model_fingerprint(lm.model), "tokenizer": tokenizer_fingerprint(tokenizer)}
    settings = {"precision": precision, "compile": is_compiled(lm.model)}
    finished = FinishedTasks(output, {**fingerprints, **settings, "batch_tokens": batch_tokens})
    records, columns, generations = [], [], []
    for task in prepared:
        found = finished.read(task)
        if found is None:
            found = _measure(lm, tokenizer, task, batch_tokens, settings)
            finished.write(task, *found)
        record, items, generated = found
        records.append(record)
        columns += [(task.name, metric, i) for metric, i in items.items()]
        generations += generated
    result = write_evaluation(output, source, fingerprints, records, columns, generations, summary)
    finished.remove()
    return result


def _measure(lm: CausalLM, tokenizer, task: Task, batch_tokens: int, settings: dict) -> Finished:
    """Run one task: its record in `evaluation.json`, its items and what was generated for it."""
    start, generations = time.perf_counter(), []
    items = _RUN[task.config.kind](lm, tokenizer, task, batch_tokens, settings["precision"], generations)
    metrics = {name: metric_record(i) for name, i in items.items()}
    if task.config.kind == "perplexity":
        metrics["perplexity"] = exponential(metrics["nats_per_token"])
    record = {
        "name": task.name, "kind": task.config.kind, "role": task.config.role, "source": task.config.source,
        "num_items": task.num_items, "num_dropped": task.num_dropped, "num_truncated": task.num_truncated,
        "fingerprint": task.fingerprint(), "settings": {**settings, **task.settings()},
        "seconds": time.perf_counter() - start, "metrics": metrics,
    }  # fmt: skip
    return record, items, generations


def _check_lengths(lm: CausalLM, task: Task) -> None:
    """Raise `InputError` for texts beyond the model's positions now, and not when the tasks before have been run."""
    if task.samples:
        lm.check_length(max(len(s.input_ids) for s in task.samples), task.name)
    if task.answers:
        longest = max(s.start for s in task.samples[: len(task.answers)])
        lm.check_length(longest + task.config.max_new_tokens, f"answering {task.name}: a prompt with its answer")


def _say_another_template(task: Task, tokenizer, summary: dict | None) -> None:
    """Say where the target's questions are not asked as in the training that made the model."""
    trained = (summary or {}).get("fingerprints", {}).get("template")
    config = task.config
    if trained is None or (config.kind, config.role) != ("qa", "target") or config.num_shots:
        return
    template = config.template or DataConfig.template
    if template_fingerprint(DataConfig("", template=template, max_length=config.max_length), tokenizer) != trained:
        say(
            f"{task.name}: this model was trained with another template, max_length or end of a response than "
            f"{template!r} and {config.max_length}, with which it is measured here"
        )


def _run_perplexity(lm, tokenizer, task: Task, batch_tokens, precision, generations) -> dict[str, Items]:
    scores = score_groups(lm, task.groups(), tokenizer.pad_token_id, batch_tokens, precision, task.name)
    return {"nats_per_token": Items([s.id for s in task.samples], scores.loss_sum, scores.num_targets)}


def _run_completion(lm, tokenizer, task: Task, batch_tokens, precision, generations) -> dict[str, Items]:
    scores = score_groups(lm, task.groups(), tokenizer.pad_token_id, batch_tokens, precision, task.name)
    ids = [s.id for s in task.samples]
    num_bytes = np.asarray([len(s.response.encode()) for s in task.samples], np.float64)
    all_right = (scores.num_correct == scores.num_targets).astype(np.float64)
    return {
        "nats_per_token": Items(ids, scores.loss_sum, scores.num_targets),
        "nats_per_byte": Items(ids, scores.loss_sum, num_bytes),
        "accuracy": Items(ids, all_right, np.ones(len(ids))),
    }


def _run_qa(lm, tokenizer, task: Task, batch_tokens, precision, generations) -> dict[str, Items]:
    config = task.config
    pattern = compile_answer_pattern(config.answer_pattern, task.name)
    asked, expected = task.samples[: len(task.answers)], task.answers
    scores = score_groups(lm, task.groups(), tokenizer.pad_token_id, batch_tokens, precision, task.name)
    ids = [s.id for s in task.samples]
    items = {
        "nats_per_token": Items(ids, scores.loss_sum, scores.num_targets),
        "token_accuracy": Items(ids, scores.num_correct, scores.num_targets),
    }
    if not asked:
        return items
    texts = _answer(lm, tokenizer, task, asked, batch_tokens, precision)
    answers = [extract_answer(text, pattern, or_last_number=True) for text in texts]
    correct = [same_answer(a, e) for a, e in zip(answers, expected, strict=True)]
    items["exact_match"] = Items(ids[: len(asked)], np.asarray(correct, np.float64), np.ones(len(asked)))
    for s, text, answer, right, is_correct in zip(asked, texts, answers, expected, correct, strict=True):
        generations.append(
            {
                "task": task.name, "item": s.id, "prompt": s.prompt, "reference": s.response, "generated": text,
                "expected": right, "answer": answer, "correct": is_correct,
            }
        )  # fmt: skip
    return items


def _answer(lm, tokenizer, task: Task, samples, batch_tokens, precision) -> list[str]:
    return generate_texts(
        lm, tokenizer, [s.input_ids[: s.start] for s in samples], until=stop_texts(task.config),
        max_new_tokens=task.config.max_new_tokens, batch_tokens=batch_tokens, precision=precision,
        description=f"answering {task.name}",
    )  # fmt: skip


def _run_multiple_choice(lm, tokenizer, task: Task, batch_tokens, precision, generations) -> dict[str, Items]:
    scores = score_groups(lm, task.groups(), tokenizer.pad_token_id, batch_tokens, precision, task.name)
    correct = {"accuracy": [], "accuracy_bytes": []}
    first = 0
    for question in task.questions:
        num_bytes = np.asarray(question.num_bytes)
        log_likelihood = -scores.loss_sum[first : first + len(num_bytes)]
        correct["accuracy"].append(log_likelihood.argmax() == question.answer)
        correct["accuracy_bytes"].append((log_likelihood / num_bytes).argmax() == question.answer)
        first += len(num_bytes)
    ids = [q.id for q in task.questions]
    return {name: Items(ids, np.asarray(values, np.float64), np.ones(len(ids))) for name, values in correct.items()}


_RUN = {
    "perplexity": _run_perplexity, "qa": _run_qa, "multiple_choice": _run_multiple_choice,
    "completion": _run_completion, "lm_eval": run_harness,
}  # fmt: skip
