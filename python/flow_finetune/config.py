"""What a run is made of, as plain dataclasses, read strictly from a mapping."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from flow_finetune.errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and in which precision it is held and run."""

    source: str  # hub id, local directory or .gguf file
    revision: str | None = None
    dtype: str = "float32"  # of the parameters
    precision: str = "bf16"  # "bf16": matrix products under bf16 autocast; "full": in the parameters' dtype
    device: str = "auto"  # "auto": cuda, then cpu
    backend: str = "auto"  # of flow_kernels
    trust_remote_code: bool = False
    compile: bool = False  # torch.compile of each layer: on 2 Xeon cores steps of Gemma 3 270M take 0.85 of the time
    packing: bool = True  # texts behind each other without padding, on a CPU, where the model can (packing.py)


@dataclass(frozen=True)
class DataConfig:
    """Which samples, and how a sample becomes tokens."""

    source: str  # local .jsonl, .json, .csv, .parquet (each also .gz where the format allows) or hub id
    split: str = "train"  # or a slice of one, as in "train[:700]"
    prompt_field: str = "prompt"
    response_field: str = "response"
    id_field: str | None = None  # row numbers when not given
    template: str = "alpaca"  # "alpaca", "chat" or a text that contains {prompt}
    max_length: int = 1024
    limit: int | None = None  # the first so many rows
    subset: str | None = None  # of a hub data set that has several
    choices_field: str | None = None  # a list of texts, of which response_field holds the index of the response


# What the parts of a method's name stand for, by the question that each answers; a question is answered once.
METHOD_PARTS = {
    "how samples are weighted": {
        "standard": {"weights": "none"},
        "flow": {"weights": "sequence"},
        "flow-token": {"weights": "token"},
        "flow-mean": {"weights": "sequence", "normalize": "mean"},
        "flow-online": {"weights": "sequence", "online": True},
        "dro": {"weights": "sequence", "direction": "hard"},
    },
    "which samples are kept": {"easiest": {"keep_easiest": 0.5}},
    "what is trained": {"lora": {"train": "lora"}, "linear-probe": {"train": "head"}},
    "what is penalised": {"l2": {"penalty": "l2"}, "l1": {"penalty": "l1"}},
    "what is averaged": {"sfa": {"average_every": 0.25}},
}
METHOD_NAMES = tuple(part for parts in METHOD_PARTS.values() for part in parts)


def named_options(name: str) -> dict | None:
    """The entries of `MethodConfig` that a name, or several joined by "+", stands for; None for a name of one's own.

    Raises:
        InputError: two parts that answer the same question.
    """
    options, answered = {"weights": "none"}, {}
    for part in name.split("+"):
        question = next((q for q, names in METHOD_PARTS.items() if part in names), None)
        if question is None:
            return None
        if question in answered:
            raise InputError(f"method {name}: {answered[question]} and {part} both say {question}; choose one")
        answered[question] = part
        options.update(METHOD_PARTS[question][part])
    return options


