"""Multiple choice against plain loops over the full logits of a tiny model; bad questions."""

import itertools
import re

import numpy as np
import pytest
from evaluation_cases import MC, TEXT, metrics_of, run, sliding_window_model, target_log_probabilities, write_rows
from flow_finetune import choices, tasks
from flow_finetune.config import TaskConfig
from flow_finetune.data import Sample
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import read_items
from flow_finetune.packing import packs_texts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def packed(tiny, request, monkeypatch):
    monkeypatch.setattr(tiny[0], "packing", request.param)
    assert packs_texts(tiny[0]) == request.param
    return request.param


def test_multiple_choice(tiny, files, tmp_path, packed):
    lm, tokenizer = tiny
    config = TaskConfig("multiple_choice", files["mc"])
    result = run(tiny, [config], tmp_path / "out")
    expected, plain, by_bytes = [], [], []
    for row in MC:
        sums = []
        for choice in row["choices"]:
            ids = tokenizer(row["context"] + choice, add_special_tokens=False).input_ids
            # Characters covered by the first k tokens; these texts split no character at the boundary.
            start = next(k for k in range(len(ids)) if len(tokenizer.decode(ids[: k + 1])) > len(row["context"]))
            front = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
            if tokenizer.bos_token_id is None and row["context"]:
                front = []
            sums.append(sum(target_log_probabilities(lm, front + ids, len(front) + start)[0]))
        expected += sums
        lengths = [len(c.encode()) for c in row["choices"]]
        plain.append(int(np.argmax(sums)) == row["answer"])
        by_bytes.append(int(np.argmax(np.divide(sums, lengths))) == row["answer"])
    # Both metrics are tried: neither is all right or all wrong, and they differ.
    assert 0 < sum(plain) < len(MC)
    assert 0 < sum(by_bytes) < len(MC)
    assert plain != by_bytes
    items = read_items(tmp_path / "out")
    assert items["choices", "accuracy"].value.tolist() == plain
    assert items["choices", "accuracy_bytes"].value.tolist() == by_bytes
    assert metrics_of(result, "choices")["accuracy"]["value"] == pytest.approx(np.mean(plain))
    task = tasks.prepare([config], tokenizer)[0]
    found = choices.score_groups(lm, task.groups(), tokenizer.pad_token_id, 100, "full", "choices")
    np.testing.assert_allclose(-found.loss_sum, expected, rtol=1e-5)


def test_contexts_are_run_once(tiny, files, packed):
    lm, tokenizer = tiny
    groups = tasks.prepare([TaskConfig("multiple_choice", files["mc"])], tokenizer)[0].groups()
    assert [len(group) for group in groups] == [len(row["choices"]) for row in MC]
    _, num_tokens = choices.score_choices(lm, groups, tokenizer.pad_token_id)
    if packed:
        # Every token once but for short beginnings in common, so not much less than all that begin differently.
        texts = [c.input_ids.tolist() for g in groups for c in g]
        different = {tuple(text[:k]) for text in texts for k in range(1, len(text) + 1)}
        assert len(different) <= num_tokens <= len(different) + 8 * len(texts)
        assert num_tokens < 0.8 * sum(map(len, texts))
        return
    # The last token of a context is run with each choice, because it predicts the choice's first.
    once = sum(
        g[0].start - 1 + sum(len(c.input_ids) - c.start + 1 for c in g)
        for g in groups
        if len({c.start for c in g}) == 1
    )
    rest = [g for g in groups if len({c.start for c in g}) > 1]
    assert len(rest) <= 1
    assert num_tokens <= once + sum(len(c.input_ids) for g in rest for c in g)
    assert num_tokens < 0.8 * sum(len(c.input_ids) for g in groups for c in g)


def test_choices_of_a_sliding_window_model():
    sliding = sliding_window_model()
    rng = np.random.default_rng(0)
    groups, expected = [], []
    for length in (1, 3, 9, 20, 33):
        context = rng.integers(3, 97, length)
        endings = [rng.integers(3, 97, n) for n in (1, 4, 11)]
        groups.append(
            [Sample("", np.concatenate([context, e]).astype(np.int32), length, "", "", False) for e in endings]
        )
    for sample in itertools.chain.from_iterable(groups):
        expected.append(-sum(target_log_probabilities(sliding, sample.input_ids.tolist(), sample.start)[0]))
    scores, _ = choices.score_choices(sliding, groups, 0)
    np.testing.assert_allclose(scores.loss_sum, expected, rtol=1e-5)


