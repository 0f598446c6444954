"""Attention in packed rows against each text on its own, in fp64."""

import pytest
import torch

from flow_kernels import cpu, ops, packed_attention

# Segments: first token, the one behind the last, the segment before; and the window.
ROWS = {
    "one text": ([(0, 37, -1)], None),
    "texts that share nothing": ([(0, 1, -1), (1, 50, -1), (50, 97, -1)], None),
    "a common beginning": ([(0, 40, -1), (40, 113, 0), (113, 114, 0), (114, 200, 0)], None),
    "beginnings of beginnings": (
        [(0, 9, -1), (9, 20, 0), (20, 30, 1), (30, 33, 1), (33, 150, -1), (150, 160, 4)],
        None,
    ),
    "a window": ([(0, 90, -1), (90, 230, 0), (230, 300, -1)], 64),
    "a window of two": ([(0, 20, -1), (20, 25, 0)], 2),
    "a window wider than the texts": ([(0, 20, -1), (20, 45, 0)], 64),
    "more than a block": ([(0, 300, -1), (300, 700, 0)], None),
}
HEADS = {"one key head": (4, 1, 16), "two": (6, 2, 40), "a key head each": (3, 3, 33)}
# Of results and gradients: sums in fp32, and operands that are rounded to 16 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def heads_of(num_tokens, heads, dtype):
    num_heads, num_key_heads, dim = heads
    torch.manual_seed(0)
    return [torch.randn(num_tokens, n, dim).to(dtype) for n in (num_heads, num_key_heads, num_key_heads, num_heads)]


def alone(query, key, value, segments, scale, window):
    """Every text written out and attended to by itself."""
    out = torch.empty_like(query)
    texts = []
    for start, end, parent in segments:
        before = [] if parent < 0 else texts[parent]
        texts.append([*before, *range(start, end)])
        text = torch.tensor(texts[-1])
        q, k, v = (t[text].transpose(0, 1) for t in (query, key, value))
        k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
        place = torch.arange(len(text))
        seen = place[None] <= place[:, None]
        if window is not None:
            seen &= place[None] > place[:, None] - window
        weights = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        out[start:end] = (weights @ v).transpose(0, 1)[len(before) :]
    return out


def expected_of(tensors, segments, scale, window):
    *heads, dout = (t.double() for t in tensors)
    heads = [t.requires_grad_() for t in heads]
    out = alone(*heads, segments, scale, window)
    return out.detach(), *torch.autograd.grad(out, heads, dout)


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_texts_are_attended_to_alone(backend, dtype, heads, row):
    segments, window = row
    tensors = heads_of(segments[-1][1], heads, dtype)
    expected = expected_of(tensors, segments, 0.3, window)
    *heads, dout = (t.requires_grad_() for t in tensors)
    out = packed_attention(*heads, torch.tensor(segments), scale=0.3, window=window, backend=backend)
    assert out.dtype == dtype
    found = out, *torch.autograd.grad(out, heads, dout)
    for name, a, b in zip(("out", "query", "key", "value"), found, expected, strict=True):
        assert a.dtype == dtype, name
        assert error(a, b) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_kernels_of_this_cpu(dtype):
    for row, heads in zip(("beginnings of beginnings", "a window", "more than a block"), HEADS.values(), strict=True):
        segments, window = ROWS[row]
        *tensors, dout = heads_of(segments[-1][1], heads, dtype)
        expected = expected_of((*tensors, dout), segments, 0.3, window)
        options = (torch.tensor(segments), 0.3, window or 0)
        for kernels in cpu.kernel_names(dtype):
            out, lse = cpu.packed_attention_fwd(*tensors, *options, kernels)
            found = out, *cpu.packed_attention_bwd(dout, *tensors, lse, *options, kernels)
            for a, b in zip(found, expected, strict=True):
                assert error(a, b) < TOLERANCE[dtype], (kernels, row)


def test_lse_is_of_the_scores_that_are_seen():
    segments, _ = ROWS["a common beginning"]
    query, key, value, _ = heads_of(200, HEADS["two"], torch.float64)
    for backend in ("reference", "cpu"):
        lse = ops.packed_attention_fwd(
            query.float(), key.float(), value.float(), torch.tensor(segments), 0.3, 0, backend
        )[1]
        # Token 113 is a text of its own behind the first 40.
        keys = key[[*range(40), 113]].repeat_interleave(3, 1)
        expected = (torch.einsum("hd,jhd->hj", query[113], keys) * 0.3).logsumexp(1)
        torch.testing.assert_close(lse[113].double(), expected, rtol=1e-6, atol=1e-6)


