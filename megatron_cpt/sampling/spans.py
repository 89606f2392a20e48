"""Spans and windows of a source.

A source is cut into spans; a span has as many tokens as the longest samples the source is read in. A shorter sample is
a part of a span (its length divides the span's). Neighboring parts often belong to one document, so parts are shuffled
within a window of spans (`data/loading/stream.py`). A window is read in samples of one length: when the length changes,
reading continues with the first window that is still unread.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_WINDOW_SPANS = 1024
WINDOWS_PER_EPOCH = 64
"""Least number of windows per epoch. A change of length skips less than a window, so under 1/64 of an epoch."""


@dataclass(frozen=True)
class SpanGrid:
    """Spans of one source.

    Example: spans of 16 tokens, 640 per epoch, so a window has 640 / 64 = 10 spans. Read in samples of 4 tokens, a
    window holds 40 samples. After 47 of them the second window (spans 10 to 19) is partly read. If samples now become
    16 tokens long, reading continues at span 20, the start of the third window:

        >>> SpanGrid(seq_length=16, num_spans=640).first_unread(47, 4, 16)
        20

    Attributes:
        seq_length: tokens per span.
        num_spans: spans per epoch, at least 1.
    """

    seq_length: int
    num_spans: int

    @property
    def window_spans(self) -> int:
        """Spans per window. Windows are counted from the start of each epoch; the last one may be shorter."""
        return min(MAX_WINDOW_SPANS, max(1, self.num_spans // WINDOWS_PER_EPOCH))

    def parts(self, seq_length: int) -> int:
        """Return how many samples of `seq_length` tokens make a span."""
        return max(1, self.seq_length // seq_length)

    def first_unread(self, sample_index: int, old_length: int, new_length: int) -> int:
        """Return the index of the next sample when samples change from `old_length` to `new_length` tokens.

        That is the first sample of the first window that is unread. Both indices count samples of their own length,
        over all epochs.
        """
        if old_length == new_length:
            return sample_index
        spans_begun = -(-sample_index // self.parts(old_length))
        epoch, spans = divmod(spans_begun, self.num_spans)
        first_span = min(-(-spans // self.window_spans) * self.window_spans, self.num_spans)
        return (epoch * self.num_spans + first_span) * self.parts(new_length)
