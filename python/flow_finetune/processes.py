"""The processes of one launch (torchrun, accelerate launch): how they find each other, and what they share."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, broadcast_object_list

from flow_finetune.errors import InputError

T = TypeVar("T")


def make_accelerator(device: torch.device) -> Accelerator:
    """Processes, and nothing else of what accelerate can do, whatever the user's own settings of it ask for.

    Raises:
        InputError: those settings ask for a way of training that is not done here.
    """
    if device.type == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        torch.cuda.set_device(device)  # accelerate takes the current one
    # Given here, because its environment would otherwise divide the loss, scale it, or change the precision, in silence.
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision="no", dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"accelerate cannot be set up for {device.type}: {error}") from error
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise InputError(f"accelerate is set to {kind.value}; several processes work with plain data parallelism here")
    if accelerator.device.type != device.type:
        # Its settings are the whole process's: a training on another device before, or ACCELERATE_USE_CPU.
        raise InputError(
            f"accelerate is set to {accelerator.device.type} in this process, and the model is on {device.type}; unset "
            "ACCELERATE_USE_CPU (accelerate launch --cpu), or give --device, or start a new process"
        )
    return accelerator


class Processes:
    """The processes that work on one thing together; alone, nothing is set up and nobody is waited for.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.number, self.index = 1, 0
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            accelerator = make_accelerator(device)
            self.number, self.index = accelerator.num_processes, accelerator.process_index

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is made together."""
        return self.index == 0

    def agree(self, value: T) -> T:
        """The main process's value, in every process; none goes on before all have come here."""
        if self.number == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        torch.distributed.barrier()
        return values[0]