@dataclass(frozen=True)
class MethodConfig:
    """What a fine-tuning method weights, trains, penalises and averages; `methods.check_method` says what contradicts.

    Read from a file, a name of `METHOD_PARTS` brings its options along.
    """

    name: str = "flow"
    weights: str = "sequence"  # "none" (standard fine-tuning), "sequence" or "token"
    direction: str = "easy"  # "easy": exp(-f/tau), FLOW; "hard": exp(+f/tau), DRO
    temperature: float | None = None  # nats; the quantile of the losses when not given
    quantile: float = 0.5
    clip_low: float | None = None
    clip_high: float | None = None
    # "none" or "mean". flow_weights' "simplex" has the ratios of "mean" at 1/N of the scale, which for many samples is
    # below AdamW's epsilon: by its update alone, 10 steps of one gradient of norm 1 over 268 million parameters move
    # 1.00 learning rates a step at weights of mean 1, 0.45 at N = 7,473 and 0.015 at N = 395,000.
    normalize: str = "none"
    keep_easiest: float | None = None  # share in (0, 1] of what is weighted; the others get weight 0
    online: bool = False  # weights from a forward pass of the frozen model on the batch being trained
    online_copy: str = "same"  # the frozen model's copy, without LoRA: "same" dtype as the model, or "bfloat16"
    train: str = "all"  # "all", "head" (linear probe) or "lora"
    lora_rank: int = 64
    lora_alpha: int = 64  # LoRA on all linear layers but the head, merged when saved
    penalty: str = "none"  # "none", "l2" or "l1" towards the pre-trained weights
    penalty_strength: float = 1e-3  # lambda of lambda * sum / number of trained parameters
    penalty_copy: str = "bfloat16"  # the pre-trained weights' one copy: "bfloat16", "float32" or "disk" (unrounded)
    average_every: float | None = None  # SFA: share of all steps after which weights are averaged; 0.25 in the paper
    average_share: float = 0.5  # SFA: beta of beta * pre-trained + (1 - beta) * trained, as in arXiv 2501.05559
    of: str | None = None  # WiSE-FT: the method of the same run whose result is averaged; nothing is trained
    wise_ft: float | None = None  # alpha of (1 - alpha) * pre-trained + alpha * fine-tuned
    learning_rate: float | None = None  # the training's when not given

    @staticmethod
    def complete(entries: dict, where: str) -> dict:
        """What a file gives for a method, with what its name stands for where the file says nothing.

        Raises:
            InputError: a name that stands for nothing, with no options that would say what is meant.
        """
        name = entries.get("name")
        if not isinstance(name, str) or "of" in entries:
            return entries
        try:
            options = named_options(name)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if options is None and not entries.keys() - {"name", "learning_rate"}:
            raise InputError(
                f"{where}: the name {name!r} stands for no method; join names of {', '.join(METHOD_NAMES)} by +, or say "
                "what it does, as in weights: sequence"
            )
        return {**(options or {}), **entries}


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation, the same for every method unless a method says otherwise."""

    epochs: int = 2
    batch_size: int = 16  # samples of one optimiser step, over all processes
    micro_batch_tokens: int = 4096  # padded tokens of one forward pass
    learning_rate: float = 1e-5
    warmup: float = 0.03  # share of all steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0 for no clipping
    seed: int = 0
    checkpoint_every: int = 0  # optimiser steps; 0 for none
    log_every: int = 1
    gradient_checkpointing: bool = False
    track_distance: bool = (
        True  # distance from the pre-trained weights; keeps a copy of them, unless the method has one (a GPU: 20 times)
    )
    grad_filter_eps: float = 0.0  # of flow_kernels.linear_cross_entropy: faster backward passes on a CPU; 0 is exact


@dataclass(frozen=True)
class TaskConfig:
    """One evaluation."""

    kind: str  # "perplexity", "qa", "multiple_choice", "completion" or "lm_eval"
    source: str = ""  # a file, or the name of an lm_eval task
    name: str | None = None  # the file's stem when not given
    role: str = "retained"  # "retained" or "target", for the report
    limit: int | None = None
    window: int = 256  # perplexity: tokens of a window, its BOS included
    split: str = "train"  # or a slice of one, as in "train[700:]"
    subset: str | None = None  # of a hub data set that has several
    prompt_field: str = "prompt"
    response_field: str = "response"
    choices_field: str | None = None  # as in DataConfig
    template: str | None = None  # "alpaca" for qa, "Question: {prompt}\nAnswer:" with shots, "{prompt}" for completion
    max_length: int = 1024
    max_new_tokens: int = 256  # qa: of a generated answer
    num_generate: int | None = None  # qa: how many items are answered in full; all when not given, 0 for none
    answer_pattern: str = r"####\s*([-+]?[\d.,]*\d)"  # qa: the last match's first group is the answer
    num_shots: int | None = None  # qa, multiple_choice: solved items in front of each; lm_eval: the task's own number
    shots_source: str | None = None  # qa, multiple_choice: the file that they are read from, its first ones
    include_path: str | None = None  # lm_eval: a directory with YAML tasks of your own
    run_model_code: bool = False  # lm_eval: tasks that run what the model writes (MBPP, HumanEval), outside any sandbox


@dataclass(frozen=True)
class RunConfig:
    """The whole path: score, train with each method, evaluate, report."""

    model: ModelConfig
    data: DataConfig
    methods: tuple[MethodConfig, ...] = (
        MethodConfig(name="standard", weights="none"),
        MethodConfig(name="flow"),
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    tasks: tuple[TaskConfig, ...] = ()
    batch_tokens: int = 4096  # padded tokens of one forward pass when scoring and evaluating


def read_yaml(path: Path) -> dict:
    """The mapping that a YAML file holds."""
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    mapping = parse_yaml(text, str(path))
    if not isinstance(mapping, dict):
        raise InputError(f"{path} must hold a mapping, got {type(mapping).__name__}")
    return mapping


def parse_yaml(text: str, where: str) -> object:
    """What a YAML text holds; an entry that is given twice is an `InputError`, where YAML's own loader takes the last."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not valid YAML: {error}") from error


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        # Merged entries (<<) are defaults, which may be given again; they are no keys of their own here.
        keys = [self.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found {key!r} twice; leave one of them out", node.start_mark
                )
        return super().construct_mapping(node, deep)


