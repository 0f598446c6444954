"""Samples: which tokens are targets, what is dropped or cut, and how batches are laid out."""

import copy
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_cases import write_rows
from flow_finetune.batches import token_batches
from flow_finetune.config import DataConfig
from flow_finetune.data import (
    ALPACA_TEMPLATE,
    collate,
    end_of_response,
    load_samples,
    read_rows,
    starts_with_bos,
    text_column,
)
from flow_finetune.errors import InputError
from flow_finetune.generate import _stop_ids
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def _config(path, **options):
    return DataConfig(str(path), prompt_field="question", response_field="answer", **options)


def test_targets_are_the_response_and_its_end(tokenizer, qa_file):
    samples = load_samples(_config(qa_file), tokenizer).samples
    rows = [json.loads(line) for line in qa_file.read_text().splitlines()]
    for sample, row in zip(samples, rows, strict=True):
        prompt = sample.input_ids[: sample.start]
        assert prompt[0] == tokenizer.bos_token_id
        assert tokenizer.decode(prompt[1:]) == ALPACA_TEMPLATE.replace("{prompt}", row["question"])
        targets = sample.input_ids[sample.start :]
        assert targets[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(targets[:-1]) == row["answer"]
        assert sample.num_targets == len(targets)


def test_an_end_that_the_tokenizer_appends_is_not_left_inside(tokenizer, tmp_path, qa_file):
    expected = load_samples(_config(qa_file), tokenizer).samples
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert other("a").input_ids[-1] == other.eos_token_id
    for sample, wanted in zip(load_samples(_config(qa_file), other).samples, expected, strict=True):
        assert sample.input_ids.tolist() == wanted.input_ids.tolist()
        assert sample.start == wanted.start


def test_braces_in_prompts_and_templates_stay(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"question": "a {x} {prompt} b", "answer": "c"}])
    sample = load_samples(_config(path, template="{{}} {prompt}>"), tokenizer).samples[0]
    assert tokenizer.decode(sample.input_ids[1 : sample.start]) == "{{}} a {x} {prompt} b>"


