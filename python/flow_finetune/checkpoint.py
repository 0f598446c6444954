"""The directory of a training run: whose it is, its log, its checkpoints, its result.

DIR/                     what AutoModelForCausalLM.from_pretrained loads, once the run is finished
DIR/train/identity.json  what the run is; another run is refused here
DIR/train/log.jsonl      one line per logged step
DIR/train/tensorboard/   the same for TensorBoard
DIR/train/summary.json   written last
DIR/checkpoints/step-N/  the newest checkpoint; removed when the run is finished
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from flow_finetune.config import non_defaults, without_defaults
from flow_finetune.errors import InputError
from flow_finetune.storage import (
    DirectoryLock,
    atomic_path,
    behind_link,
    differences,
    disk_space_errors,
    is_used,
    refuse_own_source,
    require_disk_space,
    used_error,
    write_json,
)

# The parts that are not the same in every process: what each has gone through itself.
OF_A_PROCESS = {"meter"}


class TrainDirectory:
    """Opens, continues and finishes the directory of one run; only the main process writes.

    Configurations in `identity` are stored and compared without the entries that have their defaults, so that an
    option that is added later does not disown what was trained before it.
    """

    def __init__(self, path: Path, identity: dict, accelerator) -> None:
        path = self.path = behind_link(path)
        self._configs = {name: type(value) for name, value in identity.items() if dataclasses.is_dataclass(value)}
        plain = {name: non_defaults(v) if name in self._configs else v for name, v in identity.items()}
        self._identity = json.loads(json.dumps(plain))
        self._accelerator = accelerator
        self._train = path / "train"
        self._checkpoints = path / "checkpoints"
        self._tensorboard: SummaryWriter | None = None
        self._lock = DirectoryLock()
        self.saved = path / "saved"  # where the model is written before its files move up

    def open(self, lm, *, overwrite: bool, source: str, checkpoint_bytes: int) -> dict | None:
        """Claim the directory; returns the summary if the run is finished already.

        Args:
            overwrite: replace what is another's or finished; an unfinished run of the same identity is continued.
            source: the model that the run starts from.
            checkpoint_bytes: size of a checkpoint, 0 for none.

        Raises:
            InputError: it is used by something else, or the disk is too small for what will be written.
        """
        error = summary = None
        if self._accelerator.is_main_process:
            try:
                summary = self._claim(lm, overwrite, source, checkpoint_bytes)
            except InputError as caught:
                error = caught
        if self._accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            error, summary = broadcast_object_list([error, summary])
        if error is not None:
            raise error
        return summary

    def _claim(self, lm, overwrite: bool, source: str, checkpoint_bytes: int) -> dict | None:
        identity = self._train / "identity.json"
        if self.path.is_dir():
            self._lock.take(self.path)
        if is_used(self.path):
            if not identity.is_file():
                raise used_error(self.path)
            stored = self._read_identity()
            # Trainings of before did not say what their weights were.
            wanted = {k: v for k, v in self._identity.items() if k != "scores" or k in stored}
            found = differences(stored, wanted)
            is_finished = (self._train / "summary.json").is_file()
            # The same command made again continues, also one with --overwrite that was killed.
            if overwrite and (found or is_finished):
                refuse_own_source(self.path, source)
                shutil.rmtree(self.path)
            elif found:
                raise InputError(
                    f"{self.path} holds another run (it differs in {', '.join(found)}); choose another directory "
                    "or pass --overwrite"
                )
            elif is_finished:
                # Of a call that was killed between the summary and their removal.
                shutil.rmtree(self._checkpoints, ignore_errors=True)
                return self.read_summary()
        num_bytes = sum(p.numel() * p.element_size() for p in lm.parameters())
        # The old checkpoint goes when the new one is there; one of them may be there already.
        there = sum(p.stat().st_size for p in self._checkpoints.rglob("*") if p.is_file())
        require_disk_space(self.path, num_bytes + max(0, 2 * checkpoint_bytes - there))
        self._train.mkdir(parents=True, exist_ok=True)
        self._lock.take(self.path)  # a new one, where there was none or the old one was removed
        write_json(identity, self._identity)
        return None

    def _read_identity(self) -> dict:
        found = json.loads((self._train / "identity.json").read_text())
        return {k: without_defaults(self._configs[k], v) if k in self._configs else v for k, v in found.items()}

    def restore(self, lm, parts: dict) -> int:
        """Load the newest checkpoint into the model and the `parts`, by name whatever has a `load_state_dict`.

        Cuts the log back to it and returns its step; 0 without one.
        """
        found = sorted(self._checkpoints.glob("step-*")) if self._checkpoints.is_dir() else []
        step = 0
        if found:
            # weights_only: a checkpoint cannot run code.
            state = torch.load(found[-1] / "state.pt", weights_only=True, map_location="cpu")
            stored = load_file(found[-1] / "model.safetensors")
            shared = parts.keys() - OF_A_PROCESS | {"processes"}
            if not (shared <= state.keys() and _trained(lm.model).keys() <= stored.keys()):
                raise InputError(
                    f"{found[-1]} was written by another version; finish it with that one, or pass --overwrite"
                )
            _load_trained(lm.model, stored)
            own = state["processes"]
            if len(own) != self._accelerator.num_processes:
                raise InputError(
                    f"{found[-1]} was written by {len(own)} processes and this call has "
                    f"{self._accelerator.num_processes}; continue with as many, or pass --overwrite"
                )
            own = own[self._accelerator.process_index]
            for name, part in parts.items():
                part.load_state_dict(own[name] if name in OF_A_PROCESS else state[name])
            torch.set_rng_state(own["rng"])
            restore_generators(own["cuda_rng"])
            step = state["step"]
        steps = gather_object([step]) if self._accelerator.num_processes > 1 else [step]
        if len(set(steps)) > 1:
            raise InputError(
                f"the processes of this launch would continue {self.path} after different steps ({steps}): they must see "
                "one file system; make the call again on one machine or with a directory that all share, or pass --overwrite"
            )
        if self._accelerator.is_main_process:
            lines = [line for line in self._log_lines() if line["step"] <= step]
            with atomic_path(self._train / "log.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
            self._tensorboard = SummaryWriter(str(self._train / "tensorboard"), purge_step=step + 1)
        return step

    def save_checkpoint(self, step: int, lm, parts: dict) -> None:
        """Write a checkpoint of what is trained and of the `parts`, then remove the older ones."""
        own = {
            **{name: part.state_dict() for name, part in parts.items() if name in OF_A_PROCESS},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        processes = gather_object([own]) if self._accelerator.num_processes > 1 else [own]
        if self._accelerator.is_main_process:
            older = list(self._checkpoints.glob("step-*")) if self._checkpoints.is_dir() else []
            state = {
                "step": step,
                **{name: part.state_dict() for name, part in parts.items() if name not in OF_A_PROCESS},
                "processes": processes,
            }
            with atomic_path(self._checkpoints / f"step-{step:08d}") as temporary:
                temporary.mkdir()
                save_file(_trained(lm.model), temporary / "model.safetensors")
                torch.save(state, temporary / "state.pt")
            for directory in older:
                shutil.rmtree(directory)
        self._accelerator.wait_for_everyone()

    def log(self, line: dict) -> None:
        """Append a log line, and give its numbers to TensorBoard."""
        with disk_space_errors(self.path), open(self._train / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if name != "step" and value is not None:
                self._tensorboard.add_scalar(f"train/{name}", value, line["step"])

    def last_log_line(self) -> dict:
        """The newest log line; empty before the first."""
        lines = self._log_lines()
        return lines[-1] if lines else {}

    def _log_lines(self) -> list[dict]:
        path = self._train / "log.jsonl"
        if not path.is_file():
            return []
        content = path.read_text()
        return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]

    def finish(self, summary: dict) -> None:
        """Move the saved model's files into place, write the summary, and remove the checkpoints."""
        for file in self.saved.iterdir():
            os.replace(file, self.path / file.name)
        self.saved.rmdir()
        self._tensorboard.close()
        write_json(self._train / "summary.json", summary)
        shutil.rmtree(self._checkpoints, ignore_errors=True)

    def close(self) -> None:
        """Let other processes work in the directory."""
        self._lock.release()

    def read_summary(self) -> dict:
        """The summary of a finished run."""
        return json.loads((self._train / "summary.json").read_text())


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that get gradients, one name for a shared one, and buffers that are saved."""
    saved = model.state_dict()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return parameters | {name: buffer for name, buffer in model.named_buffers() if name in saved}


@torch.no_grad()
def _load_trained(model: nn.Module, stored: dict[str, Tensor]) -> None:
    for name, tensor in _trained(model).items():
        tensor.copy_(stored[name])


def restore_generators(states: list[torch.Tensor]) -> None:
    """Let the GPUs draw on from where they were, as many as there were then and are now: one not seen drew nothing."""
    for index, state in zip(range(torch.cuda.device_count()), states, strict=False):
        torch.cuda.set_rng_state(state, index)
