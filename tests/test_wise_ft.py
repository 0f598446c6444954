"""WiSE-FT: the exact average of two directories, in the memory of a piece, and what cannot be averaged is named."""

import json
import shutil
import threading
import time
import tracemalloc

import pytest
import torch
from flow_finetune import wise_ft as wise_ft_module
from flow_finetune.cli import app
from flow_finetune.errors import InputError
from flow_finetune.storage import exclusive_file
from flow_finetune.wise_ft import read_headers, wise_ft
from processes import peak_allocated
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner


def write(directory, tensors, file="model.safetensors"):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / file, metadata={"format": "pt"})
    return directory


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (7, 5), "a.bias": (3,), "c": (), "empty": (0, 4), "d": (2, 3, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("piece", [16, 2**24])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                    (torch.bfloat16, torch.float32), (torch.float64, torch.float16)])  # fmt: skip
def test_weights_are_the_formulas(tmp_path, monkeypatch, piece, dtypes):
    monkeypatch.setattr(wise_ft_module, "PIECE_BYTES", piece)
    p, f = tensors(0, dtypes[0]), tensors(1, dtypes[1])
    pretrained, finetuned = write(tmp_path / "p", p), write(tmp_path / "f", f)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    for alpha in (0.0, 0.3, 0.5, 1.0):
        found = load_file(wise_ft(pretrained, finetuned, alpha, tmp_path / f"out-{alpha}") / "model.safetensors")
        assert found.keys() == f.keys()
        for name, tensor in found.items():
            expected = ((1 - alpha) * p[name].to(wide) + alpha * f[name].to(wide)).to(dtypes[1])
            assert tensor.dtype == dtypes[1]
            assert torch.equal(tensor, expected), (alpha, name)
            if alpha == 1.0:
                assert torch.equal(tensor, f[name])


def test_the_average_of_real_directories_loads_and_holds_no_logs(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p) * 0.1
    # Several files, as large models have; the pre-trained model is in one.
    model.save_pretrained(tmp_path / "f", max_shard_size="40KB")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "f")
    assert len(list((tmp_path / "f").glob("*.safetensors"))) > 1
    (tmp_path / "f/train").mkdir()
    (tmp_path / "f/train/log.jsonl").write_text("{}")
    (tmp_path / "f/evaluation.json").write_text("{}")
    arguments = [
        str(tiny_model_dir),
        str(tmp_path / "f"),
        "--alpha",
        "0.25",
        "--alpha",
        "0.5",
        "-o",
        str(tmp_path / "o"),
    ]
    result = CliRunner().invoke(app, ["wise-ft", *arguments])
    assert result.exit_code == 0, result.output
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    for alpha in (0.25, 0.5):
        directory = tmp_path / f"o/alpha-{alpha}"
        found = AutoModelForCausalLM.from_pretrained(directory).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(found[name], (1 - alpha) * start[name] + alpha * tensor)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert tokenizer("How?").input_ids == AutoTokenizer.from_pretrained(tiny_model_dir)("How?").input_ids
        assert not (directory / "evaluation.json").exists()
        summary = json.loads((directory / "train/summary.json").read_text())
        assert (summary["method"]["wise_ft"], summary["method"]["of"]) == (alpha, "f")
        assert [p.name for p in (directory / "train").iterdir()] == ["summary.json"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_at_most_three_tensors_of_the_largest_size(tmp_path, dtype):
    """Both allocators are watched: tracemalloc sees Python's and numpy's, the profiler torch's."""
    num = 2**21
    for seed, name in enumerate("pf"):
        torch.manual_seed(seed)
        write(tmp_path / name, {f"t{i}": torch.randn(num).to(dtype) for i in range(4)})
    tracemalloc.start()
    most = peak_allocated(lambda: wise_ft(tmp_path / "p", tmp_path / "f", 0.4, tmp_path / "out"))
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    piece = wise_ft_module.PIECE_BYTES // 8 * dtype.itemsize
    # Two pieces at least were seen; the sum of both allocators' peaks stays below the bound.
    assert python >= 2 * piece
    assert python + most <= 3 * num * dtype.itemsize


def test_integers_are_the_finetuned_models(tmp_path):
    for name, value in (("p", 3), ("f", 5)):
        write(tmp_path / name, {"steps": torch.tensor([value]), "w": torch.full((2,), float(value))})
    found = load_file(wise_ft(tmp_path / "p", tmp_path / "f", 0.5, tmp_path / "out") / "model.safetensors")
    assert found["steps"].tolist() == [5]
    assert found["w"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("d"), r"f lacks the tensor d, so the two models cannot be averaged"),
        (lambda t: t.update(extra=torch.ones(2)), r"p lacks the tensor extra"),
        (lambda t: t.update(d=torch.ones(4, 3, 2)), r"tensor d has shape \(2, 3, 4\) in .*p and \(4, 3, 2\) in .*f"),
        (lambda t: t.update(d=torch.ones(2, 3, 4, dtype=torch.int32)), r"tensor d is F32 in .* and I32"),
    ],
)
def test_models_that_differ_are_refused_by_tensor(tmp_path, change, match):
    other = tensors(1)
    change(other)
    with pytest.raises(InputError, match=match):
        wise_ft(write(tmp_path / "p", tensors(0)), write(tmp_path / "f", other), 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_files_wrong_shares_and_directories_in_use_are_named(tmp_path):
    p, f = write(tmp_path / "p", tensors(0)), write(tmp_path / "f", tensors(1))
    with pytest.raises(InputError, match=r"alpha must be in \[0, 1\], got 1.5"):
        wise_ft(p, f, 1.5, tmp_path / "out")
    with pytest.raises(InputError, match="none has no safetensors weights"):
        wise_ft(tmp_path / "none", f, 0.5, tmp_path / "out")
    cut = shutil.copytree(p, tmp_path / "cut")
    content = (p / "model.safetensors").read_bytes()
    for damaged, match in ((content[:-8], "is cut off"), (b"garbage", "not a safetensors file"),
                           (content[:8] + b"?" + content[9:], "not a safetensors file"),
                           *((len(h).to_bytes(8, "little") + h, "not a safetensors file")
                             for h in (b"[1]", b'{"a": {}}', b'{"a": {"data_offsets": [0]}}', b'{"a": 3}'))):  # fmt: skip
        (cut / "model.safetensors").write_bytes(damaged)
        with pytest.raises(InputError, match=match):
            read_headers(cut)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="used by something else"):
        wise_ft(p, f, 0.5, tmp_path / "used")


