"""A loaded model as lm-evaluation-harness asks for it. Imports the harness, so it is imported where that is wanted.

Tokenisation is the harness's own (`lm_eval.models.huggingface.HFLM`, which this replaces); log-likelihoods come from the
fused head with each context run once, which HFLM does only where choices are a single token.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from flow_finetune.choices import score_groups
from flow_finetune.data import Sample, without_appended_eos
from flow_finetune.errors import InputError
from flow_finetune.generate import generate_texts
from flow_finetune.models import CausalLM

# The harness's default (`lm_eval.defaults`).
_MAX_NEW_TOKENS = 256


def generation_options(options: dict, name: str, max_length: int) -> dict:
    """What a request says of its answer, complete.

    Raises:
        InputError: answers that are sampled, or leave no room for a prompt in `max_length`.
    """
    options = normalize_gen_kwargs(options, _MAX_NEW_TOKENS)
    if options.get("do_sample"):
        raise InputError(f"{name} samples its answers; only greedy answers are made here")
    if options["max_gen_toks"] >= max_length:
        raise InputError(f"{name} generates {options['max_gen_toks']} tokens; raise max_length={max_length}")
    return options


class HarnessModel(TemplateLM):
    """Log-likelihoods and greedy answers of a model, with the harness's names."""

    def __init__(
        self,
        lm: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        max_length: int,
        batch_tokens: int,
        precision: str,
    ) -> None:
        super().__init__()
        self.lm, self.tokenizer, self.name = lm, tokenizer, name
        self.max_length, self.batch_tokens, self.precision = max_length, batch_tokens, precision
        self.num_truncated = 0  # texts that lost their beginning

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        return without_appended_eos(ids, self.tokenizer) if add_special_tokens else ids

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, **options) -> list[tuple[float, bool]]:
        samples = [self._sample(context, continuation) for _, context, continuation in requests]
        # Requests that follow each other with one context are the choices of one question; a BOS alone is no context.
        indices = itertools.groupby(range(len(samples)), key=lambda i: requests[i][1] if len(requests[i][1]) > 1 else i)
        groups = [[samples[i] for i in group] for _, group in indices]
        scores = score_groups(
            self.lm, groups, self.tokenizer.pad_token_id, self.batch_tokens, self.precision, self.name
        )
        greedy = scores.num_correct == scores.num_targets
        return list(zip((-scores.loss_sum).tolist(), greedy.tolist(), strict=True))

    def _sample(self, context: list[int], continuation: list[int]) -> Sample:
        if not 0 < len(continuation) < self.max_length:
            raise InputError(
                f"{self.name}: an answer of {len(continuation)} tokens does not fit into max_length={self.max_length}"
            )
        ids = (context + continuation)[-self.max_length :]
        truncated = len(ids) < len(context) + len(continuation)
        self.num_truncated += truncated
        return Sample("", np.asarray(ids, np.int32), len(ids) - len(continuation), "", "", truncated)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for owner, request in enumerate(requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1, context_len=1,
            )  # fmt: skip
            pairs = [make_disjoint_window(window) for window in found]
            windows += [(None, *pair) for pair in pairs]
            owners += [owner] * len(pairs)
        values = [value for value, _ in self._loglikelihood_tokens(windows)]
        return np.bincount(owners, values, minlength=len(requests)).tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        options = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        for kind in dict.fromkeys(options):
            rows = [i for i, option in enumerate(options) if option == kind]
            for row, text in zip(
                rows, self._generate([requests[i].args[0] for i in rows], json.loads(kind)), strict=True
            ):
                answers[row] = text
        return answers

    def _generate(self, contexts: list[str], options: dict) -> list[str]:
        options = generation_options(options, self.name, self.max_length)
        until, max_new_tokens = options["until"], options["max_gen_toks"]
        room = self.max_length - max_new_tokens
        prompts = [self.tok_encode(context) for context in contexts]
        self.num_truncated += sum(len(prompt) > room for prompt in prompts)
        return generate_texts(
            self.lm, self.tokenizer, [np.asarray(prompt[-room:]) for prompt in prompts],
            until=[text for text in until if text], max_new_tokens=max_new_tokens,
            batch_tokens=self.batch_tokens, precision=self.precision, description=f"answering {self.name}",
        )  # fmt: skip
