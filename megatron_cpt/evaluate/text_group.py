"""Texts that are generated together: one new token for each of them per forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_cpt.evaluate.requests import Generation, GenerationOptions, StopReason
from megatron_cpt.evaluate.row_forward import KvCache, Row

Stop = Callable[[int, tuple[int, ...]], bool]


class Text:
    """A prompt and the tokens that follow it.

    Attributes:
        number: index of the prompt.
        key: identifies the prompt in random draws.
        new: new tokens.
        reason: cause of the end; None while the text grows.
    """

    def __init__(
        self,
        number: int,
        prompt: tuple[int, ...],
        key: bytes,
        limit: int,
        options: GenerationOptions,
        stop: Stop | None,
    ) -> None:
        """Start a text of at most `limit` tokens with its prompt."""
        self.number, self.prompt, self.key = number, prompt, key
        self.new: list[int] = []
        self.reason: StopReason | None = None
        self._limit, self._options, self._stop = limit, options, stop

    @property
    def capacity(self) -> int:
        """Largest number of tokens of the text."""
        return min(len(self.prompt) + self._options.max_new_tokens, self._limit)

    @property
    def num_cached(self) -> int:
        """Tokens in the KV cache: all but the newest."""
        return len(self.prompt) + len(self.new) - 1

    def add(self, token: int) -> None:
        """Add a token, or end the text; -1: no token, because the logits are NaN."""
        if token < 0:
            self.reason = "not_finite"
            return
        if token in self._options.stop_ids:
            self.reason = "stop_id"
            return
        self.new.append(token)
        if self._stop is not None and self._stop(self.number, tuple(self.new)):
            self.reason = "stop_text"
        elif len(self.new) == self._options.max_new_tokens:
            self.reason = "max_new_tokens"
        elif len(self.prompt) + len(self.new) == self._limit:
            self.reason = "max_length"

    def answer(self) -> Generation:
        """Return the finished text."""
        assert self.reason is not None, "the text still grows"
        return Generation(tuple(self.new), self.reason)


class TextGroup:
    """Texts with their KV cache. Slots of finished texts are dropped by halving the number of slots.

    The numbers of slots depend on the texts alone, so the shapes of matrix products do not depend on other groups.

    Attributes:
        cache: keys and values of all slots.
        slots: text of each slot; None: unused.
    """

    def __init__(self, texts: Sequence[Text], smallest_width: int, device: torch.device) -> None:
        self._smallest_width = smallest_width
        self._device = device
        width = self._width_for(len(texts))
        self.slots: list[Text | None] = [*texts, *[None] * (width - len(texts))]
        self.cache = KvCache(slots=width, capacity=max(text.capacity for text in texts), device=device)

    @property
    def width(self) -> int:
        """Number of slots."""
        return len(self.slots)

    @property
    def active(self) -> list[Text]:
        """Texts that still grow."""
        return [text for text in self.slots if text is not None and text.reason is None]

    def shrink(self) -> bool:
        """Drop slots that are no longer needed; return False if all texts are finished."""
        active = [slot for slot, text in enumerate(self.slots) if text is not None and text.reason is None]
        if not active:
            return False
        if (width := self._width_for(len(active))) < self.width:
            rest = [slot for slot in range(self.width) if slot not in active]
            kept = [*active, *rest][:width]
            self.cache.keep(kept)
            self.slots = [self.slots[slot] for slot in kept]
        return True

    def next_row(self, collect: Callable[[torch.Tensor], torch.Tensor]) -> Row[torch.Tensor]:
        """Return the forward pass of the newest token of each slot; a slot without a growing text computes token 0."""
        grows = [text if text is not None and text.reason is None else None for text in self.slots]
        lengths = [text.num_cached if text is not None else 0 for text in grows]
        tokens = [text.new[-1] if text is not None else 0 for text in grows]
        self.cache.set_lengths(lengths, self._device)
        every = torch.arange(self.width, device=self._device)
        return Row(torch.tensor(tokens, device=self._device), self.cache.lengths, every, collect, cache=self.cache)

    def add(self, ids: Sequence[int]) -> None:
        """Add the token that follows in each slot."""
        for text, token in zip(self.slots, ids, strict=True):
            if text is not None and text.reason is None:
                text.add(token)

    def _width_for(self, num_texts: int) -> int:
        return max(self._smallest_width, 1 << (num_texts - 1).bit_length())


def draw_keys(prompts: Sequence[tuple[int, ...]]) -> list[bytes]:
    """Return the key of each prompt in random draws: its content, and its number among equal prompts."""
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for prompt in prompts:
        keys.append(np.array([seen[prompt], *prompt], dtype=np.int64).tobytes())
        seen[prompt] += 1
    return keys