def test_results_are_the_same_for_any_number_of_threads():
    segments, _ = ROWS["a common beginning"]
    *tensors, dout = (t.bfloat16() for t in heads_of(200, HEADS["two"], torch.float32))
    options = (torch.tensor(segments), 0.3, 0)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            out, lse = cpu.packed_attention_fwd(*tensors, *options)
            found.append((out, lse, *cpu.packed_attention_bwd(dout, *tensors, lse, *options)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_nan_stays_in_its_text():
    # The kernels multiply what a block of queries sees, and nothing of other texts.
    segments, _ = ROWS["a common beginning"]
    query, key, value, _ = heads_of(200, HEADS["two"], torch.float32)
    value[150] = torch.nan
    out = packed_attention(query, key, value, torch.tensor(segments), backend="cpu")
    assert out[150:].isnan().all()
    assert not out[:114].isnan().any()


def test_large_scores_are_not_infinite():
    query, key, value, _ = heads_of(40, HEADS["two"], torch.float32)
    for backend in ("reference", "cpu"):
        tensors = [t.clone().requires_grad_() for t in (query * 100, key * 100, value)]
        out = packed_attention(*tensors, torch.tensor([[0, 40, -1]]), backend=backend)
        out.sum().backward()
        assert all(t.grad.isfinite().all() for t in tensors)
        expected = alone(*(t.detach().double() for t in tensors), [(0, 40, -1)], 40**-0.5, None)
        assert error(out, expected) < 1e-5


def test_under_autocast_as_torchs_own():
    query, key, value, _ = heads_of(20, HEADS["two"], torch.float32)
    segments = torch.tensor([[0, 20, -1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = packed_attention(query, key, value, segments)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, packed_attention(*(t.bfloat16() for t in (query, key, value)), segments))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiled_equals_eager(backend):
    segments, window = ROWS["a window"]
    *heads, dout = (t.requires_grad_() for t in heads_of(300, HEADS["two"], torch.float32))
    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    found = []
    for function in (packed_attention, compiled):
        out = function(*heads, torch.tensor(segments), window=window, backend=backend)
        found.append((out.detach(), *torch.autograd.grad(out, heads, dout)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


def test_gradients_of_gradients_are_refused():
    *heads, _ = (t.requires_grad_() for t in heads_of(10, HEADS["two"], torch.float32))
    out = packed_attention(*heads, torch.tensor([[0, 10, -1]]))
    (gradient,) = torch.autograd.grad(out.sum(), heads[0], create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        gradient.sum().backward()


Q, K, V, _ = heads_of(10, HEADS["two"], torch.float32)
S = torch.tensor([[0, 4, -1], [4, 10, 0]])
BAD = {
    "a gap": ({"segments": torch.tensor([[0, 4, -1], [5, 10, 0]])}, ValueError, r"segment 1 is \[5, 10\).*starts at 4"),
    "an end too early": ({"segments": S[:1]}, ValueError, "end at 4 and there are 10 tokens"),
    "no token": ({"segments": torch.tensor([[0, 0, -1], [0, 10, 0]])}, ValueError, "have a token"),
    "after a later one": ({"segments": torch.tensor([[0, 4, 1], [4, 10, -1]])}, ValueError, "an earlier segment or -1"),
    "segments of int32": ({"segments": S.int()}, ValueError, r"int64 of shape \[S, 3\]"),
    "a scale of 0": ({"scale": 0.0}, ValueError, "scale must be above 0"),
    "a scale that is no number": ({"scale": float("nan")}, ValueError, "scale must be above 0"),
    "no heads": ({"query": Q[:, :0]}, ValueError, "none of them 0"),
    "no dimension": ({"query": Q[..., :0], "key": K[..., :0], "value": V[..., :0]}, ValueError, "none of them 0"),
    "a window of 0": ({"window": 0}, ValueError, "at least 1"),
    "heads that do not fit": ({"query": Q[:, :5]}, ValueError, "H a multiple of G"),
    "another value": ({"value": V[:, :1]}, ValueError, "do not fit"),
    "a batch": ({"query": Q[None]}, ValueError, "query must have shape"),
    "integers": ({"key": K.long()}, TypeError, "key must be a floating-point tensor"),
    "another dtype": ({"key": K.double()}, TypeError, "key is torch.float64 but query is torch.float32"),
    "segments in a list": ({"segments": S.tolist()}, TypeError, "segments must be a tensor, got list"),
    "segments elsewhere": ({"segments": S.to("meta")}, ValueError, "segments is on meta but query is on cpu"),
    "a key elsewhere": ({"key": K.to("meta")}, ValueError, "key is on meta but query is on cpu"),
    "no such backend here": ({"backend": "triton"}, RuntimeError, "no packed attention|Triton|triton"),
}


@pytest.mark.parametrize(("changes", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(changes, kind, message):
    arguments = {"query": Q, "key": K, "value": V, "segments": S, **changes}
    with pytest.raises(kind, match=message):
        packed_attention(**arguments)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_forward_mode_is_refused(backend):
    def of_query(query):
        return packed_attention(query, K, V, S, backend=backend)

    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*scaled_dot_product_attention"):
        torch.func.jvp(of_query, (Q,), (torch.ones_like(Q),))
    of_query(Q)  # outside, nothing is refused


def test_the_compiled_operator_checks_what_it_is_given():
    # It may be called without the function that checks.
    for segments, message in ((BAD["a gap"][0]["segments"], "segment 1"), (S[:1], "end at 4"), (S[:, :2], "S, 3")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.ops.flow_kernels_cpu.packed_attention_fwd(Q, K, V, segments, 1.0, 0, "")
    with pytest.raises(ValueError, match="does not fit"):  # no heads
        torch.ops.flow_kernels_cpu.packed_attention_fwd(Q[:, :0], K, V, S, 1.0, 0, "")