def test_straddling_token_belongs_to_the_choice(tiny, files):
    _, tokenizer = tiny
    sample = tasks.prepare([TaskConfig("multiple_choice", files["mc"])], tokenizer)[0].samples[3]
    assert sample.id == "1:0"
    assert tokenizer.decode(sample.input_ids[sample.start :]) == " answer is 9"


def test_long_contexts_lose_their_beginning(tiny, tmp_path):
    _, tokenizer = tiny
    source = write_rows(tmp_path / "long.jsonl", [{"context": TEXT, "choices": [" a", " the answer"], "answer": 0}])
    samples = tasks.prepare([TaskConfig("multiple_choice", source, max_length=20)], tokenizer)[0].samples
    assert all(s.truncated and len(s.input_ids) == 20 for s in samples)
    assert tokenizer.decode(samples[1].input_ids[samples[1].start :]) == " the answer"
    assert (samples[0].input_ids[0] == tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)
    with pytest.raises(InputError, match="choice 1 of row 0 alone fills max_length=2"):
        tasks.prepare([TaskConfig("multiple_choice", source, max_length=2)], tokenizer)


def test_rows_of_a_split_are_asked(tiny, tmp_path):
    """A slice's questions are those of the file, as are its right answers when they are read as texts."""
    rows = [{"context": f"{i} and", "choices": [f" {i}", " 7", " the"][: 2 + i % 2], "answer": i % 2} for i in range(6)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    tail = write_rows(tmp_path / "tail.jsonl", rows[4:])
    texts = {"prompt_field": "context", "response_field": "answer", "choices_field": "choices"}
    for kind, options in (("multiple_choice", {}), ("completion", texts), ("qa", {**texts, "num_generate": 0})):
        part, whole, own = (
            tasks.prepare([TaskConfig(kind, path, **options, **chosen)], tiny[1])[0]
            for path, chosen in ((source, {"split": "train[4:]"}), (source, {}), (tail, {}))
        )
        assert part.fingerprint() == own.fingerprint() != whole.fingerprint()
        assert part.num_items == 2
        if kind != "multiple_choice":
            assert [s.response for s in whole.samples] == [row["choices"][row["answer"]] for row in rows]


GOOD = {"context": "a", "choices": [" b", " c"], "answer": 0}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**GOOD, "answer": 2}, "answer of row 1 is 2, which is not the index"),
        ({**GOOD, "answer": -1}, "answer of row 1 is -1"),
        ({**GOOD, "answer": "A"}, "answer of row 1 is 'A'"),
        ({**GOOD, "answer": 0.5}, "answer of row 1 is 0.5"),
        ({**GOOD, "choices": "bc"}, "choices of row 1 must be a list of non-empty texts, got 'bc'"),
        ({**GOOD, "choices": [" b", 3]}, "choices of row 1 must be a list of non-empty texts"),
        ({**GOOD, "choices": [" b", ""]}, "choices of row 1 must be a list of non-empty texts"),
        ({**GOOD, "choices": [" b"]}, "row 1 has 1 choice; give at least 2"),
        ({**GOOD, "context": 3}, "'context' of row 1 is int"),
    ],
)
def test_bad_questions(tiny, tmp_path, bad, message):
    source = write_rows(tmp_path / "bad.jsonl", [GOOD, bad])
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run(tiny, [TaskConfig("multiple_choice", source)], tmp_path / "out")
    assert source in str(caught.value)
    assert not (tmp_path / "out").exists()


def question(rng, context, lengths):
    """Choices of these numbers of tokens after a context of `context` tokens, the last of which is run with each."""
    shared = rng.integers(0, 50, context + 1)
    rests = [np.concatenate([[50 + n], rng.integers(0, 50, length - 1)]) for n, length in enumerate(lengths)]
    return [Sample("", np.concatenate([shared, r]), context + 1, "", "", False) for r in rests]


