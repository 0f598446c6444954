"""A causal language model from a hub id, a directory or a GGUF file, taken apart into body and head.

The head (the `[V, D]` matrix that makes logits) is what the fused loss replaces, so the body is run alone and the
head's weights are handed to `flow_kernels`. `CausalLM` checks once that body, head and soft-cap together give the
logits of the model itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import flow_kernels
from flow_finetune.compiled_layers import check_compiler, compile_layers
from flow_finetune.config import ModelConfig, choose
from flow_finetune.data import Batch
from flow_finetune.errors import InputError
from flow_finetune.modes import evaluating
from flow_finetune.packing import pack, packs_texts
from flow_finetune.storage import atomic_path, fingerprint
from flow_finetune.tied import embed, tied_embedding
from flow_finetune.trials import sees_padding
from flow_kernels import backends

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Where a model came from and how its file was packed; none of it changes a loss.
_CONFIG_PROVENANCE = ("_name_or_path", "_model_name_or_path", "transformers_version", "quantization_config",
                      "architectures", "dtype", "torch_dtype", "use_cache")  # fmt: skip


# What configurations call the soft-cap of the logits (Gemma, RecurrentGemma, xLSTM) and their factor (Cohere, Falcon-H1).
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_LOGIT_SCALES = ("logit_scale", "lm_head_multiplier")


def _first_of(config: object, names: tuple[str, ...]) -> float | None:
    """The first of these entries that a configuration has and that is not 0."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


