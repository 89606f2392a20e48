"""Comparison of data-parallel replicas by a hash of each parameter's bits.

Replicas compute the same update from the same gradient, so their parameters are identical bit for bit. A difference
means that a processor, memory or link silently changed a bit, or that a kernel is not deterministic. The distributed
optimizer sends each rank's share to all others after every step; then the received copies are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_cpt.backend.collectives import gathered
from megatron_cpt.errors import CptError

# 8-byte words per block: as many as fit into the cache of a CPU; on a GPU, enough to need few kernel launches.
_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 22}
_ODD = (-7046029254386353131, -4658895280553007687)  # 0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9: odd, so invertible
_MAX_NAMES = 8


@torch.no_grad()
def bit_hash(tensor: torch.Tensor) -> torch.Tensor:
    """Return a 64-bit hash of a tensor's bits and their positions.

    The hash is the sum modulo 2^64 of the tensor's 8-byte words, each mixed with its position by invertible steps. One
    changed word always changes the hash; several leave it unchanged with a probability of about 2^-64. Integer sums do
    not depend on the order, so the hash is equal on every device.

    Returns:
        () int64 on the device of the tensor.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    num_words = data.numel() // 8
    if data.storage_offset() % 8:  # the view does not start at a multiple of 8 bytes
        data = data.clone()
    total = _hash_words(data[: 8 * num_words].view(torch.int64), 0)
    rest = data[8 * num_words :]
    if rest.numel():
        last = torch.zeros(8, dtype=torch.uint8, device=data.device)
        last[: rest.numel()] = rest
        total += _hash_words(last.view(torch.int64), num_words)
    return total


def _hash_words(words: torch.Tensor, first: int) -> torch.Tensor:
    """Return the sum of the mixed (n,) int64 words, the first of which has position `first`."""
    size = _BLOCK.get(words.device.type, 1 << 20)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    positions = torch.arange(min(size, words.numel()), device=words.device).mul_(_ODD[0])
    mixed, shifted = torch.empty_like(positions), torch.empty_like(positions)
    for begin in range(0, words.numel(), size):
        block = words[begin : begin + size]
        x, y = mixed[: block.numel()], shifted[: block.numel()]
        torch.add(positions[: block.numel()], _wrap((first + begin) * _ODD[0]), out=x)
        x.bitwise_xor_(block)
        x.bitwise_xor_(torch.bitwise_right_shift(x, 31, out=y)).mul_(_ODD[1])
        total += x.bitwise_xor_(torch.bitwise_right_shift(x, 29, out=y)).sum()
    return total


def _wrap(number: int) -> int:
    """Return an integer modulo 2^64 as a signed 64-bit word: 2^63 gives -2^63."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def check_replicas(chunks: Sequence[Any], step: int) -> None:
    """Compare the parameters of all data-parallel replicas; a collective call.

    Raises:
        CptError: replicas differ; the message, equal on every rank, names the parameters and the ranks.
    """
    if dist.get_world_size() == 1:
        return
    from megatron.core import parallel_state  # not above: see train/trainer.py

    from megatron_cpt.model.kernel_options import gather_weights

    gather_weights(chunks)
    named = [(name, p) for chunk in chunks for name, p in chunk.named_parameters()]
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    own = torch.stack([bit_hash(parameter) for _, parameter in named]).cpu()
    hashes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(hashes, own, group=group)
    found = _differences([name for name, _ in named], torch.stack(hashes), dist.get_process_group_ranks(group))
    if lines := gathered(found):
        more = f"; and {len(lines) - _MAX_NAMES} more" if len(lines) > _MAX_NAMES else ""
        raise CptError(
            f"step {step}: the data-parallel replicas differ in {'; '.join(lines[:_MAX_NAMES])}{more}; nothing was "
            "saved; run the same command again to resume from the last checkpoint; if this recurs, replace the node"
        )


def _differences(names: Sequence[str], hashes: torch.Tensor, ranks: Sequence[int]) -> list[str]:
    """Return one line per parameter whose hashes differ between replicas; `hashes` is (num_replicas, num_parameters).

    Example: hashes 5, 5, 6 on ranks 0, 2, 4 give "NAME on rank 4"; 5, 6 on ranks 1, 3 give "NAME among ranks [1, 3]".
    """
    lines = []
    for index in (hashes != hashes[0]).any(dim=0).nonzero().flatten().tolist():
        values = hashes[:, index].tolist()
        most, count = Counter(values).most_common(1)[0]
        minority = [rank for rank, value in zip(ranks, values, strict=True) if value != most]
        who = f"on rank {', '.join(map(str, minority))}" if 2 * count > len(ranks) else f"among ranks {list(ranks)}"
        lines.append(f"{names[index].removeprefix('module.')} {who}")
    return lines
