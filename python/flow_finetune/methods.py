"""What a method's name stands for, which options contradict each other, and the weight of every sample or token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import flow_kernels
from flow_finetune.config import METHOD_NAMES, METHOD_PARTS, MethodConfig, choose, named_options, non_defaults
from flow_finetune.errors import InputError
from flow_finetune.scores import Scores

_CHOICES = {
    "weights": ("none", "sequence", "token"), "direction": ("easy", "hard"), "train": ("all", "head", "lora"),
    "normalize": ("none", "mean"),
    "penalty": ("none", "l2", "l1"), "penalty_copy": ("bfloat16", "float32", "disk"),
    "online_copy": ("same", "bfloat16"),
}  # fmt: skip


def named_method(name: str) -> MethodConfig:
    """The method of a name, or of several joined by "+" as in "flow+l2", with the defaults of each.

    Raises:
        InputError: an unknown name, or two that answer the same question.
    """
    for part in name.split("+"):
        if part in ("wise-ft", "wise_ft"):
            raise InputError(
                f"--method {name}: WiSE-FT trains nothing; average a finished model with flow-finetune wise-ft, or add "
                "a row {name: wise-ft, of: NAME, wise_ft: 0.5} to a run's methods"
            )
        choose("--method", part, METHOD_NAMES)
    return MethodConfig(name=name, **named_options(name))


def needs_scores(method: MethodConfig) -> bool:
    """Whether a method cannot do without the pre-trained losses of all samples."""
    choose(f"method {method.name}: weights", method.weights, _CHOICES["weights"])
    is_weighted = method.weights != "none" or method.keep_easiest is not None
    return is_weighted and not method.online and method.of is None


def check_method(method: MethodConfig) -> None:
    """Raise `InputError` for an option out of range, or options that contradict each other, with the remedy."""
    for name, allowed in _CHOICES.items():
        choose(f"method {method.name}: {name}", getattr(method, name), allowed)
    for wrong, message in _out_of_range(method) + _contradictions(method):
        if wrong:
            raise InputError(f"method {method.name}: {message}")


def check_name(method: MethodConfig) -> None:
    """Raise `InputError` where a name of `named_method` is given to something else: a report would show the name."""
    options = named_options(method.name)
    if options is None:
        return
    if method.of is not None:
        raise InputError(
            f"method {method.name}: it is an average (WiSE-FT of {method.of}), where the name stands for a training; give it "
            f"one of its own, such as {method.of}+wise-ft"
        )
    named = MethodConfig(method.name, **options)
    for key in ("weights", "direction", "online", "train", "penalty", "keep_easiest", "average_every", "normalize"):
        found, wanted = getattr(method, key), getattr(named, key)
        # Of these a name says whether, not how much.
        is_amount = key in ("keep_easiest", "average_every")
        is_same = (found is None) == (wanted is None) if is_amount else found == wanted
        # Weights may be normalised under any name but the one that says how.
        if is_same or (key == "normalize" and key not in options):
            continue
        parts = [
            part for names in METHOD_PARTS.values() for part, entries in names.items()
            if list(entries) == [key] and (is_amount or entries[key] == found)
        ]  # fmt: skip
        other = "give it a name of its own (or, on the command line, none)"
        if parts and key not in options:
            other = f"call it {method.name}+{parts[0]}"
        elif parts and "+" not in method.name:
            other = f"call it {parts[0]}"
        raise InputError(
            f"method {method.name}: {key} is {found}, where the name stands for {key}: {wanted}; leave it away, or {other}"
        )


def _out_of_range(m: MethodConfig) -> list[tuple[bool, str]]:
    keep, every = m.keep_easiest, m.average_every
    low, high, tau = m.clip_low, m.clip_high, m.temperature
    return [
        (tau is not None and not 0 < tau < float("inf"), f"temperature is a number of nats above 0, got {tau}"),
        (not 0 <= m.quantile <= 1, f"quantile is a share of the losses, in [0, 1], got {m.quantile}"),
        (low is not None and not low >= 0, f"clip_low must be at least 0, got {low}"),
        (high is not None and not high > 0, f"clip_high must be above 0, or nothing is trained, got {high}"),
        (None not in (low, high) and not low <= high, f"clip_low must not be above clip_high, got {low} and {high}"),
        (keep is not None and not 0 < keep <= 1, f"keep_easiest is a share in (0, 1], got {keep}"),
        (every is not None and not 0 < every <= 1, f"average_every is a share of all steps, in (0, 1], got {every}"),
        (not 0 <= m.average_share <= 1, f"average_share must be in [0, 1], got {m.average_share}"),
        (m.wise_ft is not None and not 0 <= m.wise_ft <= 1, f"wise_ft must be in [0, 1], got {m.wise_ft}"),
        (m.lora_rank < 1, f"lora_rank must be at least 1, got {m.lora_rank}"),
        (m.lora_alpha < 1, f"lora_alpha must be at least 1, got {m.lora_alpha}"),
        (not 0 <= m.penalty_strength < float("inf"), f"penalty_strength must be at least 0, got {m.penalty_strength}"),
        (m.learning_rate is not None and not m.learning_rate > 0,
         f"learning_rate must be positive, got {m.learning_rate}"),
    ]  # fmt: skip


def _contradictions(m: MethodConfig) -> list[tuple[bool, str]]:
    given = set(non_defaults(m)) - {"name"}
    is_averaged = m.of is not None or m.wise_ft is not None
    beside = sorted(given - {"of", "wise_ft"})
    is_lora, is_weighted = m.train == "lora", m.weights != "none"
    has_copy = m.penalty != "none" or m.average_every is not None
    found = [
        (m.wise_ft is not None and m.of is None,
         "wise_ft needs `of`, the name of the method whose result is averaged with the pre-trained weights"),
        (m.of is not None and m.wise_ft is None, "`of` needs wise_ft, the share of the fine-tuned weights, as in 0.5"),
        (m.of == m.name, f"`of` names the method itself; name the one whose result is averaged, not {m.name}"),
        (is_averaged and bool(beside),
         f"WiSE-FT trains nothing, so {', '.join(beside)} would have no effect; set it at {m.of}"),
        (is_lora and m.penalty != "none",
         f"LoRA freezes the weights that {m.penalty} would hold; use train: all (or head), or penalty: none"),
        (is_lora and m.average_every is not None,
         "LoRA freezes the weights that SFA would average; use train: all, or WiSE-FT of the merged result"),
        (m.temperature is not None and "quantile" in given,
         "temperature is given, so quantile, which would find one, has no effect; give one of them"),
        (m.online and not is_weighted, "online weights need weights: sequence"),
        (m.online and m.weights == "token",
         "online weights are one per sample; use weights: sequence, or online: false with token scores"),
        (m.online_copy != "same" and m.train != "all",
         "online_copy has no effect unless all weights are trained: what is frozen is not copied; use online_copy: same"),
        (m.online and m.normalize != "none",
         "weights are normalised over all samples, which online weighting has not seen; use normalize: none"),
        (m.online and m.keep_easiest is not None,
         "keep_easiest ranks all samples, which online weighting has not seen; use online: false"),
    ]  # fmt: skip
    # An option without what it belongs to would change nothing in silence.
    for names, is_used, remedy in (
        ({"lora_rank", "lora_alpha"}, is_lora, "train: lora"),
        ({"penalty_strength"}, m.penalty != "none", "penalty: l2 (or l1)"),
        ({"penalty_copy"}, has_copy, "penalty: l2 (or l1), or average_every"),
        ({"average_share"}, m.average_every is not None, "average_every"),
        ({"online_copy"}, m.online, "online: true"),
        ({"direction", "temperature", "quantile", "clip_low", "clip_high"}, is_weighted, "weights: sequence or token"),
        ({"normalize"}, is_weighted or m.keep_easiest is not None, "weights: sequence or token, or keep_easiest"),
    ):
        unused = sorted(names & given)
        found.append((bool(unused) and not is_used, f"{', '.join(unused)} has no effect without {remedy}"))
    return found


def check_methods(methods: tuple[MethodConfig, ...]) -> None:
    """`check_method` for the rows of one run, and that every WiSE-FT row averages a trained row of it."""
    trained = [m.name for m in methods if m.of is None]
    for method in methods:
        check_method(method)
        check_name(method)
        if method.of is not None:
            choose(f"method {method.name}: of", method.of, tuple(trained))


@dataclass(frozen=True)
class Weights:
    """The weights of a training set: one tensor entry per sample, or one per target token of each sample."""

    per_sample: Tensor | None  # [S] fp32
    per_token: list[Tensor] | None  # [num_targets] fp32 each
    temperature: float | None
    mean: float  # over what carries the weights
    effective_sample_size: float

    def prepare(self, samples: list, indices: list[int], groups: list[list[int]]) -> None:
        """Nothing: these weights are known before the step. Online ones are made here."""

    def of(self, indices: list[int]) -> Tensor:
        """The `sample_weight` of a batch of these samples: per sample, or per target token in a row."""
        if self.per_token is not None:
            return torch.cat([self.per_token[i] for i in indices])
        return self.per_sample[indices].clone()

    def state_dict(self) -> dict:
        """Nothing that a checkpoint would have to hold."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """The counterpart of `state_dict`."""


def weigh(method: MethodConfig, losses: Tensor, temperature: float | None) -> tuple[Tensor, float | None]:
    """The fp32 weights that `method` gives to these pre-trained losses, and the temperature in nats.

        kept = losses among the smallest keep_easiest                    # all when not given; others get weight 0
        weights = exp(-losses / tau), or exp(+losses / tau)              # direction "easy", "hard"; 1 for weights "none"

    Args:
        method: its weights, direction, quantile, clips, normalisation and keep_easiest.
        losses: `[K]` fp32 or fp64, nats, of the samples or the tokens.
        temperature: in nats; the quantile of all losses (kept or not) when None.

    Raises:
        InputError: too few losses for a temperature, a temperature of 0, or weights that are no fp32 numbers.
    """
    kept = _easiest(losses, method.keep_easiest)
    clip = None if method.clip_low is None and method.clip_high is None else (method.clip_low, method.clip_high)
    try:
        if method.weights == "none":
            # exp(-0 / 1): the same clipping and normalisation as for any other weights.
            temperature, signed = None, torch.zeros_like(losses)
        else:
            if temperature is None:
                temperature = temperature_of(method, losses)
            signed = losses if method.direction == "easy" else -losses
        weights = flow_kernels.flow_weights(
            signed, 1.0 if temperature is None else temperature, mask=kept, clip=clip, normalize=method.normalize
        ).float()
    except ValueError as error:
        raise InputError(f"method {method.name}: {error}") from error
    if method.normalize == "mean" and kept is not None:
        # The average is 1 over all samples, so a step keeps the size of plain fine-tuning.
        weights = weights * (len(losses) / int(kept.sum()))
    if not bool(torch.isfinite(weights).all()):
        raise InputError(
            f"method {method.name}: the largest weight is no fp32 number; raise the temperature, set clip_high or "
            "normalize: mean"
        )
    return weights, temperature


def temperature_of(method: MethodConfig, losses: Tensor) -> float:
    """The quantile of these losses that `method` takes as its temperature, nats; `InputError` where there is none."""
    try:
        return float(flow_kernels.temperature(losses, quantile=method.quantile))
    except ValueError as error:
        raise InputError(f"method {method.name}: {error}") from error


def _easiest(losses: Tensor, share: float | None) -> Tensor | None:
    """Mask of the `round(share * K)` smallest losses, at least one, the earlier of two equal ones first."""
    if share is None:
        return None
    kept = torch.zeros(len(losses), dtype=torch.bool)
    kept[losses.argsort(stable=True)[: max(1, round(share * len(losses)))]] = True
    return kept


def make_weights(method: MethodConfig, num_samples: int, scores: Scores | None) -> Weights:
    """The weights that `method` gives to `num_samples` samples, known before training.

    Raises:
        InputError: see `weigh`.
    """
    if not needs_scores(method):
        return Weights(torch.ones(num_samples), None, None, 1.0, float(num_samples))
    by_token = method.weights == "token"
    losses = torch.from_numpy(np.concatenate(scores.token_losses)).double() if by_token else scores.loss
    weights, tau = weigh(method, losses, method.temperature)
    # Of a whole data set, which would train nothing; the few samples of an online step may well have none.
    if len(weights) and not bool((weights != 0).any()):
        raise InputError(f"method {method.name}: all weights are 0; raise the temperature")
    mean, size = float(weights.double().mean()), float(flow_kernels.effective_sample_size(weights))
    if by_token:
        parts = list(weights.split([len(values) for values in scores.token_losses]))
        return Weights(None, parts, tau, mean, size)
    return Weights(weights, None, tau, mean, size)