class CausalLM(nn.Module):
    """A language model whose loss is computed inside `forward`, where DDP and FSDP expect it.

    Calling it with a batch, one weight per sample or per target token, and the target count of the whole step gives
    `sum(weight * nll) / normalizer`.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "auto") -> None:
        super().__init__()
        self.model = model
        self.backend = backend
        self.grad_filter_eps = 0.0  # training sets it
        self.packing = False  # load_model sets it: a model of someone else's keeps its attention
        self.shares_tied_gradient = False  # training sets it; a wrapper that shards the matrix could not
        _ = self.head  # one that the fused loss cannot read is refused now
        if model.base_model is model:
            raise InputError(f"{type(model).__name__} has no body of its own to make hidden states with (base_model)")
        text_config = model.config.get_text_config()
        self.softcap = _first_of(text_config, _SOFTCAPS)
        # Granite divides its logits.
        self.logit_scale = _first_of(text_config, _LOGIT_SCALES) or 1 / (
            _first_of(text_config, ("logits_scaling",)) or 1
        )

    @property
    def head(self) -> nn.Linear:
        """The linear layer that makes logits; anything else there, such as an adapter's wrapper, is an `InputError`."""
        head = self.model.get_output_embeddings()
        head = getattr(head, "_orig_mod", head)  # of accelerate's regional compilation
        if type(head) is not nn.Linear:
            raise InputError(
                f"{type(self.model).__name__} has a head of type {type(head).__name__}; the fused loss reads the weight "
                "of a plain torch.nn.Linear, so merge or remove the adapter or quantisation on the head (and leave it out "
                "of peft's modules_to_save)"
            )
        return head

    def target_hidden(self, batch: Batch, **context) -> Tensor:
        """Hidden states `[R, D]` of the positions that predict a target token; the others never reach the head.

        `context` goes to the body: a cache of what stands before the batch, with its attention mask and positions; or
        embeddings in place of the tokens.
        """
        if not context:
            batch = self.arranged(batch)
        options = {"input_ids": batch.input_ids, "use_cache": False, **context}
        if batch.position_ids is not None:
            options |= {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        # A text is followed by its padding, which none of its tokens sees in a causal model, and attention without a mask
        # is faster. What continues a cache, whose texts are padded in front, brings its own.
        elif "attention_mask" not in context and sees_padding(self):
            options["attention_mask"] = batch.attention_mask
        hidden = self.model.base_model(**options).last_hidden_state
        return self.head_input(hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.positions))

    def arranged(self, batch: Batch) -> Batch:
        """The batch as the body runs it: packed where that is possible."""
        return pack(batch) if batch.position_ids is None and packs_texts(self) else batch

    def head_input(self, hidden: Tensor) -> Tensor:
        """Hidden states whose product with the head is scaled as the model scales its logits."""
        return hidden if self.logit_scale == 1 else hidden * self.logit_scale

    def forward(self, batch: Batch, weight: Tensor, normalizer: float | Tensor) -> Tensor:
        batch, matrix, tokens = self.arranged(batch), self.head.weight, {}
        embedding = tied_embedding(self) if self.shares_tied_gradient else None
        if embedding is not None:
            embedded, matrix = embed(embedding, batch.input_ids)
            tokens = {"input_ids": None, "inputs_embeds": embedded}
        return flow_kernels.linear_cross_entropy(
            self.target_hidden(batch, **tokens), matrix, batch.target, linear_bias=self.head.bias,
            sample_weight=weight, cu_seqlens=batch.cu_seqlens, normalizer=normalizer, softcap=self.softcap,
            grad_filter_eps=self.grad_filter_eps, backend=self.backend,
        )  # fmt: skip

    @torch.no_grad()
    def score(self, batch: Batch, **context) -> flow_kernels.TokenScores:
        """Loss and correctness of every target token of the batch, `[R]` each; `context` as in `target_hidden`."""
        return flow_kernels.linear_score_tokens(
            self.target_hidden(batch, **context), self.head.weight, batch.target, linear_bias=self.head.bias,
            softcap=self.softcap, backend=self.backend,
        )  # fmt: skip

    @property
    def text_body(self) -> nn.Module:
        """What makes hidden states of text: the model but for its vision or audio parts, where it has such."""
        config = self.model.config
        return self.model if config.get_text_config() is config else self.model.get_decoder()

    @property
    def max_positions(self) -> int | None:
        """The longest text of a model that learned a vector for each position; None for one that computes them."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        tables = [m for m in self.text_body.modules() if isinstance(m, nn.Embedding)]
        # OPT's and its relatives' tables begin with 2 rows that stand for no position.
        is_learned = limit and any(
            m.num_embeddings in (limit, limit + 2) and m is not self.model.get_input_embeddings() for m in tables
        )
        return limit if is_learned else None

    def check_length(self, length: int, what: str) -> None:
        """Raise `InputError` for a text that is longer than the positions that the model has learned."""
        limit = self.max_positions
        if limit is not None and length > limit:
            raise InputError(
                f"{what} has up to {length} tokens and {type(self.model).__name__} knows {limit} positions; lower "
                "max_length, max_new_tokens or the number of shots"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model makes of hidden states `[..., D]`: `[..., V]`, soft-capped where it does that."""
        logits = self.head(self.head_input(hidden))
        return logits if not self.softcap else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def check_head(self) -> None:
        """Raise `InputError` unless head(body(x)), soft-capped, equals the logits of the model on a few tokens."""
        device = self.head.weight.device
        ids = torch.arange(8, device=device)[None] % self.head.weight.shape[0]
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ours = self.logits(hidden).float()
        theirs = self.model(input_ids=ids, use_cache=False).logits.float()
        difference = float((ours - theirs).abs().max())
        # The same products in the same dtype: they differ by rounding only, or by something done to the logits.
        is_narrow = hidden.dtype.itemsize < 4 or torch.is_autocast_enabled(device.type)
        limit = 1e-2 if is_narrow else 1e-4
        if not difference <= limit * float(theirs.abs().max().clamp(min=1)):
            raise InputError(
                f"{type(self.model).__name__} changes its logits after the head (by up to {difference:.3g}), which the "
                "fused loss does not know; use a model whose logits are the head's, soft-capped or not"
            )


