"""Bad input is refused with a message that names the thing: argument, shape, dtype, device, row and value."""

import re

import oracle
import pytest
import torch

from flow_kernels import (
    BackendUnavailable,
    CrossEntropyLoss,
    backends,
    cross_entropy,
    linear_cross_entropy,
    linear_score_samples,
    score_samples,
    score_tokens,
)

NAN, INF = float("nan"), float("inf")
LOGITS = torch.zeros(2, 3, 5)
TARGET = torch.ones(2, 3, dtype=torch.long)
HIDDEN, HEAD = torch.zeros(2, 3, 4), torch.zeros(5, 4)


def target(value, row=4, like=TARGET):
    """TARGET with one flat row replaced."""
    changed = like.clone()
    changed.view(-1)[row] = value
    return changed


def offsets(*values, dtype=torch.int32):
    return {"cu_seqlens": torch.tensor(values, dtype=dtype)}


def weights(value, *index):
    """Weights per row with one replaced."""
    changed = torch.ones(2, 3)
    changed[index] = value
    return {"sample_weight": changed}


# Everything that the two losses refuse alike: changes to the call, the error, what its message says.
SHARED = {
    "target too large": ({"target": target(5)}, IndexError, "the target of row 4 is 5, outside [0, 5) and not ignore_index=-100"),
    "target negative": ({"target": target(-1)}, IndexError, "the target of row 4 is -1, outside [0, 5)"),
    "first of several": ({"target": target(77, 2, target(-3))}, IndexError, "the target of row 2 is 77"),
    "old ignore_index": ({"target": target(-100), "ignore_index": 0}, IndexError, "the target of row 4 is -100, outside"),
    "huge target": ({"target": target(2**62)}, IndexError, f"the target of row 4 is {2**62}"),
    "float target": ({"target": TARGET.float()}, TypeError, "got torch.float32; class probabilities (mixup, soft labels)"),
    "probabilities": ({"target": torch.rand(2, 3, 5)}, TypeError, "got torch.float32"),
    "bool target": ({"target": TARGET.bool()}, TypeError, "got torch.bool"),
    "list target": ({"target": [[1, 1, 1]] * 2}, TypeError, "got list"),
    "target device": ({"target": TARGET.to("meta")}, ValueError, "target is on meta but input is on cpu"),
    "target shape": ({"target": TARGET[:, :2]}, ValueError, "needs a target of shape (2, 3), got (2, 2)"),
    "flat target": ({"target": TARGET.view(-1)}, ValueError, "needs a target of shape (2, 3), got (6,)"),
    "transposed weight": ({"sample_weight": torch.ones(3, 2)}, ValueError, "sample_weight has shape (3, 2); it must be"),
    "weights named": ({"sample_weight": torch.ones(3)}, ValueError, "(2, 3) (one per row) or (2,) (one per leading"),
    "column of weights": ({"sample_weight": torch.ones(2, 1)}, ValueError, "sample_weight has shape (2, 1)"),
    "weight by class": ({"sample_weight": torch.ones(5)}, ValueError, "sample_weight has shape (5,)"),
    "0-d weight": ({"sample_weight": torch.tensor(1.0)}, ValueError, "sample_weight has shape ()"),
    "weights by sequence": (
        {"sample_weight": torch.ones(3), **offsets(0, 2, 6)}, ValueError, "or (2,) (one per sequence of cu_seqlens)",
    ),
    "leading, packed": (
        {"sample_weight": torch.ones(2), **offsets(0, 2, 4, 6)}, ValueError, "sample_weight has shape (2,)",
    ),
    "weight list": ({"sample_weight": [1.0, 1.0]}, TypeError, "sample_weight must be a tensor, got list"),
    "weight device": ({"sample_weight": torch.ones(2, 3, device="meta")}, ValueError, "sample_weight is on meta"),
    "NaN weight": (weights(NAN, 1, 2), ValueError, "sample_weight[1, 2] is nan"),
    "inf weight": (weights(-INF, 0, 1), ValueError, "sample_weight[0, 1] is -inf"),
    "NaN by sequence": ({"sample_weight": torch.tensor([1.0, NAN])}, ValueError, "sample_weight[1] is nan"),
    "offsets start": (offsets(1, 6), ValueError, "must run from 0 to the number of rows 6, got 1 to 6"),
    "offsets end": (offsets(0, 5), ValueError, "must run from 0 to the number of rows 6, got 0 to 5"),
    "offsets fall": (offsets(0, 4, 2, 6), ValueError, "cu_seqlens must not fall, but it does after entry 1"),
    "unsigned fall": (offsets(0, 4, 2, 6, dtype=torch.uint8), ValueError, "cu_seqlens must not fall"),
    "float offsets": (offsets(0.0, 6.0, dtype=torch.float32), ValueError, "cu_seqlens must be a 1-D integer tensor"),
    "2-D offsets": ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, "got shape (1, 2)"),
    "no offsets": (offsets(), ValueError, "got shape (0,)"),
    "offsets device": ({"cu_seqlens": torch.zeros(2, device="meta", dtype=torch.int)}, ValueError, "cu_seqlens is on meta"),
    "list offsets": ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be a tensor, got list"),
    "normalizer name": ({"normalizer": "tokens"}, ValueError, "normalizer must be 'targets', 'weights', a number"),
    "normalizer shape": ({"normalizer": torch.ones(2)}, ValueError, "0-d tensor, got shape (2,)"),
    "normalizer None": ({"normalizer": None}, TypeError, "normalizer must be 'targets', 'weights', a number"),
    "normalizer NaN": ({"normalizer": NAN}, ValueError, "normalizer must be finite, got nan"),
    "normalizer inf": ({"normalizer": torch.tensor(INF)}, ValueError, "normalizer must be finite, got inf"),
    "normalizer, sum": ({"normalizer": 3, "reduction": "sum"}, ValueError, "normalizer goes with reduction='mean'"),
    "normalizer, none": ({"normalizer": "weights", "reduction": "none"}, ValueError, "normalizer goes with reduction"),
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction must be one of ('mean', 'sum', 'none'), got 'batch"),
    "reduction None": ({"reduction": None}, ValueError, "got None"),
    "smoothing": ({"label_smoothing": 1.1}, ValueError, "label_smoothing must be in [0, 1], got 1.1"),
    "negative smoothing": ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in [0, 1], got -0.1"),
    "NaN smoothing": ({"label_smoothing": NAN}, ValueError, "label_smoothing must be in [0, 1], got nan"),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, or None, got 0.0"),
    "softcap negative": ({"softcap": -30.0}, ValueError, "softcap must be positive and finite, or None, got -30.0"),
    "softcap tiny": ({"softcap": 1e-46}, ValueError, "softcap=1e-46 and its inverse are not both fp32 numbers"),
    "softcap huge": ({"softcap": 1e39}, ValueError, "softcap=1e+39 and its inverse are not both fp32 numbers"),
    "softcap empty": ({"softcap": ""}, TypeError, "softcap must be a number, got str"),
    "softcap text": ({"softcap": "30"}, TypeError, "softcap must be a number, got str"),
    "z_loss None": ({"z_loss": None}, TypeError, "z_loss must be a number, got NoneType"),
    "softcap NaN": ({"softcap": NAN}, ValueError, "softcap must be positive and finite, or None, got nan"),
    "softcap inf": ({"softcap": INF}, ValueError, "softcap must be positive and finite, or None, got inf"),
    "z_loss": ({"z_loss": -1e-4}, ValueError, "z_loss must be finite and not negative, got -0.0001"),
    "class weight size": ({"weight": torch.ones(4)}, ValueError, "one weight per class, shape (5,), got (4,)"),
    "class weight per row": ({"weight": torch.ones(2, 3)}, ValueError, "weights per sample are sample_weight"),
    "class weight grad": ({"weight": torch.ones(5, requires_grad=True)}, ValueError, "weight (per class) gets no gradient"),
    "class weight int": ({"weight": torch.ones(5).long()}, TypeError, "weight must be a floating-point tensor, got torch.int"),
    "class weight list": ({"weight": [1.0] * 5}, TypeError, "weight must be a tensor, got list"),
    "class weight device": ({"weight": torch.ones(5, device="meta")}, ValueError, "weight is on meta but input is on cpu"),
    "unknown backend": ({"backend": "tpu"}, ValueError, "backend must be one of ('auto', 'reference'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("training", [False, True], ids=["", "training"])
def test_both_losses(backend, change, error, message, training):
    change = {"target": TARGET, "backend": backend, **change}
    labels = change.pop("target")
    for fn, tensors in ((cross_entropy, (LOGITS,)), (linear_cross_entropy, (HIDDEN, HEAD))):
        first = tensors[0].clone().requires_grad_(training)
        with pytest.raises(error, match=re.escape(message)):
            fn(first, *tensors[1:], labels, **change)


@pytest.mark.parametrize("name", ["target too large", "float target", "offsets fall", "softcap 0", "unknown backend"])
def test_scoring_refuses_the_same(backend, name):
    change, error, message = SHARED[name]
    change = {"target": TARGET, "backend": backend, **change}
    labels = change.pop("target")
    for fn, tensors in ((score_tokens, (LOGITS,)), (score_samples, (LOGITS,)), (linear_score_samples, (HIDDEN, HEAD))):
        with pytest.raises(error, match=re.escape(message)):
            fn(*tensors, labels, **change)


INPUT = {
    "class second": (LOGITS.movedim(-1, 1), TARGET, ValueError, "use input.movedim(1, -1)"),
    "integer input": (LOGITS.long(), TARGET, TypeError, "input must be a floating-point tensor, got torch.int64"),
    "list input": ([[0.0]], TARGET, TypeError, "input must be a tensor, got list"),
    "0-d input": (torch.tensor(1.0), torch.tensor(0), ValueError, "input of shape ()"),
    "no classes": (torch.zeros(2, 3, 0), TARGET, ValueError, "its vocabulary dimension is 0"),
}


@pytest.mark.parametrize(("input", "labels", "error", "message"), INPUT.values(), ids=INPUT)
def test_input(backend, input, labels, error, message):
    for fn in (cross_entropy, score_tokens):
        with pytest.raises(error, match=re.escape(message)):
            fn(input, labels, backend=backend)


HEADS = {
    "1-D": ({"linear_weight": torch.zeros(4)}, ValueError, "linear_weight must have shape ('V', 4), got (4,)"),
    "0-D": ({"linear_weight": torch.tensor(1.0)}, ValueError, "linear_weight must have shape ('V', 4), got ()"),
    "sharded": (
        {"linear_weight": torch.empty(0)},
        ValueError,
        "got (0,); it is empty, so gather it first if it is sharded",
    ),
    "transposed": ({"linear_weight": HEAD.T}, ValueError, "linear_weight must have shape ('V', 4), got (4, 5)"),
    "dtype": (
        {"linear_weight": HEAD.bfloat16()},
        TypeError,
        "linear_weight is torch.bfloat16 but input is torch.float32",
    ),
    "int": ({"linear_weight": HEAD.long()}, TypeError, "linear_weight must be a floating-point tensor"),
    "module": ({"linear_weight": torch.nn.Linear(4, 5)}, TypeError, "linear_weight must be a tensor, got Linear"),
    "device": ({"linear_weight": HEAD.to("meta")}, ValueError, "linear_weight is on meta but input is on cpu"),
    "bias size": ({"linear_bias": torch.zeros(4)}, ValueError, "linear_bias must have shape (5,), got (4,)"),
    "bias dtype": ({"linear_bias": torch.zeros(5).double()}, TypeError, "linear_bias is torch.float64 but input is"),
    "bias device": ({"linear_bias": torch.zeros(5, device="meta")}, ValueError, "linear_bias is on meta"),
    "chunk 0": ({"chunk_size": 0}, ValueError, "chunk_size must be a positive number of rows or None, got 0"),
    "chunk negative": ({"chunk_size": -4}, ValueError, "chunk_size must be a positive number of rows or None, got -4"),
    "chunk float": ({"chunk_size": 2.5}, ValueError, "chunk_size must be a positive number of rows or None, got 2.5"),
}


@pytest.mark.parametrize(("change", "error", "message"), HEADS.values(), ids=HEADS)
def test_heads(backend, change, error, message):
    change = {"linear_weight": HEAD, "backend": backend, **change}
    linear_weight = change.pop("linear_weight")
    for fn in (linear_cross_entropy, linear_score_samples):
        with pytest.raises(error, match=re.escape(message)):
            fn(HIDDEN, linear_weight, TARGET, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_filter_eps": -1e-6}, "grad_filter_eps must be in [0, 1), got -1e-06"),
        ({"grad_filter_eps": 1.0}, "grad_filter_eps must be in [0, 1), got 1.0"),
        ({"grad_filter_eps": NAN}, "grad_filter_eps must be in [0, 1), got nan"),
        (
            {"grad_filter_eps": 1e-6, "label_smoothing": 0.1},
            "would leave out what label_smoothing gives to every class",
        ),
    ],
)
def test_gradient_filters(backend, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_cross_entropy(HIDDEN, HEAD, TARGET, backend=backend, **change)


def test_sharded_heads_are_refused(backend):
    # A head sharded by FSDP2 or tensor parallelism; only its type's name is looked at, so no process group is needed.
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="linear_weight is a DTensor; call the loss inside the sharded module"):
        linear_cross_entropy(HIDDEN, HEAD.as_subclass(DTensor), TARGET, backend=backend)


