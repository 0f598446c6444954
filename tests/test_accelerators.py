"""Training on a device that is not the CPU, as far as stand-ins for one go; test_cuda_training.py has the rest."""

from types import SimpleNamespace

import pytest
import torch
from flow_finetune import processes
from flow_finetune.config import TrainConfig
from flow_finetune.errors import InputError
from flow_finetune.pretrained import PretrainedCopy, distance_steps
from flow_finetune.train import Meter, _log_line


def test_the_sums_of_a_log_line_are_put_together_on_the_device():
    """Sums from a step are on the device, counts are Python's: CUDA stacks no tensors of two devices."""
    device = torch.device("meta")
    meter = Meter()
    meter.loss_sum, meter.weighted_sum = (torch.zeros((), device=device) for _ in range(2))
    meter.num_weighted, meter.num_targets, meter.weights = 4, 8, [torch.tensor([0.5, 1.5])]
    seen = []

    def reduce(sums, how):
        seen.append((sums.device.type, sums.dtype, how))
        return torch.tensor([6.0, 4.0, 4.0])

    accelerator = SimpleNamespace(device=device, num_processes=1, reduce=reduce)
    line = _log_line(3, 6, TrainConfig(epochs=2), meter, accelerator, lambda: 0.25, {"grad_norm": torch.tensor(2.0)})
    assert seen == [("meta", torch.float32, "sum")]
    assert (line["loss"], line["weighted_loss"], line["mean_weight"]) == (1.5, 0.5, 1.0)
    assert (line["distance"], line["grad_norm"], line["epoch"]) == (0.25, 2.0, 1.0)


def test_a_checkpoint_holds_sums_that_every_process_can_read(monkeypatch):
    meter = Meter()
    meter.loss_sum = torch.zeros((), device="meta")
    fetched = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: fetched.append(tensor.device.type) or torch.tensor(3.0))
    state = meter.state_dict()
    assert fetched == ["meta", "cpu"]
    continued = Meter()
    continued.load_state_dict(state)
    assert float(continued.loss_sum) == 3.0


@pytest.mark.parametrize("log_every", [1, 5, 30])
@pytest.mark.parametrize("num_steps", [1, 7, 20, 64, 1010])
def test_the_distance_is_measured_often_where_it_is_cheap(num_steps, log_every):
    logged = {step for step in range(1, num_steps + 1) if step % log_every == 0} | {num_steps}
    copy = PretrainedCopy([torch.nn.Parameter(torch.zeros(3))], dtype=torch.float32, device="cpu")
    assert distance_steps(num_steps, log_every, copy, torch.device("cpu")) == logged
    assert distance_steps(num_steps, log_every, None, torch.device("cuda", 1)) == logged
    elsewhere = distance_steps(num_steps, log_every, copy, torch.device("cuda", 1))
    assert elsewhere <= logged
    assert len(elsewhere) == min(len(logged), 20)
    assert num_steps in elsewhere


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            SimpleNamespace(device=torch.device("cpu")),
            "accelerate is set to cpu in this process, and the model is on cuda",
        ),
        (ValueError("it is another device's already"), "accelerate cannot be set up for cuda: it is another"),
    ],
)
def test_accelerates_device_is_the_models(monkeypatch, made, message):
    """Its state is the process's, so that a training on the CPU before would take the next one along in silence."""

    def accelerator(**options):
        if isinstance(made, Exception):
            raise made
        return SimpleNamespace(**vars(made), distributed_type=processes.DistributedType.NO)

    monkeypatch.setattr(processes, "Accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(InputError, match=message):
        processes.make_accelerator(torch.device("cuda", 0))
