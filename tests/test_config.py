"""Configuration files: read strictly, wrong entries named."""

import pytest
from flow_finetune.config import RunConfig, from_mapping, read_yaml
from flow_finetune.errors import InputError

_MINIMAL = {"model": {"source": "m"}, "data": {"source": "d"}}


def test_defaults_and_given_values():
    config = from_mapping(RunConfig, {**_MINIMAL, "train": {"learning_rate": "1e-4", "epochs": 3}}, "file")
    assert (config.train.learning_rate, config.train.epochs, config.train.batch_size) == (1e-4, 3, 16)
    assert [m.name for m in config.methods] == ["standard", "flow"]
    tasks = [{"kind": "qa", "source": "q"}, {"kind": "perplexity", "source": "p", "window": 64}]
    assert [t.window for t in from_mapping(RunConfig, {**_MINIMAL, "tasks": tasks}, "file").tasks] == [256, 64]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"trian": {}}, "unknown key 'trian'; did you mean 'train'"),
        ({"train": {"epochs": "two"}}, "file: train: epochs must be int, got 'two'"),
        ({"train": {"epochs": True}}, "must be int"),
        ({"train": [1]}, "file: train must be a mapping, got list"),
        ({"methods": {"name": "a"}}, "file: methods must be a list"),
        ({"methods": [{"nam": "a"}]}, r"methods\[0\] has an unknown key 'nam'"),
        ({"model": {}}, "file: model lacks 'source'"),
        ({"data": {"source": "d", "limit": "all"}}, "limit must be int or nothing, got 'all'"),
    ],
)
def test_wrong_entries_are_named(change, match):
    with pytest.raises(InputError, match=match):
        from_mapping(RunConfig, {**_MINIMAL, **change}, "file")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: gr\xfc\xdfe".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.yaml is not UTF-8 text"):
        read_yaml(tmp_path / "latin.yaml")
    (tmp_path / "twice.yaml").write_text("train:\n  seed: 1\n  epochs: 2\n  seed: 3\n")
    with pytest.raises(InputError, match=r"(?s)twice\.yaml is not valid YAML: found 'seed' twice.*line 2"):
        read_yaml(tmp_path / "twice.yaml")
    (tmp_path / "merged.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(tmp_path / "merged.yaml")["b"] == {"x": 1, "y": 3}
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="not valid YAML"):
        read_yaml(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="must hold a mapping, got list"):
        read_yaml(tmp_path / "list.yaml")