def test_nan_weight_of_a_single_row(backend):
    with pytest.raises(ValueError, match=re.escape("sample_weight[] is nan")):
        cross_entropy(torch.zeros(5), torch.tensor(1), sample_weight=torch.tensor(NAN), backend=backend)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_weight_of_a_sample_without_targets_is_not_read(backend, value, reduction):
    # Its mean loss is 0 / 0.
    logits, labels = torch.randn(2, 3, 5), TARGET.clone()
    labels[0] = -100
    weight, found = torch.tensor([value, 0.5]), []
    for w in (weight, torch.tensor([0.0, 0.5])):
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, labels, sample_weight=w, reduction=reduction, backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert bool(torch.isfinite(found[0][0]).all())
    # The one that counts is named, not the first.
    with pytest.raises(ValueError, match=re.escape("sample_weight[1] is nan")):
        cross_entropy(logits, labels, sample_weight=torch.tensor([value, NAN]), backend=backend)


def test_in_a_compiled_step_the_weight_of_a_sample_without_targets_is_not_read_either(backend):
    # Where nobody looks at values, as on a GPU.
    labels = TARGET.clone()
    labels[0] = -100
    torch.compiler.reset()
    step = torch.compile(lambda x, w: cross_entropy(x, labels, sample_weight=w, backend=backend), backend="aot_eager")
    logits = torch.randn(2, 3, 5)
    assert step(logits, torch.tensor([NAN, 0.5])) == step(logits, torch.tensor([0.0, 0.5]))
    assert bool(step(logits, torch.tensor([0.0, NAN])).isnan())


