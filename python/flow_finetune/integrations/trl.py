"""TRL's SFTTrainer with a weight per sample; it needs the package trl (tried with 1.16)."""

from __future__ import annotations

import copy

from flow_finetune.errors import InputError
from flow_finetune.integrations.collator import KeepWeights
from flow_finetune.integrations.sample_weights import add_sample_weights
from flow_finetune.integrations.trainer import COLUMN, use_weighted_loss

try:
    from trl import SFTTrainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "flow_finetune.integrations.trl needs the package trl: pip install trl", name=error.name
    ) from error


class WeightedSFTTrainer(SFTTrainer):
    """`trl.SFTTrainer` whose loss has FLOW's weights, of the model as it is when the trainer gets it.

        trainer = WeightedSFTTrainer(model, args=SFTConfig(...), train_dataset=dataset, peft_config=...)
        trainer.train()

    TRL prepares the data. The samples are scored once, before training and without adapters, on the trainer's device and
    in every process; a data set that has a column `sample_weight` is not scored, and trains with that.

    Args:
        weight_options: `temperature`, `quantile`, `clip`, `normalize` of `flow_kernels.flow_weights`, and `batch_size` of
            the scoring.
        loss_options: of `use_weighted_loss`.
        **options: of `SFTTrainer`.

    The loss is this package's, not TRL's fused head, so TRL's own metrics "entropy" and "mean_token_accuracy", which come
    from there, are not logged. Evaluation gives the plain loss.

    Raises:
        InputError: packed or streamed data, whose samples have no weight of their own, images, another loss than "nll",
            or metrics of logits without `logits_in_eval` in `loss_options`; and what `add_sample_weights` and
            `use_weighted_loss` refuse.
    """

    def __init__(self, *args, weight_options: dict | None = None, loss_options: dict | None = None, **options) -> None:
        super().__init__(*args, **options)
        if self.args.packing:
            raise InputError("packing puts samples together before they are weighed; set packing=False")
        if self.args.loss_type != "nll" or self.args.label_smoothing_factor:
            raise InputError(
                "the weighted loss stands for loss_type 'nll' without label_smoothing_factor; give label_smoothing in "
                "loss_options"
            )
        if getattr(self, "_is_vision_dataset", False):
            raise InputError("images are prepared batch by batch in TRL, which carries no weights; weigh texts")
        if COLUMN not in (getattr(self.train_dataset, "column_names", None) or ()):
            # Of samples that stay apart, whatever the trainer does with them.
            padding = copy.copy(self.data_collator)
            padding.padding_free = False
            weighted = add_sample_weights(
                self._seen_columns(), self.model, padding, remove_unused_columns=False, **(weight_options or {})
            )
            self.train_dataset = self.train_dataset.add_column(COLUMN, weighted[COLUMN][:])
        elif weight_options:
            raise InputError(f"the data set has its {COLUMN}, so weight_options would change nothing; leave them away")
        judges = [n for n in ("compute_metrics", "preprocess_logits_for_metrics") if getattr(self, n, None) is not None]
        if judges and not (loss_options or {}).get("logits_in_eval"):
            raise InputError(
                f"{judges[0]} would not be called, as the weighted loss makes no logits; give "
                "loss_options={'logits_in_eval': True}"
            )
        self.data_collator = KeepWeights(self.data_collator)
        use_weighted_loss(self.model, **(loss_options or {}))
        # What Trainer has found of the model before it had this loss.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True

    def _seen_columns(self):
        """The training data as Trainer shows it to the collator: TRL leaves the texts in it."""
        if not self.args.remove_unused_columns or not hasattr(self.train_dataset, "select_columns"):
            return self.train_dataset
        self._set_signature_columns_if_needed()
        names = self.train_dataset.column_names or []
        return self.train_dataset.select_columns([name for name in names if name in self._signature_columns])

    def _reject_skip_prepare_without_labels(self, datasets, data_collator) -> None:
        # It looks at the collator's class.
        inner = data_collator.data_collator if isinstance(data_collator, KeepWeights) else data_collator
        super()._reject_skip_prepare_without_labels(datasets, inner)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, COLUMN]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Trainer's, which asks the model for it, where SFTTrainer's asks TRL's fused head."""
        return super(SFTTrainer, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)
