"""The direction of dependencies, read from the syntax tree of every module."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "flow_kernels").rglob("*.py"))
FINETUNE = sorted((ROOT / "python" / "flow_finetune").rglob("*.py"))

# Who may import whom inside flow_kernels; `kernels` stands for every module of that folder.
ARROWS = {
    "products": set(),
    "dense_attention": set(),
    "reference": {"products", "dense_attention"},
    "chunks": {"products", "reference"},
    "kernels": {"chunks", "reference", "kernels"},
    "compiled": set(),
    "cpu": {"compiled", "reference"},
    "cuda": {"chunks", "compiled"},
    "backends": {"reference", "kernels", "cpu", "cuda", "compiled"},
    "ops": {"backends", "reference"},
    "rows": {"reference"},
    "autocast": set(),
    "losses": {"rows", "autocast", "ops", "backends", "reference"},
    "scoring": {"rows", "autocast", "losses", "ops", "backends", "reference", "weighting"},
    "weighting": set(),
    "attention": {"rows", "autocast", "ops", "backends"},
    "__init__": {"attention", "backends", "losses", "scoring", "weighting"},
    "__main__": {"", "backends"},
}


def imports(source: str) -> set[str]:
    """Dotted names that `source` imports, `from a import b` as `a.b`, wherever in the file the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def forbidden_in_kernels(module: str, source: str) -> set[str]:
    """The imports of a flow_kernels module that are against the arrows."""
    bad = set()
    for name in imports(source):
        package, _, rest = name.partition(".")
        if package == "flow_kernels":
            first = rest.partition(".")[0]
            # `from flow_kernels import backends` and `from flow_kernels.backends import status` both mean backends.
            if first not in ARROWS[module]:
                bad.add(name)
        elif package not in {"torch", "triton"} and package not in sys.stdlib_module_names:
            bad.add(name)
    return bad


def forbidden_in_finetune(source: str) -> set[str]:
    """The imports of a flow_finetune module that reach behind the public names of flow_kernels."""
    import flow_kernels

    public = {"flow_kernels", "flow_kernels.backends", "flow_kernels.__version__"}
    public |= {f"flow_kernels.{name}" for name in flow_kernels.__all__}
    return {
        name
        for name in imports(source)
        if (
            name.split(".")[0] == "flow_kernels"
            and name not in public
            and not name.startswith("flow_kernels.backends.")
        )
        or name.split(".")[0] in {"tests", "benchmarks", "oracle", "conftest"}
    }


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_flow_kernels(path):
    module = "kernels" if path.parent.name == "kernels" else path.stem
    assert module in ARROWS, f"add {module} to ARROWS"
    assert forbidden_in_kernels(module, path.read_text()) == set()


@pytest.mark.parametrize("path", FINETUNE, ids=lambda p: p.stem)
def test_flow_finetune(path):
    assert forbidden_in_finetune(path.read_text()) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses", "import transformers"),
        ("losses", "import flow_finetune.train"),
        ("reference", "def f():\n    from flow_kernels import ops"),
        ("rows", "from flow_kernels.ops import cross_entropy_fwd"),
        ("ops", "from flow_kernels.losses import cross_entropy"),
        ("weighting", "import numpy as np"),
        ("scoring", "import tests.oracle"),
    ],
)
def test_wrong_arrows_are_found(module, source):
    assert forbidden_in_kernels(module, source)


@pytest.mark.parametrize(
    "source",
    ["from flow_kernels import ops", "import flow_kernels.reference", "from flow_kernels.losses import cross_entropy",
     "from flow_kernels.rows import flatten", "import oracle", "from benchmarks import harness"],
)  # fmt: skip
def test_reaching_behind_the_public_names_is_found(source):
    assert forbidden_in_finetune(source)
