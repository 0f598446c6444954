"""What `flow-finetune` starts: the command line, or which of its packages is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point; the packages of the `train` extra are no requirement of `flow_kernels`, which comes with it."""
    try:
        from flow_finetune.cli import main as command_line
    except ModuleNotFoundError as error:
        sys.exit(
            f"flow-finetune needs the package {error.name!r}; install its requirements with the extra [train], as in "
            'pip install --no-build-isolation ".[train,report]"'
        )
    except KeyboardInterrupt:
        sys.exit(130)
    command_line()