def causal_lm_of(model: nn.Module) -> CausalLM:
    """`CausalLM` of a transformers model, or of the one in peft's wrapper, its head checked; modes stay as they are."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(getattr(model, "_orig_mod", getattr(model, "module", None)), PreTrainedModel):
        raise InputError(
            f"{type(model).__name__} is a wrapper; give the model itself, before it is compiled or wrapped"
        )
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise InputError(f"{type(model).__name__} is no causal language model of transformers")
    lm = CausalLM(model)
    weight = lm.head.weight
    if weight.is_meta or not weight.numel() or type(weight.data).__name__ == "DTensor":
        raise InputError(
            f"the head of this {type(model).__name__} is not whole here: give the model before its parameters are sharded "
            "over processes (FSDP, ZeRO-3) or put on the meta device"
        )
    if getattr(model.config, "return_dict", True) is False:
        raise InputError("config.return_dict is False; set it to True, and give return_dict=False to single calls")
    with evaluating(lm):
        lm.check_head()
    return lm


def resolve_device(name: str) -> torch.device:
    """The device that `auto` stands for, or the one named."""
    if name != "auto":
        try:
            device = torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
        if device.type == "mps":
            raise InputError("device mps has no fp64, in which losses of samples are summed; use cpu")
        if device.type == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if torch.device(name).index is not None:
                raise InputError(f"device {name!r} is one GPU, and every process has its own; give cuda")
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def choose_attention(device: torch.device) -> None:
    """On a GPU, have torch's attention leave cuDNN out, in this process: it plans every new length of a batch.

    On an H100 steps of 16 grade-school math samples of Gemma 3 270M took 0.32 s with it, some of them 3 to 5 s, and 0.14
    without; of 128 samples 0.72 and 0.42 (benchmarks/results/README.md).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def load_model(config: ModelConfig) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """Load model and tokenizer, in eval mode, on the configured device.

    Weights are read from safetensors or GGUF only, so nothing is unpickled. See `choose_attention` for GPUs.

    Raises:
        InputError: nothing to load there, an unknown dtype, or a head that the fused loss cannot serve.
    """
    dtype = DTYPES[choose("dtype", config.dtype, tuple(DTYPES))]
    choose("precision", config.precision, ("bf16", "full"))
    device = resolve_device(config.device)
    if config.compile:
        check_compiler(device)
    choose_attention(device)
    try:
        # Now, not at the first loss: a backend that cannot serve is found before anything is written. What "auto" is for
        # may differ between scoring and training, so each call chooses.
        for operator in ("linear_cross_entropy_fwd", "linear_cross_entropy_fwd_bwd"):
            backends.resolve(config.backend, device.type, operator=operator)
    except ValueError as error:
        raise InputError(str(error)) from error
    location, options = _location(config)
    with _quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=config.trust_remote_code, **options)
            # GGUF files are dequantised while they are read; use_safetensors would look for another file.
            safe = {} if "gguf_file" in options else {"use_safetensors": True}
            model, loaded = AutoModelForCausalLM.from_pretrained(
                location, dtype=dtype, trust_remote_code=config.trust_remote_code, output_loading_info=True, **safe,
                **options,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"no language model could be loaded from {config.source!r}: {first_line} (expected a hub id, a "
                "directory with config.json, safetensors weights and a tokenizer, or a .gguf file)"
            ) from error
    if missing := sorted(loaded["missing_keys"]):
        # transformers gives them random values, other ones in every process.
        raise InputError(
            f"the files of {config.source!r} lack {len(missing)} of the model's weights, the first is {missing[0]}; they "
            "may be of a body without its head"
        )
    if "gguf_file" in options:
        _forget_quantization(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {config.source!r} has no end-of-sequence token, which ends every response")
    tokenizer.padding_side = "right"
    lm = CausalLM(model.to(device).eval(), config.backend)
    lm.packing = config.packing
    lm.check_head()
    if config.compile:
        compile_layers(lm.model)
    return lm, tokenizer


def _location(config: ModelConfig) -> tuple[str, dict]:
    path = Path(config.source).expanduser()
    if not config.source:
        raise InputError("no model is named; give one with -m MODEL, or as model: source in the file")
    if config.revision is not None and (config.source.endswith(".gguf") or path.is_dir()):
        raise InputError(f"revision {config.revision!r} is of a hub id; {config.source} is here, so leave it out")
    if config.source.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"no such file: {config.source}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{config.source} is not a model directory: it has no config.json")
        return str(path), {}
    if path.exists() or config.source.startswith((".", "/", "~")) or config.source.count("/") > 1:
        raise InputError(f"no model directory {config.source}; give a directory, a .gguf file or a hub id")
    return config.source, {"revision": config.revision or "main"}


def _forget_quantization(model: PreTrainedModel) -> None:
    """Remove what marks a dequantised model as quantised, without which transformers refuses to save it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)


@contextlib.contextmanager
def _quiet_transformers():
    """No weight-by-weight progress bars and no warnings about files that it is not told to use."""
    transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        transformers.utils.logging.enable_progress_bar()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads, whole or not at all."""
    with atomic_path(directory) as temporary, _quiet_transformers():
        temporary.mkdir()
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def model_fingerprint(model: PreTrainedModel) -> str:
    """Fingerprint of a model's weights and of the configuration that shapes its losses, wherever it was loaded from."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _CONFIG_PROVENANCE}

    def parts():
        yield json.dumps(config, sort_keys=True, default=str).encode()
        for name, tensor in sorted(model.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data

    return fingerprint(parts())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of what a tokenizer does to text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        # A file may hold how its last user padded and cut; the first call without either takes that away.
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_padding()
        backend.no_truncation()
        rules = backend.to_str()
    specials = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return fingerprint([rules.encode(), json.dumps(specials, sort_keys=True).encode()])


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The autocast context of `ModelConfig.precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