def test_chat_template_is_the_tokenizers_own(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"question": "one", "answer": "two"}])
    with pytest.raises(InputError, match="no chat template"):
        load_samples(_config(path, template="chat"), tokenizer)
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} ->"
    try:
        samples = load_samples(_config(path, template="chat"), tokenizer)
    finally:
        tokenizer.chat_template = None
    ids = samples.samples[0].input_ids
    assert tokenizer.decode(ids[: samples.samples[0].start]) == "<s>[user] one ->"
    assert list(ids).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("turns", "end"),
    [
        ("<turn>{{ m.role }}\n{{ m.content | trim }}<end>\n", "<end>"),  # as Gemma's, whose EOS is another token
        ("<turn>{{ m.role }}\n{{ m.content }}<end>\n</s>", "<end>"),  # as Phi-3's
        ("[{{ m.role }}] {{ m.content }}</s>", "</s>"),
        # What closes a part of an answer, as Command R's, is no end.
        ("<turn>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' %}<part>{% endif %}<end>", "<end>"),
        ("<{{ m.role }}>{{ m.content }}", "</s>"),  # the next turn's opening is none either
        ("<turn>{{ m.role }}\n{{ m.content }}\n", "</s>"),
        ("<turn>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n", "</s>"),
        # As gpt-oss, whose last answer ends in EOS and earlier ones in what ends a prompt.
        ("<turn>{{ m.role }}{{ m.content }}{{ '</s>' if loop.last and m.role == 'assistant' else '<end>' }}", "</s>"),
        ("[{{ m.role }}] {{ m.content }}\n", "</s>"),  # nothing ends a turn
        ("{% if m.role != 'user' %}{{ raise_exception('prompts only') }}{% endif %}{{ m.content }}", "</s>"),
    ],
)
def test_a_response_ends_as_the_chat_template_ends_a_turn(tokenizer, tmp_path, turns, end):
    """Up to its end a sample is what the template makes of the whole conversation."""
    path = write_rows(tmp_path / "a.jsonl", [{"question": "one", "answer": "two"}])
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>", "<part>", "<user>", "<assistant>"]})
    opening = turns.partition("{{ m.content")[0].replace("{{ m.role }}", "assistant") if "raise" not in turns else ""
    other.chat_template = (
        f"<s>{{% for m in messages %}}{turns}{{% endfor %}}{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    )
    (sample,) = load_samples(_config(path, template="chat"), other).samples
    assert sample.input_ids[-1] == other.convert_tokens_to_ids(end)
    if "raise" not in turns:
        messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        whole = other.apply_chat_template(messages, tokenize=False)
        through = whole.index("two") + len("two")
        assert other.decode(sample.input_ids) == whole[:through] + end
    plain = load_samples(_config(path, template="{prompt}"), other).samples[0]
    assert plain.input_ids[-1] == other.eos_token_id
    assert end_of_response("chat", other) in _stop_ids(SimpleNamespace(model=None), other)


def test_samples_without_targets_are_dropped_and_cut_ones_counted(tokenizer, tmp_path):
    rows = [
        {"question": "short", "answer": "yes"},
        {"question": "blank", "answer": "  "},
        {"question": "long " * 200, "answer": "never reached"},
        {"question": "short", "answer": "cut here " * 100},
    ]
    samples = load_samples(_config(write_rows(tmp_path / "a.jsonl", rows), max_length=120), tokenizer)
    assert [s.id for s in samples.samples] == ["0", "3"]
    assert samples.dropped == ["1", "2"]
    assert (samples.num_read, samples.num_truncated) == (4, 2)
    assert len(samples.samples[1].input_ids) == 120
    assert "2 of 4 dropped" in samples.describe()
    assert "2 truncated" in samples.describe()


def test_all_samples_without_targets_is_an_error(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"question": "q", "answer": ""}] * 3)
    with pytest.raises(InputError, match="none of the 3 samples"):
        load_samples(_config(path), tokenizer)


def test_every_format_gives_the_same_samples(tokenizer, tmp_path):
    rows = [{"question": f"q, {i}", "answer": f'a "{i}"'} for i in range(5)]
    jsonl = write_rows(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(Path(jsonl).read_text())
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "c.parquet")
    quoted = "".join('"{}","{}"\n'.format(r["question"], r["answer"].replace('"', '""')) for r in rows)
    (tmp_path / "d.csv").write_text("question,answer\n" + quoted)
    prints = [
        load_samples(_config(tmp_path / name), tokenizer).fingerprints
        for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.csv")
    ]
    assert all(p == prints[0] for p in prints)


def test_ids_come_from_the_field_and_must_be_unique(tokenizer, tmp_path):
    rows = [{"question": "q", "answer": "a", "key": key} for key in ("x", "y", "x")]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert [s.id for s in load_samples(_config(path), tokenizer).samples] == ["0", "1", "2"]
    with pytest.raises(InputError, match="'x'"):
        load_samples(_config(path, id_field="key"), tokenizer)
    assert [s.id for s in load_samples(_config(path, id_field="key", limit=2), tokenizer).samples] == ["x", "y"]


@pytest.mark.parametrize(
    ("change", "name"),
    [({"template": "{prompt} ="}, "template"), ({"max_length": 99}, "template"), ({"limit": 3}, "data")],
)
def test_fingerprints_change_with_what_they_name(tokenizer, qa_file, change, name):
    first = load_samples(_config(qa_file), tokenizer).fingerprints
    second = load_samples(_config(qa_file, **change), tokenizer).fingerprints
    assert {key for key in first if first[key] != second[key]} == {name}


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"question": "q", "reply": "a"}], "no field 'answer'; it has question, reply"),
        ([{"question": "q", "answer": 3}], "row 0 is int"),
        ([{"question": "q", "answer": "a"}, {"question": "q", "answer": None}], "row 1 is NoneType"),
    ],
)
def test_fields_that_cannot_be_used_are_named(tokenizer, tmp_path, rows, match):
    with pytest.raises(InputError, match=match):
        load_samples(_config(write_rows(tmp_path / "a.jsonl", rows)), tokenizer)