def from_mapping(cls: type, value: object, where: str) -> object:
    """Build the dataclass `cls` from nested mappings; `where` names the place in messages."""
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a mapping, got {type(value).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it may hold {', '.join(fields)}"
            raise InputError(f"{where} has an unknown key {key!r}{hint}")
    if hasattr(cls, "complete"):
        value = cls.complete(value, where)
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for name, f in fields.items():
        if (f.default, f.default_factory) == required and name not in value:
            raise InputError(f"{where} lacks {name!r}")
    return cls(**{key: _convert(hints[key], item, f"{where}: {key}") for key, item in value.items()})


def _convert(hint: object, value: object, where: str) -> object:
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} must be a list, got {type(value).__name__}")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, int | str) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-5 as text.
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join("nothing" if t is type(None) else t.__name__ for t in allowed)
        raise InputError(f"{where} must be {names}, got {value!r}")
    return value


def non_defaults(config: object) -> dict:
    """The entries of a dataclass that are not its defaults, nested, as JSON holds them.

    This is what a directory stores as its identity: a later option, left at its default, does not disown it.
    """
    return without_defaults(type(config), json.loads(json.dumps(dataclasses.asdict(config))))


def without_defaults(cls: type, mapping: dict) -> dict:
    """`mapping`, which JSON made of the dataclass `cls`, without the entries that equal the defaults; others stay."""
    hints = typing.get_type_hints(cls)
    kept = {}
    for name, value in mapping.items():
        reduced = _reduce(hints.get(name), value)
        if name not in hints or reduced != _reduced_default(cls, name, hints[name]):
            kept[name] = reduced
    return kept


def _reduce(hint: object, value: object) -> object:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return without_defaults(hint, value)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return [_reduce(typing.get_args(hint)[0], item) for item in value]
    return value


def _reduced_default(cls: type, name: str, hint: object) -> object:
    """The default of an entry in the form of `_reduce`; `MISSING` for a required one, which nothing equals."""
    entry = next(f for f in dataclasses.fields(cls) if f.name == name)
    default = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
    if default is dataclasses.MISSING:
        return default
    return _reduce(hint, json.loads(json.dumps(default, default=dataclasses.asdict)))


def choose(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return `value` if it is allowed, else raise an `InputError` that lists what is."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value
