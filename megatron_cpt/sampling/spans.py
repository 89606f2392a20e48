"""A source cut into spans, and what happens to its place when the length of samples changes.

The spans of a source are as long as the longest samples it is read in. Shorter samples, whose length divides that, are
parts of spans. So that the parts of one span do not follow each other, they are taken from a window of spans at a
time, in an order of their own (`data/loading/stream.py`). A window is read in one length: where the length changes,
the source
goes on with the next window of which nothing was read.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_WINDOW_SPANS = 1024
WINDOWS_PER_EPOCH = 64
"""A change of length passes over less than a window: at most this part of an epoch."""


@dataclass(frozen=True)
class SpanGrid:
    """The spans of one source.

    Attributes:
        seq_length: tokens in a span: the longest samples of the source.
        num_spans: spans in one pass over it; at least 1.
    """

    seq_length: int
    num_spans: int

    @property
    def window(self) -> int:
        """Spans in a window; windows are counted from the start of each epoch, the last one may be shorter."""
        return min(MAX_WINDOW_SPANS, max(1, self.num_spans // WINDOWS_PER_EPOCH))

    def parts(self, seq_length: int) -> int:
        """Samples of `seq_length` tokens in a span; the configuration's checks see to it that they fill it."""
        return max(1, self.seq_length // seq_length)

    def turn(self, k: int, old: int, new: int) -> int:
        """The number of a source's next sample when its samples change from `old` to `new` tokens.

        Args:
            k: the number that its next sample of `old` tokens would have, counted over all epochs.
            old: tokens a sample until now.
            new: tokens a sample from now on.

        Returns:
            The number of the first sample of `new` tokens in the first window of which nothing was read.
        """
        if old == new:
            return k
        epoch, spans = divmod(-(-k // self.parts(old)), self.num_spans)
        start = min(-(-spans // self.window) * self.window, self.num_spans)
        return (epoch * self.num_spans + start) * self.parts(new)
