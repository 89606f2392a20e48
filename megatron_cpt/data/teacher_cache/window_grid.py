"""Windows in which a teacher reads a token file, so that a record depends on the file and the position only.

A sample of training starts anywhere in a file, because the grid of its source shifts in every epoch. A cache cannot
hold the teacher's answer for every start. So the teacher reads each file in windows of its own, and a position gets its
record from the first window that ends after it.

Example: 11 tokens have 10 positions, because the last token is only ever predicted. Windows of 4 tokens with stride 2:

    window   reads positions   gives records of
    0        0 1 2 3           0 1 2 3
    1        2 3 4 5           4 5
    2        4 5 6 7           6 7
    3        6 7 8 9           8 9

So from position 2 on, the teacher has seen at least window - stride = 2 tokens before the one at the position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class WindowGrid:
    """Windows over one file.

    Attributes:
        num_tokens: tokens of the file, at least 2.
        window: tokens that the teacher reads at once.
        stride: distance of the starts of two windows, at most `window`.
    """

    num_tokens: int
    window: int
    stride: int

    @property
    def num_positions(self) -> int:
        """Positions with a next token."""
        return self.num_tokens - 1

    @property
    def num_windows(self) -> int:
        """Windows that cover all positions."""
        return 1 + max(0, -(-(self.num_positions - self.window) // self.stride))

    def reads(self, index: int) -> tuple[int, int]:
        """Return the first position that a window reads, and the position after its last one."""
        start = index * self.stride
        return start, min(start + self.window, self.num_positions)

    def gives(self, first: int, stop: int) -> tuple[int, int]:
        """Return the first position whose record windows [first, stop) give, and the position after their last one."""
        return int(self.first_given(np.array(first))), self.reads(stop - 1)[1]

    def first_given(self, windows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the first position whose record each window gives."""
        found: npt.NDArray[np.int64] = np.where(windows == 0, 0, (windows - 1) * self.stride + self.window)
        return found
