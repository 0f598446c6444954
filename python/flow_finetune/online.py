"""Online FLOW: weights from the frozen model on the very batch that is trained, for data that is not scored once.

Before a step the frozen model goes forward through the step's micro-batches; `w_i = exp(-f_i / tau)` of these losses
weights them. tau is a given temperature, or that of a score file; without either it is the quantile of all losses
seen so far, this step's included, on every process the same.

What it costs: one forward pass more in every step. With LoRA the frozen model is the trained one with its adapters off.
Otherwise what is trained is kept twice: `online_copy: same` adds one copy of the trained parameters (4 bytes each in
fp32, beside the 16 of the parameters, gradients and moments), `bfloat16` adds 2 bytes each and rounds.
"""

from __future__ import annotations

import contextlib
import copy

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

import flow_kernels
from flow_finetune.adapters import Lora
from flow_finetune.compiled_layers import compile_layers, is_compiled
from flow_finetune.config import MethodConfig
from flow_finetune.data import PAD_ID, Sample, collate
from flow_finetune.methods import temperature_of, weigh
from flow_finetune.models import CausalLM, autocast
from flow_finetune.modes import evaluating


class FrozenModel:
    """The pre-trained model's losses while another is trained from it."""

    def __init__(self, lm: CausalLM, lora: Lora | None, online_copy: str, precision: str) -> None:
        self._precision = precision
        self._adapters_off = contextlib.nullcontext
        if lora is not None:
            self._lm, self._adapters_off = lm, lora.off
            return
        # What is frozen in the trained model as well is shared with it.
        shared = {id(p): p for p in lm.parameters() if not p.requires_grad}
        self._lm = copy.deepcopy(lm, shared).requires_grad_(False)
        if is_compiled(lm.model):  # which a copy does not take over
            compile_layers(self._lm.model)
        if online_copy == "bfloat16":
            # Parameters only: rounded rotary frequencies would be another model at a distance.
            for parameter in self._lm.parameters():
                if id(parameter) in shared:
                    continue
                parameter.data = parameter.data.to(torch.bfloat16)

    @torch.no_grad()
    def losses(self, samples: list[Sample]) -> Tensor:
        """Mean loss of every sample, `[len(samples)]` fp64 on the CPU, nats per target token."""
        device = self._lm.head.weight.device
        batch = collate(samples, PAD_ID).to(device)
        # Its own autocast: weights cast here without a graph must not be found again by the training's forward pass.
        with evaluating(self._lm), self._adapters_off(), autocast(device, self._precision):
            scores = self._lm.score(batch)
        sums = flow_kernels.sum_samples(scores._replace(loss=scores.loss.double()), batch.target, batch.cu_seqlens)
        return (sums.loss_sum / sums.num_targets).cpu()


class OnlineWeights:
    """The weights of the step being made; the counterpart of `methods.Weights`."""

    def __init__(
        self, method: MethodConfig, frozen: FrozenModel, accelerator: Accelerator, temperature: float | None
    ) -> None:
        self._method, self._frozen, self._accelerator = method, frozen, accelerator
        self._fixed = method.temperature if method.temperature is not None else temperature
        self.temperature = self._fixed
        self._seen = torch.empty(0, dtype=torch.float64)
        self._weights: dict[int, float] = {}
        self._num_samples = 0
        self._sums = torch.zeros(3, dtype=torch.float64)  # number, sum and square sum of the weights given

    def prepare(self, samples: list[Sample], indices: list[int], groups: list[list[int]]) -> None:
        """Weigh the samples `indices` of a step, of which this process goes through `groups`."""
        self._num_samples = len(samples)
        found = [
            (i, float(loss))
            for group in groups
            for i, loss in zip(group, self._frozen.losses([samples[i] for i in group]), strict=True)
        ]
        if self._accelerator.num_processes > 1:
            found = gather_object(found)
        by_index = dict(found)
        losses = torch.tensor([by_index[i] for i in indices], dtype=torch.float64)
        if self._fixed is None:
            self._seen = torch.cat([self._seen, losses])
            # A first step of one sample: its loss is the only quantile there is.
            alone = len(self._seen) == 1
            self.temperature = float(self._seen) if alone else temperature_of(self._method, self._seen)
        weights, _ = weigh(self._method, losses, self.temperature)
        self._weights = dict(zip(indices, weights.tolist(), strict=True))
        wide = weights.double()
        self._sums += torch.stack(
            [torch.tensor(float(len(wide)), dtype=torch.float64), wide.sum(), wide.square().sum()]
        )

    def of(self, indices: list[int]) -> Tensor:
        """The weights of these samples of the step, fp32."""
        return torch.tensor([self._weights[i] for i in indices])

    @property
    def mean(self) -> float:
        """Over every weight given so far."""
        return float(self._sums[1] / self._sums[0].clamp(min=1))

    @property
    def effective_sample_size(self) -> float:
        """`(sum w)^2 / sum w^2` of one pass over the data: the share of it that counts, averaged over all passes."""
        number, total, squares = self._sums.tolist()
        return total**2 / (squares * number) * self._num_samples if squares > 0 else 0.0

    def state_dict(self) -> dict:
        """What a continued run needs for the same weights."""
        return {"seen": self._seen, "sums": self._sums}

    def load_state_dict(self, state: dict) -> None:
        """The counterpart of `state_dict`."""
        self._seen, self._sums = state["seen"], state["sums"]
