"""How many processes a launcher started, for the commands that one of them does alone."""

import os

from flow_finetune.errors import InputError


def require_one_process(command: str) -> None:
    """Raise `InputError` under torchrun or accelerate with several processes, which would write over each other."""
    number = int(os.environ.get("WORLD_SIZE", "1"))
    if number > 1:
        raise InputError(
            f"{command} was started as {number} processes, which would write the same files; start it once, without "
            "torchrun or accelerate launch (they go in front of score and train, for language models)"
        )
