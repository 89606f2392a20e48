"""Read the samples of a token file in an order of your own: easy ones first.

    python examples/api/custom_sampler.py runs/api/text

A `TokenStream` is random access: sample k is a function of the seed and k alone, and one contiguous read. Any order of
sample numbers is therefore a sampler, and it resumes anywhere without state.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

import megatron_cpt as cpt


class EasyFirst:
    """Sampler over the first epoch of a stream, ordered by the number of different tokens in a sample."""

    def __init__(self, stream: cpt.TokenStream) -> None:
        variety = [len(np.unique(stream[k])) for k in range(stream.samples_per_epoch)]
        self.stream, self.order = stream, np.argsort(variety, kind="stable")

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.stream[int(k)] for k in self.order)


def main() -> None:
    """Print the number of different tokens in the first and last samples of the order."""
    stream = cpt.TokenStream.open("text", sys.argv[1], seq_length=64, seed=1234)
    samples = list(EasyFirst(stream))
    for sample in (*samples[:2], *samples[-2:]):
        print(f"{len(np.unique(sample)):3} different tokens: {bytes(sample[sample < 256].astype(np.uint8))[:50]!r}")


if __name__ == "__main__":
    main()