def test_in_a_compiled_step_rows_behind_the_last_offset_count_as_nan(backend):
    # On a GPU, where nobody looks, an index beyond the weights would take the context down.
    torch.compiler.reset()
    logits, labels, ends = torch.randn(6, 5), torch.ones(6, dtype=torch.long), torch.tensor([0, 2, 4])
    options = {"sample_weight": torch.tensor([1.0, 0.5]), "cu_seqlens": ends, "backend": backend, "reduction": "none"}
    found = torch.compile(lambda x, t: cross_entropy(x, t, **options), backend="aot_eager")(logits, labels)
    assert found.isnan().tolist() == [False] * 4 + [True] * 2
    # As padding, without a target, they are nothing.
    labels[4:] = -100
    found = torch.compile(lambda x, t: cross_entropy(x, t, **options), backend="aot_eager")(logits, labels)
    assert found[4:].tolist() == [0, 0]


def test_shift_of_a_scalar(backend):
    with pytest.raises(ValueError, match="shift=True needs a sequence dimension"):
        cross_entropy(torch.zeros(5), torch.tensor(1), shift=True, backend=backend)


def test_unavailable_backends_name_the_reason():
    missing = [name for name in backends.BACKENDS if not backends.status(name, "cpu").available]
    assert "cuda" in missing
    for name in missing:
        reason = backends.status(name, "cpu").reason
        assert reason
        with pytest.raises(BackendUnavailable, match=re.escape(reason)) as error:
            cross_entropy(LOGITS, TARGET, backend=name)
        assert f"backend={name!r}" in str(error.value)
        assert "backend='auto' would use" in str(error.value)


