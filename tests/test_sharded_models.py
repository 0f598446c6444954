"""The weighted loss of a model whose parameters torch's FSDP has divided over two processes: one process's steps."""

import functools

import pytest
import torch
import torch.distributed as dist
from flow_finetune.errors import InputError
from flow_finetune.integrations import use_weighted_loss
from processes import spawn_two
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

LEARNING_RATE = 0.1


def new_model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def batch():
    tokens = torch.randint(101, (4, 10), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, :3] = -100
    labels[1, 6:] = -100
    return tokens, labels, torch.tensor([0.2, 1.0, 0.5, 2.0])


def step(model, rows: slice, scale: float) -> torch.Tensor:
    """One step of SGD on these rows of the batch; returns their part of the loss of the whole batch."""
    tokens, labels, weight = batch()
    num_targets = int((labels[:, 1:] != -100).sum())
    loss = model(
        input_ids=tokens[rows], labels=labels[rows], sample_weight=weight[rows], num_items_in_batch=num_targets
    ).loss
    (loss * scale).backward()
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    return loss.detach()


def shard(model, kind: str):
    """`model`, and what to call in its place."""
    if kind == "wrapped":
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    options = {"mesh": init_device_mesh("cpu", (2,))}
    if kind == "bfloat16 and checkpoints":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


CASES = [(False, "sharded"), (True, "sharded"), (False, "bfloat16 and checkpoints"), (False, "wrapped")]


def worker(rank: int, meeting: str, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    found = []
    for tied, kind in CASES:
        model = use_weighted_loss(new_model(tied))
        sharded = shard(model, kind)
        # FSDP averages gradients over the processes.
        loss = step(sharded, slice(2 * rank, 2 * rank + 2), 2.0)
        dist.all_reduce(loss)
        if kind == "wrapped":
            with FullyShardedDataParallel.summon_full_params(sharded):
                parameters = [p.detach().clone() for p in model.parameters()]
        else:
            parameters = [p.full_tensor().detach() for p in model.parameters()]
        found.append((float(loss), parameters))
    with pytest.raises(InputError, match="before its parameters are sharded"):
        use_weighted_loss(shard(new_model(False), "sharded"))
    if rank == 0:
        torch.save(found, path)
    dist.destroy_process_group()


def test_sharded_models_take_the_steps_of_one_process(tmp_path):
    spawn_two(worker, (f"file://{tmp_path}/meeting", str(tmp_path / "found.pt")))
    for (tied, kind), (loss, parameters) in zip(CASES, torch.load(tmp_path / "found.pt"), strict=True):
        model = use_weighted_loss(new_model(tied))
        expected = float(step(model, slice(0, 4), 1.0))
        is_exact = kind != "bfloat16 and checkpoints"
        assert loss == pytest.approx(expected, rel=1e-6 if is_exact else 1e-3), kind
        moved = 0.0
        for theirs, ours, start in zip(parameters, model.parameters(), new_model(tied).parameters(), strict=True):
            torch.testing.assert_close(theirs, ours.detach(), rtol=0, atol=1e-7 if is_exact else 2e-3)
            moved = max(moved, float((ours - start).abs().max().detach()))
        assert moved > 1e-2, "a step that changes nothing shows nothing"