def test_files_that_cannot_be_used_are_named(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"question": "q", "answer"\n')
    (tmp_path / "a.xlsx").write_text("x")
    for name, match in (
        ("none.jsonl", "no such file"), ("empty.jsonl", r"empty\.jsonl"), ("broken.jsonl", "could not be read"),
        ("a.xlsx", "none of"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match) as caught:
            load_samples(_config(tmp_path / name), tokenizer)
        assert name in str(caught.value)


def test_hub_ids_may_hold_dots_and_paths_are_no_hub_ids(monkeypatch, tmp_path):
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_dict({"prompt": ["q"], "response": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    for name in ("squad", "someone/set", "teknium/OpenHermes-2.5"):
        assert len(read_rows(name, "test", subset="main")) == 1
    assert asked == [(name, "main", "test") for name in ("squad", "someone/set", "teknium/OpenHermes-2.5")]
    for name in ("rows.jsonl", "someone/rows.jsonl.gz", "./set", "~/set", "/set", "a/b/c", "a/rows.tsv", "a.txt"):
        with pytest.raises(InputError, match="no such file"):
            read_rows(name)
    assert len(asked) == 3
    # A folder is the library's to read.
    (tmp_path / "local/set.d").mkdir(parents=True)
    assert len(read_rows("local/set.d", "test")) == 1
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q"}')
    with pytest.raises(InputError, match=r"split 'test' is of a hub data set; rows\.jsonl is a file"):
        read_rows("rows.jsonl", "test")


def test_a_hub_data_set_of_several_subsets_says_which(monkeypatch):
    def load_dataset(name, subset, split):
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nExample: ..."
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"several subsets; give one as subset \(--subset\).*\['main', 'socratic'\]"):
        read_rows("openai/gsm8k")


CHOICES = [{"question": f"q{i}", "choices": [f" a{i}", f" b{i}", f" c{i}"], "answer": i % 3} for i in range(6)]


def test_a_response_may_be_one_of_several_choices(tokenizer, tmp_path):
    path = write_rows(tmp_path / "choices.jsonl", CHOICES)
    texts = [{"question": row["question"], "answer": row["choices"][row["answer"]]} for row in CHOICES]
    assert [row["answer"] for row in texts] == [" a0", " b1", " c2", " a3", " b4", " c5"]
    found = load_samples(_config(path, choices_field="choices"), tokenizer)
    wanted = load_samples(_config(write_rows(tmp_path / "texts.jsonl", texts)), tokenizer)
    assert [s.input_ids.tolist() for s in found.samples] == [s.input_ids.tolist() for s in wanted.samples]
    assert found.fingerprints == wanted.fingerprints


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"choices": [" a", " b"], "answer": 2}, r"answer of row 1 is 2, which is not the index of one of its 2"),
        ({"choices": [" a", " b"], "answer": None}, "answer of row 1 is None"),
        ({"choices": None, "answer": 0}, "choices of row 1 must be a list of non-empty texts, got None"),
    ],
)
def test_choices_that_cannot_be_used_are_named(tokenizer, tmp_path, row, match):
    rows = [CHOICES[0], {"question": "q", **row}]
    with pytest.raises(InputError, match=match):
        load_samples(_config(write_rows(tmp_path / "a.jsonl", rows), choices_field="choices"), tokenizer)
    with pytest.raises(InputError, match="no field 'options'; it has question, choices, answer"):
        load_samples(_config(tmp_path / "a.jsonl", choices_field="options"), tokenizer)


