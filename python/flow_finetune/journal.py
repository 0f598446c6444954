"""What a scoring has done so far, kept so that a killed one goes on; several processes write one file each."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from flow_finetune.errors import InputError
from flow_finetune.processes import Processes
from flow_finetune.storage import disk_space_errors


class Journal:
    """Finished batches, one JSON line each after a header line; a torn last line is dropped.

    The main process writes `PATH.journal`, the others `PATH.journal-1` and so on. Whoever continues reads them all, so
    it may do so with another number of processes.

    Args:
        path: the file that is being made.
        header: what it is made from; a journal with another header is another's.
        overwrite: begin again where a journal is another's.
        processes: those that share the work. The main one puts the files in order before any of them writes.
    """

    def __init__(self, path: Path, header: dict, overwrite: bool, processes: Processes) -> None:
        self.path = path.with_name(path.name + ".journal")
        self._own = self.path if processes.is_main else self.path.with_name(f"{self.path.name}-{processes.index}")
        refused = self._prepare(header, overwrite) if processes.is_main else None
        if refused := processes.agree(refused):
            raise InputError(refused)
        if not self._own.exists():
            with disk_space_errors(self._own):
                self._write(json.dumps(header, sort_keys=True) + "\n")

    def _prepare(self, header: dict, overwrite: bool) -> str | None:
        """Mend what a kill has left, or say why it cannot be continued."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in self._all():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if not whole:
                path.unlink()
                continue
            found = _header_in(whole)
            # Another's; of the same scoring it is what a call like this one left.
            if overwrite and (found is None or header_differences(found, header)):
                path.unlink()
                continue
            if found is None:
                return f"{path} is no journal of a scoring; choose another file or pass --overwrite"
            if differences := header_differences(found, header):
                return (
                    f"{path} holds an unfinished scoring of something else ({differences}); finish that, choose another "
                    "file or pass --overwrite"
                )
            if len(whole) < len(content):
                os.truncate(path, len(whole))
        return None

    def _all(self) -> list[Path]:
        others = re.compile(re.escape(self.path.name) + r"-\d+")
        return [p for p in sorted(self.path.parent.iterdir()) if p == self.path or others.fullmatch(p.name)]

    def read(self) -> list[dict]:
        """The records of all processes."""
        return [json.loads(line) for path in self._all() for line in path.read_bytes().splitlines()[1:]]

    def append(self, record: dict) -> None:
        """Keep a record of this process."""
        self._write(json.dumps(record) + "\n")

    def _write(self, line: str) -> None:
        with open(self._own, "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Forget everything, of all processes."""
        for path in self._all():
            path.unlink(missing_ok=True)


def unfinished_header(path: Path) -> dict | None:
    """The header of the scoring of `path` that was begun in one process and not finished; None where there is none."""
    journal = path.with_name(path.name + ".journal")
    return _header_in(journal.read_bytes()) if journal.is_file() else None


def _header_in(content: bytes) -> dict | None:
    """The first line of a journal, if it is whole and one."""
    line, end, _ = content.partition(b"\n")
    try:
        header = json.loads(line) if end else None
    except ValueError:
        return None
    return header if isinstance(header, dict) and "settings" in header else None


# What is in a fingerprint and not in its name.
_ALSO_IN = {"template": " (max_length is in it)", "data": " (ids and which rows are in it)"}


def header_differences(found: dict, wanted: dict) -> str:
    """In words, which entries of two headers differ; empty where none does."""
    differences = []
    for group, entries in wanted.items():
        for name, value in entries.items():
            other = found.get(group, {}).get(name)
            if other != value:
                of = f"{name} fingerprint" if group == "fingerprints" else name
                also = _ALSO_IN.get(name, "") if group == "fingerprints" else ""
                differences.append(f"its {of} is {other}, this one's {value}{also}")
    return "; ".join(differences)