def test_only_what_transformers_loads_is_averaged(tmp_path):
    """Downloads may hold the weights a second time under other names."""
    p, f = write(tmp_path / "p", tensors(0)), write(tmp_path / "f", tensors(1))
    expected = load_file(wise_ft(p, f, 0.5, tmp_path / "plain") / "model.safetensors")
    save_file({"layers.0.w": torch.ones(2)}, p / "consolidated.safetensors")
    assert read_headers(p).keys() == tensors(0).keys()
    found = load_file(wise_ft(p, f, 0.5, tmp_path / "single") / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    # The same model in two files.
    (p / "model.safetensors").unlink()
    names = sorted(tensors(0))
    parts = {f"model-{i}.safetensors": {n: tensors(0)[n] for n in names[i::2]} for i in range(2)}
    for name, part in parts.items():
        save_file(part, p / name)
    index = {"weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
    (p / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load_file(wise_ft(p, f, 0.5, tmp_path / "sharded") / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    (p / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"p lacks model-1.safetensors, which model.safetensors.index.json names"):
        read_headers(p)
    (p / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match=r"index.json does not say which files hold the weights"):
        read_headers(p)


def test_an_average_that_is_there_is_kept_and_another_is_refused(tmp_path, capsys):
    p, f = write(tmp_path / "p", tensors(0)), write(tmp_path / "f", tensors(1))
    out = wise_ft(p, f, 0.5, tmp_path / "out")
    before = (out / "model.safetensors").stat().st_mtime_ns
    wise_ft(p, f, 0.5, out)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert "holds this average already" in capsys.readouterr().err
    # The models may have been copied to another place since.
    moved = [shutil.copytree(path, tmp_path / "moved" / path.name, copy_function=shutil.copy) for path in (p, f)]
    wise_ft(*moved, 0.5, out, of="f")
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(
        InputError, match="out holds an average already, of the method 'out' with other options; remove"
    ):
        wise_ft(p, f, 0.4, out)
    write(f, tensors(2))
    with pytest.raises(InputError, match="out holds an average already, of other models; remove it to average again"):
        wise_ft(p, f, 0.5, out)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes").touch()
    with pytest.raises(InputError, match="used by something else"):
        wise_ft(p, f, 0.5, tmp_path / "used")


def test_averages_of_before_are_known_by_the_times_of_their_sources(tmp_path):
    p, f = write(tmp_path / "p", tensors(0)), write(tmp_path / "f", tensors(1))
    path = wise_ft(p, f, 0.5, tmp_path / "out") / "train/summary.json"
    summary = json.loads(path.read_text())
    summary["sources"] = [[s["name"], s["bytes"], s["mtime_ns"]] for s in summary["sources"]]
    path.write_text(json.dumps(summary))
    wise_ft(p, f, 0.5, tmp_path / "out")
    summary["sources"][1][2] += 1
    path.write_text(json.dumps(summary))
    with pytest.raises(InputError, match="of other models"):
        wise_ft(p, f, 0.5, tmp_path / "out")


def test_an_average_that_another_process_makes_is_waited_for(tmp_path):
    p, f = write(tmp_path / "p", tensors(0)), write(tmp_path / "f", tensors(1))
    with exclusive_file(tmp_path / "out"):
        thread = threading.Thread(target=wise_ft, args=(p, f, 0.5, tmp_path / "out"))
        thread.start()
        time.sleep(0.3)
        assert not (tmp_path / "out").exists()
    thread.join(60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "out", "p"]
    assert load_file(tmp_path / "out/model.safetensors").keys() == tensors(0).keys()


def test_quantised_weights_are_refused(tmp_path):
    for dtype, name in ((torch.float8_e4m3fn, "scale"), (torch.uint8, "b.weight")):
        changed = {name: torch.ones(4).to(dtype)}
        pretrained, finetuned = write(tmp_path / f"p-{name}", changed), write(tmp_path / f"f-{name}", changed)
        with pytest.raises(
            InputError, match=f"the tensor {name} of .* is (F8_E4M3|U8), quantised, and cannot be averaged"
        ):
            wise_ft(pretrained, finetuned, 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ends_are_the_models_own_values_also_where_the_other_is_infinite(tmp_path):
    p, f = {"a": torch.tensor([1.0, float("inf")])}, {"a": torch.tensor([float("inf"), 2.0])}
    pretrained, finetuned = write(tmp_path / "p", p), write(tmp_path / "f", f)
    for alpha, expected in ((0.0, p), (1.0, f)):
        found = load_file(wise_ft(pretrained, finetuned, alpha, tmp_path / f"out-{alpha}") / "model.safetensors")
        assert torch.equal(found["a"], expected["a"])
