"""Options that several commands share: their names, help and panels."""

from pathlib import Path
from typing import Annotated

import typer

MODEL_PANEL, DATA_PANEL, OPTIMISATION_PANEL = "Model", "Data", "Optimisation"
METHOD_PANEL = "Method"

Model = Annotated[
    str, typer.Option("--model", "-m", help="Hub id, local directory or .gguf file.", rich_help_panel=MODEL_PANEL)
]
Revision = Annotated[str | None, typer.Option(help="Of a hub id.", rich_help_panel=MODEL_PANEL)]
Dtype = Annotated[
    str,
    typer.Option(help="Parameters: float32; bfloat16 or float16 to score, or with LoRA.", rich_help_panel=MODEL_PANEL),
]
Precision = Annotated[
    str, typer.Option(help="bf16: matrix products under bf16 autocast; full: in --dtype.", rich_help_panel=MODEL_PANEL)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel=MODEL_PANEL)]
Backend = Annotated[
    str, typer.Option(help="flow_kernels backend: auto, reference, cpu or triton.", rich_help_panel=MODEL_PANEL)
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="torch.compile of each layer: faster, after a minute to begin with.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Packing = Annotated[
    bool,
    typer.Option(
        "--packing/--no-packing",
        help="On a CPU, texts behind each other without padding, common beginnings once, where the model can.",
        rich_help_panel=MODEL_PANEL,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel=MODEL_PANEL),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        help=".jsonl, .csv, .parquet (or .gz of the first two), or hub id; images: folders, .parquet, hub id.",
        rich_help_panel=DATA_PANEL,
    ),
]
Split = Annotated[
    str,
    typer.Option(
        help="Split of a hub data set, or rows of it, as in 'train[:700]'; of texts also rows of a file.",
        rich_help_panel=DATA_PANEL,
    ),
]
Subset = Annotated[
    str | None,
    typer.Option(help="Of a hub data set that has several, as main of openai/gsm8k.", rich_help_panel=DATA_PANEL),
]
PromptField = Annotated[str, typer.Option(help="Field that holds the prompt.", rich_help_panel=DATA_PANEL)]
ResponseField = Annotated[str, typer.Option(help="Field that holds the response.", rich_help_panel=DATA_PANEL)]
ChoicesField = Annotated[
    str | None,
    typer.Option(
        help="Field that holds a list of texts, where the response field holds the index of the response in it.",
        rich_help_panel=DATA_PANEL,
    ),
]
IdField = Annotated[
    str | None, typer.Option(help="Field with unique ids; row numbers otherwise.", rich_help_panel=DATA_PANEL)
]
Template = Annotated[
    str, typer.Option(help="alpaca, chat (the tokenizer's own) or a text with {prompt}.", rich_help_panel=DATA_PANEL)
]
MaxLength = Annotated[
    int, typer.Option(min=2, help="Tokens of a sample; the rest is cut and counted.", rich_help_panel=DATA_PANEL)
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.", rich_help_panel=DATA_PANEL)]
BatchTokens = Annotated[int, typer.Option(min=1, help="Padded tokens of one forward pass.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace what an earlier call left there; what this very call left unfinished is continued."
    ),
]
Learning = Annotated[
    float, typer.Option("--learning-rate", "--lr", help="Peak learning rate.", rich_help_panel=OPTIMISATION_PANEL)
]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the data.", rich_help_panel=OPTIMISATION_PANEL)]
BatchSize = Annotated[
    int,
    typer.Option(min=1, help="Samples of an optimiser step, over all processes.", rich_help_panel=OPTIMISATION_PANEL),
]
Seed = Annotated[int, typer.Option(help="Order of the samples, and dropout.", rich_help_panel=OPTIMISATION_PANEL)]


def _method(help: str, **options: object) -> typer.models.OptionInfo:
    return typer.Option(help=help, rich_help_panel=METHOD_PANEL, **options)


# Details of a method; what is not given is the method's own.
Scores = Annotated[Path | None, _method("Score file of the same model and data; --task image: what score wrote.")]
Method = Annotated[
    str | None,
    _method(
        "standard, flow, flow-token, flow-mean (weights average 1), flow-online, dro, easiest, l2, l1, lora, linear-probe "
        "or sfa; several joined by +, as in flow+lora. flow when not given."
    ),
]
Weights = Annotated[str | None, _method("sequence or token (FLOW), or none (standard).")]
Temperature = Annotated[float | None, _method("In nats; the quantile of the losses otherwise.")]
Quantile = Annotated[float | None, _method("Of the losses; 0.5, the median, otherwise.", min=0, max=1)]
ClipLow = Annotated[float | None, _method("Lowest weight.")]
ClipHigh = Annotated[float | None, _method("Highest weight.")]
Normalize = Annotated[str | None, _method("none, or mean (weights average 1).")]
KeepEasiest = Annotated[float | None, _method("Share of the samples that is kept; the others get weight 0.")]
OnlineCopy = Annotated[str | None, _method("flow-online's frozen copy: same (dtype as the model) or bfloat16.")]
LoraRank = Annotated[int | None, _method("64 when not given.")]
LoraAlpha = Annotated[int | None, _method("64 when not given.")]
PenaltyStrength = Annotated[
    float | None, _method("lambda of l2 and l1, divided by the number of trained parameters; 1e-3.")
]
PenaltyCopy = Annotated[
    str | None, _method("Pre-trained weights of l2, l1 and sfa: bfloat16, float32 or disk (unrounded, memory-mapped).")
]
AverageEvery = Annotated[float | None, _method("sfa: share of all steps between averages; 0.25.")]
AverageShare = Annotated[float | None, _method("sfa: share of the pre-trained weights in an average; 0.5.")]
