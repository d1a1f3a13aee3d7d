"""Streamers for transformers' ``generate``: one that takes times and reports progress, one that prints text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TextStreamer
from transformers.generation import BaseStreamer

from ds_ring.utils.plain_text import shown

SAY_EVERY_S = 1.0
"""Least time between two lines of progress."""


class GenerationClock(BaseStreamer):
    """Takes the time to the first token, reports progress of the prefill, and passes tokens on to ``text``.

    Streamers are called on rank 0 only; on other ranks ``ttft_s`` stays nan.
    """

    def __init__(self, text: BaseStreamer | None, prompt_tokens: int, say: Callable[[str], None]) -> None:
        self._text, self._prompt_tokens, self._say = text, prompt_tokens, say
        self._puts = 0
        self._said_at = 0.0
        self.started, self.ttft_s = 0.0, float("nan")

    def start(self) -> None:
        self.started = self._said_at = time.perf_counter()

    def prefilled(self, done: int, whole: int) -> None:
        """Called after each chunk: ``done`` of ``whole`` prompt tokens are prefilled."""
        now = time.perf_counter()
        if done < whole and now - self._said_at >= SAY_EVERY_S:
            self._said_at = now
            self._say(f"prefill: {done:,} of {whole:,} tokens, {done / (now - self.started):,.0f} tok/s")

    def put(self, value: Tensor) -> None:
        self._puts += 1
        if self._puts == 2:  # the first is the prompt
            self.ttft_s = time.perf_counter() - self.started
            self._say(f"prefill: {self.ttft_s:.2f} s, {self._prompt_tokens / self.ttft_s:,.0f} tok/s")
        if self._text is not None:
            self._text.put(value)

    def end(self) -> None:
        if self._text is not None:
            self._text.end()


class StderrText(TextStreamer):
    """Prints words to standard error as soon as they are final, control characters as escapes: what a model writes must
    not act on a terminal. Standard output is for the result only, which has the text as it is."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(shown(text), end="\n" if stream_end else "", file=sys.stderr, flush=True)
