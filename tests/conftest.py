"""Fixtures: which backends the operator tests run on, and what each of them can do. The one place that lists either."""

import atexit
import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path

# datasets reads both when it is imported, here and in every process that a test starts. It copies each file that it
# reads: not into the user's cache.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="flow-kernels-tests-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import device_shuttle
import hypothesis
import pytest
import tiny_images
import tiny_model
import torch
from evaluation_cases import MC, QA, TEXT, write_rows
from flow_finetune.config import ModelConfig
from flow_finetune.models import load_model
from flow_finetune.vision.config import read_image_run
from flow_finetune.vision.pipeline import prepare, run

from flow_kernels import backends, cpu

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# Nothing in it can run without a GPU.
collect_ignore = [] if os.environ.get("DEVICE") == "cuda" else ["test_cuda_device.py", "test_cuda_training.py"]

# `make test DEVICE=cuda`: the Triton kernels of the operator tests run on the GPU, compiled; the tests stay on the CPU.
if os.environ.get("DEVICE") == "cuda":
    device_shuttle.serve_the_cpu_from("cuda", "triton")

# A backend that can serve this machine's CPU joins every operator test by itself. Triton's interpreter is a hundred times
# slower than a kernel: `make test` gives it its own tests, `make test-triton` this matrix, by naming it here.
_DEFAULT = "reference cpu triton" if os.environ.get("DEVICE") == "cuda" else "reference cpu"
_NAMED = os.environ.get("OPERATOR_BACKENDS", _DEFAULT).split()
BACKENDS = [name for name in backends.BACKENDS if name in _NAMED and backends.status(name, "cpu").available]
# A backend that was asked for and is not there would leave its tests out in silence. (With a GPU, "the CPU" is served
# from it; the compiled CPU kernels are x86-64's, so not those of every machine with one.)
_ASKED = os.environ.get("OPERATOR_BACKENDS", "triton" if os.environ.get("DEVICE") == "cuda" else "").split()
if _missing := [name for name in _ASKED if name not in BACKENDS]:
    raise pytest.UsageError(f"{_missing[0]} is asked for, and {backends.status(_missing[0], 'cpu').reason}")
# So would kernels that did not compile. A machine without a compiler, or a build without them, has no such tests.
_report = cpu.REPORT.read_text().strip() if cpu.REPORT.is_file() else ""
if "cpu" in _NAMED and "cpu" not in BACKENDS and "compilation failed" in _report:
    raise pytest.UsageError(
        f"no CPU kernels to test, as {cpu.REPORT} says: {_report}\n"
        "Build with FLOW_KERNELS_BUILD=off to test without them."
    )

# Input dtypes by backend; fp64 is what gradcheck needs. A kernel backend computes in fp32 and takes what users train in.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"reference": (torch.float64, *KERNEL_DTYPES)}


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """The input dtypes that `backend` declares."""
    return DTYPES.get(backend, KERNEL_DTYPES)


FLOAT64_BACKENDS = [name for name in BACKENDS if torch.float64 in dtypes_of(name)]

# Fixed examples, so that a failure is reproducible and a green run stays green. Fewer of them where an example takes
# seconds.
INTERPRETS = "triton" in BACKENDS and os.environ.get("TRITON_INTERPRET") == "1"
hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=8 if INTERPRETS else 30, database=None
)
hypothesis.settings.load_profile("fixed")


# Session scope, because hypothesis runs many examples in one test and refuses fixtures of function scope.
@pytest.fixture(params=BACKENDS, scope="session")
def backend(request) -> str:
    """Every available backend in turn."""
    return request.param


@pytest.fixture(params=FLOAT64_BACKENDS, scope="session")
def float64_backend(request) -> str:
    """Every available backend that computes in fp64."""
    return request.param


