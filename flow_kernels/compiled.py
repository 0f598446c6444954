"""Loading a compiled file of this package, or the reason why there is none."""

from __future__ import annotations

from pathlib import Path

import torch


class CompiledFileError(ImportError):
    """A compiled file that is there and does not load."""


def load(
    path: Path | None, report: Path, *, namespace: str, operators: tuple[str, ...], kernels: str, how_to_build: str,
    how_to_mend: str,
) -> str | None:  # fmt: skip
    """Load `path` and return None, or return why there is no such file.

    Args:
        path: the compiled file; None or a path where nothing is in a pure-Python install.
        report: what the build wrote of itself, a file that need not exist.
        namespace: of `torch.ops`, where the file registers its `operators`.
        operators: what has to be there.
        kernels: what the file holds, for messages.
        how_to_build: what would compile it.
        how_to_mend: what the file needs and what to do where it does not load.

    Raises:
        CompiledFileError: there is a compiled file and it does not load, or lacks an operator: it is of other sources.
    """
    if path is None or not path.exists():
        reason = report.read_text(encoding="utf-8").strip() if report.exists() else "not compiled"
        if not report.exists() and (report.parents[1] / "setup.py").is_file():
            reason = (
                f"not compiled in {report.parents[1]}, the sources, which Python found before any installed package"
            )
        return f"{reason}; {how_to_build}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise CompiledFileError(
            # The linker's own words are in the cause.
            f"the compiled {kernels} do not load ({error}{f': {error.__cause__}' if error.__cause__ else ''}); "
            f"{how_to_mend} or delete {path.name}"
        ) from error
    missing = [name for name in operators if not hasattr(getattr(torch.ops, namespace), name)]
    if missing:
        raise CompiledFileError(
            f"the compiled {kernels} lack {missing[0]}, so they are of another version; {how_to_mend} or delete {path.name}"
        )
    return None
