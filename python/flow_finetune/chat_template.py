"""A tokenizer's chat template, written on the same day every day."""

from __future__ import annotations

import datetime
import json
import re

from transformers import PreTrainedTokenizerBase

# Chat templates that write the day (Llama 3's) get this one, theirs where they are told none: scores, training and
# evaluation of different days are of the same tokens.
_DAY = datetime.datetime(2024, 7, 26)
_STRFTIME = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")


def render_chat(tokenizer: PreTrainedTokenizerBase, turns: list[dict], **options) -> str:
    """The turns as the chat template writes them, on the same day every day."""
    if "strftime_now" in str(tokenizer.chat_template):
        text = tokenizer.get_chat_template()
        options["chat_template"] = _STRFTIME.sub(lambda call: json.dumps(_DAY.strftime(call["format"])), text)
    return tokenizer.apply_chat_template(turns, tokenize=False, **options)