@pytest.fixture(
    params=[(name, dtype) for name in BACKENDS for dtype in dtypes_of(name)],
    ids=lambda pair: f"{pair[0]}-{str(pair[1]).removeprefix('torch.')}",
    scope="session",
)
def backend_dtype(request) -> tuple[str, torch.dtype]:
    """Every available backend with every input dtype that it takes."""
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A saved two-layer language model with its tokenizer, BOS included."""
    return tiny_model.build(tmp_path_factory.mktemp("tiny"), bos=True)


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no_bos"])
def tiny(request, tmp_path_factory):
    """Model and tokenizer, with and without a BOS."""
    directory = tiny_model.build(tmp_path_factory.mktemp("tiny") / "model", bos=request.param)
    return load_model(ModelConfig(str(directory), device="cpu", precision="full"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small evaluation file of every kind."""
    directory = tmp_path_factory.mktemp("files")
    paths = {"text": directory / "text.txt", "qa": directory / "sums.jsonl", "mc": directory / "choices.jsonl.gz"}
    paths["text"].write_text(TEXT)
    write_rows(paths["qa"], QA)
    paths["mc"].write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in MC).encode()))
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="session")
def qa_file(tmp_path_factory) -> Path:
    """24 question/answer pairs of very different lengths, as JSONL."""
    path = tmp_path_factory.mktemp("data") / "qa.jsonl"
    rows = [
        {
            "question": f"How many apples are {i} and {i}?" * (1 + i % 3),
            "answer": f"It is {2 * i}. " * (1 + i % 5) + f"#### {2 * i}",
        }
        for i in range(24)
    ]
    write_rows(path, rows)
    return path


@pytest.fixture(scope="module")
def image_mapping(tmp_path_factory) -> dict:
    """A run on 40 images of 3 classes, without augmentation, dropout or bf16: every number has a plain counterpart."""
    root = tmp_path_factory.mktemp("vision")
    model = tiny_images.build_classifier(root / "resnet")
    train = tiny_images.write_parquet(
        root / "train.parquet", *tiny_images.make_images(tiny_images.NUM_IMAGES, 3, 12, 0)
    )
    test = tiny_images.write_parquet(root / "test.parquet", *tiny_images.make_images(20, 3, 12, 1))
    source = tiny_images.write_parquet(root / "source.parquet", *tiny_images.make_images(20, 5, 20, 2))
    return {
        "task": "image",
        "model": {"source": str(model), "precision": "full", "device": "cpu"},
        "data": {"source": str(train)},
        "methods": [
            {"name": "half", "of": "flow", "wise_ft": 0.5}, {"name": "standard", "weights": "none"}, {"name": "flow"},
            {"name": "online", "online": True}, {"name": "linear-probe", "weights": "none", "train": "head"},
        ],
        "train": {"epochs": 2, "batch_size": 8, "augment": "none", "head_epochs": 8, "head_batch_size": 16,
                  "head_learning_rate": 0.1, "learning_rate": 1e-3, "log_every": 1, "max_grad_norm": 0.0, "warmup": 0},
        "tasks": [
            {"source": str(test), "role": "target"}, {"source": str(source), "role": "retained"},
        ],
        "batch_size": 16,
    }  # fmt: skip


@pytest.fixture(scope="module")
def image_run(image_mapping, tmp_path_factory):
    """The whole run, and what its methods started from."""
    config = read_image_run(image_mapping, "test")
    output = tmp_path_factory.mktemp("run") / "out"
    run(config, output)
    return prepare(config, output)


@pytest.fixture
def tiny_experiment(tmp_path):
    """The experiment of paper_cells.MAPPING."""
    from paper_cells import MAPPING, write_experiment

    from experiment import read_experiment  # isort: skip

    return read_experiment(write_experiment(tmp_path / "tiny.yaml", MAPPING))


@pytest.fixture
def no_sync(monkeypatch):
    """Whether files outlive a power cut is test_storage's question; waiting for the disk would take most of the time."""
    monkeypatch.setattr("flow_finetune.storage._sync", lambda path: None)
    monkeypatch.setattr("flow_finetune.storage._sync_entry", lambda path: None)


@pytest.fixture(scope="module")
def one_thread():
    """Threads cost a model of the tests' size more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
