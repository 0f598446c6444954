"""Every line of the Triton kernels and launchers is executed by their tests in the interpreter."""

import ast
import sys
from pathlib import Path

import pytest
import test_entropy
import test_triton_head
import test_triton_kernels as checks
import test_triton_scale
import torch

from flow_kernels.kernels import configs, cross_entropy, linear_cross_entropy, scale, score, softmax_row

pytestmark = [
    checks.pytestmark,
    pytest.mark.skipif(checks.DEVICE == "cuda", reason="compiled kernels are no Python whose lines could be seen"),
]


def _executable_lines(path: Path) -> set[int]:
    """First lines of the statements inside functions and methods, docstrings aside."""
    lines = set()
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                if isinstance(node, ast.stmt) and node is not function and not is_docstring:
                    lines.add(node.lineno)
    return lines


def test_every_line_of_kernels_and_launchers_is_executed():
    """Runs the tests of `checks` under a line tracer; only what needs a GPU's properties is left out."""
    modules = (softmax_row, cross_entropy, linear_cross_entropy, score, scale, checks.weighting, configs)
    paths = {module.__file__: Path(module.__file__) for module in modules}
    seen = {path: set() for path in paths}

    def trace(frame, event, argument):
        path = frame.f_code.co_filename
        if path not in seen:
            return None
        seen[path].add(frame.f_lineno)
        return trace

    previous = sys.gettrace()
    configs.warp_size.cache_clear()
    with pytest.MonkeyPatch.context() as monkeypatch:
        sys.settrace(trace)
        try:
            for num_classes in (40, 17000):
                for name in ("plain", "smoothing", "all"):
                    has_class_weight, options = checks.OPTIONS[name]
                    logits, target, row_weight, class_weight = checks.batch(6, num_classes, torch.bfloat16)
                    class_weight = class_weight if has_class_weight else None
                    checks.check_logits_operators(logits, target, row_weight, class_weight, options)
            for name in ("plain", "all"):
                checks.test_linear_operators(name, 103, 8, torch.bfloat16)
            checks.test_linear_operators("plain", 103, 8, torch.float32)
            checks.test_linear_operators("all", 103, 8, torch.float32)
            test_triton_head.test_chunk_size_follows_the_budget()
            test_triton_head.test_the_buffer_follows_the_memory_of_the_device(monkeypatch)
            checks.test_linear_operators("plain", 103, 0, torch.bfloat16)
            test_triton_head.test_the_gradient_of_a_bias_in_several_parts(monkeypatch)
            checks.test_head_of_no_rows()
            checks.test_flow_weights("none")
            checks.test_flow_weights_of_unequal_lengths_and_of_nothing()
            checks.test_flow_weights("simplex")
            checks.test_few_rows(0)
            test_entropy.test_confident_rows_keep_their_precision("triton")
            test_entropy.test_linear_head("triton", 3)
            test_triton_scale.test_nothing_and_any_shape()
            test_triton_head.test_products_are_added_in_fp32_where_torch_can(monkeypatch)
            checks.test_a_grid_too_long_names_the_limit_and_the_backend(monkeypatch)
            checks.test_a_row_too_long_names_the_limit_and_the_backend(monkeypatch)
        finally:
            sys.settrace(previous)
    missing = {Path(path).name: sorted(_executable_lines(paths[path]) - seen[path]) for path in paths}
    assert not any(missing.values()), missing
