"""Which parameters a method trains: all that text reaches, the head alone, or LoRA adapters beside frozen weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.pytorch_utils import Conv1D

from flow_finetune.config import MethodConfig
from flow_finetune.errors import InputError
from flow_finetune.models import CausalLM
from flow_finetune.progress import say


def prepare_parameters(lm: CausalLM, method: MethodConfig) -> Lora | None:
    """Freeze what `method` does not train and add what it does; the model's loss is what it was.

    Returns the adapters for `train: lora`, else None. A head that shares its matrix with the embeddings gets its own
    for `train: head`. Vision and audio parts, which text does not reach, are frozen.
    """
    _freeze_other_parts(lm)
    if method.train == "lora":
        return Lora(lm, method.lora_rank, method.lora_alpha)
    if method.train == "head":
        if untie_head(lm):
            say(
                "the head shares its matrix with the embeddings, which training it would change; it gets its own, so "
                f"the saved model has {lm.head.weight.numel():,} parameters more and tie_word_embeddings false"
            )
        lm.requires_grad_(False)
        lm.head.requires_grad_(True)
    return None


def _freeze_other_parts(lm: CausalLM) -> None:
    reached = {id(p) for part in (lm.text_body, lm.head) for p in part.parameters()}
    others = [p for p in lm.parameters() if id(p) not in reached]
    for parameter in others:
        parameter.requires_grad_(False)
    if others:
        say(f"{sum(p.numel() for p in others):,} parameters that text does not reach (vision, audio) stay as they are")


def untie_head(lm: CausalLM) -> bool:
    """Give the head its own copy of the embeddings' matrix where they share it; returns whether they did."""
    embeddings = lm.model.get_input_embeddings()
    if lm.head.weight is not embeddings.weight:
        return False
    lm.head.weight = nn.Parameter(lm.head.weight.detach().clone())
    for config in {id(c): c for c in (lm.model.config, lm.model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    # What transformers noted when it tied them; it would leave the head out of the saved file.
    if getattr(lm.model, "all_tied_weights_keys", None):
        lm.model.all_tied_weights_keys = {}
    return True


def _matrices(lm: CausalLM) -> dict[str, nn.Parameter]:
    """The matrices of the body, and stacks of them, by name: what multiplies hidden states."""
    others = [lm.head, *(m for m in lm.text_body.modules() if isinstance(m, nn.Embedding | nn.Conv1d))]
    no_matrix = {id(p) for m in others for p in m.parameters()}
    return {n: p for n, p in lm.text_body.named_parameters() if p.dim() >= 2 and id(p) not in no_matrix}


class Lora:
    """Adapters of peft in every linear layer of a model but its head, which the fused loss reads as it is.

    The update of a matrix W is `W + alpha / rank * B A`, with B = 0 at the start.
    """

    def __init__(self, lm: CausalLM, rank: int, alpha: int) -> None:
        from peft import LoraConfig, LoraModel
        from peft.tuners.lora.layer import LoraLayer, ParamWrapper

        of_text = {id(module) for module in lm.text_body.modules()}
        names = [
            name
            for name, module in lm.model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not lm.head and id(module) in of_text
        ]
        if not names:
            raise InputError(
                f"{type(lm.model).__name__} has no linear layer beside its head; LoRA has nothing to adapt"
            )
        matrices = _matrices(lm)
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names, bias="none")
        # Adapters are put into the model itself: its class, its methods and the names of its parts stay.
        self._tuner = LoraModel(lm.model, config, "default")
        self._layers = [module for module in lm.model.modules() if isinstance(module, LoraLayer)]
        self._of_parameters = ParamWrapper
        adapted = {id(self._base_weight(layer)) for layer in self._layers}
        left_out = {name: p.numel() for name, p in matrices.items() if id(p) not in adapted}
        if left_out:
            share = sum(left_out.values()) / sum(p.numel() for p in matrices.values())
            say(
                f"LoRA leaves out {share:.0%} of the body's matrix elements, which peft does not adapt here: "
                f"{', '.join(list(left_out)[:3])}{' ...' if len(left_out) > 3 else ''}"
            )
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                # As peft's own wrapper does: small updates are lost in 16-bit parameters.
                parameter.data = parameter.data.float()

    def _base_weight(self, layer: nn.Module) -> nn.Parameter:
        return layer.get_param() if isinstance(layer, self._of_parameters) else layer.get_base_layer().weight

    @contextmanager
    def off(self) -> Iterator[None]:
        """The frozen model, while the block runs."""
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()

    def distance(self) -> float:
        """Euclidean distance of the merged matrices from the pre-trained ones, without making them.

        sum |s B A|^2 = sum s^2 trace((B^T B) (A A^T))
        """
        total = 0.0
        for layer in self._layers:
            if isinstance(layer, self._of_parameters):  # one matrix for each expert
                total += float(layer.get_delta_weight("default").detach().cpu().double().square().sum())
                continue
            a, b = (part["default"].weight.detach().cpu().double() for part in (layer.lora_A, layer.lora_B))
            total += layer.scaling["default"] ** 2 * float(((b.T @ b) * (a @ a.T)).sum())
        return max(total, 0.0) ** 0.5

    def merge(self) -> None:
        """Add the updates to the model's matrices, rounded once to their dtype, and take the adapters out."""
        model = self._tuner.merge_and_unload(progressbar=False)
        for name in ("peft_config", "_hf_peft_config_loaded"):
            if name in vars(model):
                delattr(model, name)