def test_rows_of_a_file_are_chosen_as_of_a_split(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"number": i} for i in range(8)])
    for split, wanted in (
        ("train", range(8)), ("train[:3]", range(3)), ("train[6:]", (6, 7)), ("train[-1:]", (7,)),
        ("train[:25%]", (0, 1)), ("train[:1]+train[4:6]", (0, 4, 5)),
    ):  # fmt: skip
        assert list(read_rows(path, split)["number"]) == list(wanted)
    assert list(read_rows(path, "train[2:]", limit=2)["number"]) == [2, 3]
    for split, match in (
        ("train[8:]", "corresponds to no data"), ("train[3", "could not be read"), ("test[:3]", "split 'test.*' is of a hub data set"),
        ("train[:2]+test", "is of a hub data set"), ("training", "is of a hub data set"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            read_rows(path, split)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_token_batches_hold_every_sample_once_within_the_budget(lengths, max_tokens):
    batches = token_batches(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens


def test_collate_points_at_the_position_before_each_target(tokenizer, qa_file):
    samples = load_samples(_config(qa_file), tokenizer).samples[:6]
    batch = collate(samples, tokenizer.pad_token_id)
    flat = batch.input_ids.reshape(-1)
    assert flat[batch.positions + 1].tolist() == batch.target.tolist()
    assert batch.cu_seqlens.diff().tolist() == [s.num_targets for s in samples]
    assert batch.attention_mask.sum(1).tolist() == [len(s.input_ids) for s in samples]
    assert np.array_equal(batch.input_ids[2, : len(samples[2].input_ids)], samples[2].input_ids)


def test_bos_is_used_where_the_tokenizer_uses_it(tokenizer, tmp_path):
    import tiny_model

    assert starts_with_bos(tokenizer)
    without = AutoTokenizer.from_pretrained(tiny_model.build(tmp_path, bos=False))
    assert not starts_with_bos(without)


def test_a_template_that_writes_the_day_writes_the_same_one_every_day(tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y %H:%M:%S.%f') }} {% endif -%}"
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} ->"
    )
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}\n')
    first, second = (load_samples(DataConfig(str(path), template="chat"), other).samples[0] for _ in range(2))
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert "26 Jul 2024 00:00:00.000000" in other.decode(first.input_ids)
    # A day that is asked for in another way is a part of the fingerprint.
    asked = load_samples(DataConfig(str(path), template="chat"), other).fingerprints
    other.chat_template = other.chat_template.replace("strftime_now('", "strftime_now('' ~ '")
    first, second = (load_samples(DataConfig(str(path), template="chat"), other).fingerprints for _ in range(2))
    assert first["template"] != second["template"] != asked["template"]


@pytest.mark.parametrize("name", ["data[1]/d.jsonl", "q?.jsonl", "part*.jsonl"])
def test_a_path_is_no_pattern(tmp_path, name):
    """As a pattern each matches its neighbour, and some of them not themselves."""
    for other in (name, name.replace("[1]", "1").replace("?", "1").replace("*", "9")):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / other, [{"from": other}])
    assert read_rows(str(tmp_path / name))["from"] == [name]


def test_two_colons_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"a::b.jsonl has :: in its name"):
        read_rows(write_rows(tmp_path / "a::b.jsonl", [{"a": 1}]))


@pytest.mark.parametrize("cache", ["~nobody-here/.cache/huggingface/datasets", "HERE/a.jsonl/datasets"])
def test_without_a_home_it_says_what_to_set(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache.replace("HERE", str(tmp_path)))
    with pytest.raises(InputError, match="set HF_HOME to a directory that can"):
        read_rows(write_rows(tmp_path / "a.jsonl", [{"a": 1}]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "relative/datasets")
    assert read_rows(str(tmp_path / "a.jsonl"))["a"] == [1]


def test_text_that_looks_like_dates_is_named_and_kept_in_csv(tmp_path):
    rows = [{"question": "When?", "answer": "2024-01-01"}, {"question": "And then?", "answer": "2024-01-02 10:00:00"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"a\.jsonl: field 'answer' is taken for dates.*; save the rows as CSV"):
        text_column(read_rows(str(tmp_path / "a.jsonl")), "answer", "a.jsonl")
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
    assert text_column(read_rows(str(tmp_path / "a.csv")), "answer", "a.csv") == [row["answer"] for row in rows]