def padded_tokens(groups, batch, share_contexts=True):
    """Tokens that the contexts and the choices of a batch are padded to, and all that are not padding."""
    splits = [choices.split_length(groups[i]) if share_contexts else 0 for i in batch]
    rests = [len(c.input_ids) - split for i, split in zip(batch, splits, strict=True) for c in groups[i]]
    return max(splits) * len(splits), max(rests) * len(rests), sum(splits) + sum(rests)


def test_batches_are_filled_without_much_padding():
    """Every question once, both limits kept, and little padding where contexts and choices differ in length."""
    rng = np.random.default_rng(0)
    lengths = zip(rng.integers(5, 120, 300), rng.integers(2, 40, 300), strict=True)
    groups = [question(rng, context, [longest] * 4) for context, longest in lengths]
    batches = choices.choice_batches(groups, 4096)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    context, rest, tokens = np.transpose([padded_tokens(groups, batch) for batch in batches])
    assert max(*context, *rest) <= 4096
    assert (context + rest).sum() < 1.25 * tokens.sum()
    assert sorted(choices.choice_batches(groups[:3], 1)) == [[0], [1], [2]]
    assert choices.choice_batches([], 4096) == []


def least_cost(groups, order, batch_tokens, batch_cost, share_contexts):
    """The least cost of all ways to cut `order`, each of which is tried."""
    found = []
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        starts = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(order)]
        cost = 0
        for batch in (order[a:b] for a, b in itertools.pairwise(starts)):
            *parts, _ = padded_tokens(groups, batch, share_contexts)
            if len(batch) > 1 and max(parts) > batch_tokens:
                break
            cost += sum(parts) + batch_cost
        else:
            found.append(cost)
    return min(found)


@pytest.mark.parametrize("batch_cost", [0, 7, 60, 512])
@pytest.mark.parametrize("kind", ["questions", "whole", "single"])
def test_batches_are_the_cheapest(kind, batch_cost, monkeypatch):
    """`whole`: contexts are run with each choice; `single`: samples on their own, which share nothing."""
    monkeypatch.setattr(choices, "_BATCH_COST", batch_cost)
    rng = np.random.default_rng(batch_cost)
    sizes = set()
    for batch_tokens in (25, 60, 120, 250, 4096):
        groups = []
        for context in (0, *rng.integers(0, 40, 8)):  # an empty context; at limit 25 many questions exceed it alone
            num_choices = 1 if kind == "single" else rng.integers(2, 5)
            groups.append(question(rng, context, rng.integers(1, 14, num_choices)))
        share = kind != "whole"
        batches = choices.choice_batches(groups, batch_tokens, share_contexts=share)
        assert batches == choices.choice_batches(groups, batch_tokens, share_contexts=share)
        order = [i for batch in batches for i in batch]
        assert sorted(order) == list(range(len(groups)))
        parts = [padded_tokens(groups, batch, share)[:2] for batch in batches]
        assert all(len(batch) == 1 or max(p) <= batch_tokens for batch, p in zip(batches, parts, strict=True))
        cost = np.sum(parts) + batch_cost * len(batches)
        assert cost == least_cost(groups, order, batch_tokens, batch_cost, share)
        sizes.update(len(batch) for batch in batches)
        if kind != "questions":
            lengths = [max(len(c.input_ids) for c in groups[i]) for i in order]
            assert lengths == sorted(lengths, reverse=True)
    assert len(sizes) > 1 or not batch_cost


@pytest.mark.parametrize("large", [(90, [2, 2]), (3, [40, 5, 3]), (150, [20] * 4)])
def test_a_question_beyond_the_limit_is_a_batch(large):
    """Too large by its context, by its choices or by both; the others still share batches."""
    rng = np.random.default_rng(0)
    groups = [question(rng, context, [rest] * 2) for context in (2, 5, 5, 9) for rest in (3, 19)]
    batches = choices.choice_batches([*groups, question(rng, *large)], 80)
    assert [len(groups)] in batches
    others = [batch for batch in batches if batch != [len(groups)]]
    assert sorted(i for batch in others for i in batch) == list(range(len(groups)))
    assert all(max(padded_tokens(groups, batch)[:2]) <= 80 for batch in others)
    assert max(len(batch) for batch in others) > 1