def test_auto_is_an_available_backend():
    for device in ("cpu", "cuda", "mps"):
        assert backends.status(backends.resolve("auto", device), device).available


def test_modules_refuse_as_the_functions_do(backend):
    with pytest.raises(ValueError, match="one weight per class"):
        CrossEntropyLoss(torch.ones(3), backend=backend)(LOGITS, TARGET)
    with pytest.raises(TypeError, match="sample_weights"):
        CrossEntropyLoss(sample_weights=torch.ones(2))


@pytest.mark.parametrize("value", [5, -7])
def test_bad_target_is_refused_in_a_compiled_step(backend, value):
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="eager")
    logits = torch.zeros(2, 3, 5, requires_grad=True)
    oracle.assert_close(compiled(logits, TARGET, backend=backend), torch.tensor(5.0).log())
    with pytest.raises(IndexError, match=re.escape(f"the target of row 4 is {value}, outside [0, 5)")):
        compiled(logits, target(value), backend=backend)


def test_weights_whose_sum_is_beyond_fp32_are_finite():
    logits, target = torch.randn(3, 5), torch.arange(3)
    weight = torch.tensor([3e38, 3e38, 0.0])
    assert cross_entropy(logits, target, sample_weight=weight, reduction="sum").isinf()
    with pytest.raises(ValueError, match=r"sample_weight\[1\] is inf"):
        cross_entropy(logits, target, sample_weight=torch.tensor([3e38, float("inf"), 3e38]))
