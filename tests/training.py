"""A tiny model and its samples, and training of it: what the tests of training, methods and adapters start from."""

from pathlib import Path

from flow_finetune.config import DataConfig, MethodConfig, ModelConfig, TrainConfig
from flow_finetune.data import load_samples
from flow_finetune.methods import needs_scores
from flow_finetune.models import load_model
from flow_finetune.scores import read_scores, score, scoring_fingerprints
from flow_finetune.train import train

PLAIN = MethodConfig("m", weights="none")


class Setup:
    """The model as it was saved, its tokenizer and its samples; `scores` and what is in them after `score`."""

    def __init__(self, model_dir: Path, qa_file: Path, precision: str = "full") -> None:
        self.config = ModelConfig(str(model_dir), precision=precision, device="cpu")
        self.lm, self.tokenizer = load_model(self.config)
        data = DataConfig(str(qa_file), prompt_field="question", response_field="answer")
        self.samples = load_samples(data, self.tokenizer)
        self.scores = self.found = None

    def score(self, directory: Path, *, tokens: bool = False) -> "Setup":
        """Score the samples into a file in `directory`; returns itself."""
        self.scores = directory / "scores.parquet"
        score(self.lm, self.tokenizer, self.samples, self.scores, model_config=self.config, tokens=tokens)
        fingerprints = scoring_fingerprints(self.lm, self.tokenizer, self.samples)
        self.found = read_scores(self.scores, self.samples, fingerprints, tokens=tokens)
        return self

    def train(self, output: Path, method: MethodConfig = PLAIN, *, lm=None, scores=None, overwrite=False, **options):
        """Train `lm`, by default the model as it was saved; the summary. Scores go to methods that need them."""
        return train(
            lm or load_model(self.config)[0], self.tokenizer, self.samples, output, method=method,
            config=TrainConfig(**options), model_config=self.config,
            scores=self.scores if needs_scores(method) else scores, overwrite=overwrite,
        )  # fmt: skip
