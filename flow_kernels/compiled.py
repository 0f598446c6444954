"""Loading a compiled file of this package, or the reason why there is none."""

from __future__ import annotations

from pathlib import Path

import torch


class CompiledFileError(ImportError):
    """A compiled file that is there and does not load."""


def load(path: Path | None, report: Path, *, kernels: str, how_to_build: str, how_to_mend: str) -> str | None:
    """Load `path` and return None, or return why there is no such file.

    Args:
        path: the compiled file; None or a path where nothing is in a pure-Python install.
        report: what the build wrote of itself, a file that need not exist.
        kernels: what the file holds, for messages.
        how_to_build: what would compile it.
        how_to_mend: what the file needs and what to do where it does not load.

    Raises:
        CompiledFileError: there is a compiled file and it does not load.
    """
    if path is None or not path.exists():
        reason = report.read_text().strip() if report.exists() else "not compiled"
        if not report.exists() and (report.parents[1] / "setup.py").is_file():
            reason = (
                f"not compiled in {report.parents[1]}, the sources, which Python found before any installed package"
            )
        return f"{reason}; {how_to_build}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise CompiledFileError(
            f"the compiled {kernels} do not load ({error}); {how_to_mend} or delete {path.name}"
        ) from error
    return None
