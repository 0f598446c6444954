"""`flow-finetune wise-ft`: averages of a pre-trained and a fine-tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flow_finetune.commands.messages import messages
from flow_finetune.progress import say


def wise_ft(
    pretrained: Annotated[Path, typer.Argument(help="Directory of the pre-trained model.")],
    finetuned: Annotated[Path, typer.Argument(help="Directory of the fine-tuned model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory; one alpha-A below it for each alpha.")],
    alpha: Annotated[
        list[float] | None,
        typer.Option(help="Share of the fine-tuned weights, in [0, 1]; may be given again. 0.5 when not given."),
    ] = None,
) -> None:
    """WiSE-FT: (1 - alpha) * pre-trained + alpha * fine-tuned, for every alpha, piece by piece from the files.

    **Example**

        flow-finetune wise-ft ./gemma runs/flow --alpha 0.3 --alpha 0.5 -o runs/flow-wise-ft
    """
    with messages():
        from flow_finetune import wise_ft as wise_ft_module

        for share in alpha or [0.5]:
            wise_ft_module.check_alpha(share)
        for share in alpha or [0.5]:
            path = wise_ft_module.wise_ft(pretrained, finetuned, share, output / f"alpha-{share:g}")
            say(f"{path}: {1 - share:g} * {pretrained} + {share:g} * {finetuned}")
