"""Are the replicas still the same? A hash of each parameter's bits, compared over the data-parallel ranks.

Replicas compute the same update from the same gradient, so their parameters are equal to the bit. Where they are not, a
processor, a memory or a link has changed a bit without a word, or a kernel is not deterministic where it must be. The
distributed optimizer sends each rank's share to all others after every step; there the received copies are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cpt.backend.collectives import gathered
from megatron_cpt.errors import CptError

# Words of 8 bytes that are mixed at once: what a cache holds, or few launches of kernels.
_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 22}
_ODD = (-7046029254386353131, -4658895280553007687)  # 0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9: odd, so invertible
_MOST_NAMES = 8


@torch.no_grad()
def bit_hash(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit hash of a tensor's bits and their places.

    The sum modulo 2^64 of its words of 8 bytes, each mixed with its place by steps that can be undone: one word that
    differs always changes the hash, several do but for one chance in about 2^64. Sums of integers know no order, so the
    hash is the same on every device.

    Returns:
        () int64 on the device of the tensor.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    num_words = data.numel() // 8
    if data.storage_offset() % 8:  # the words of a view may not begin inside a word of its storage
        data = data.clone()
    total = _hash_words(data[: 8 * num_words].view(torch.int64), 0)
    rest = data[8 * num_words :]
    if rest.numel():
        last = torch.zeros(8, dtype=torch.uint8, device=data.device)
        last[: rest.numel()] = rest
        total += _hash_words(last.view(torch.int64), num_words)
    return total


def _hash_words(words: torch.Tensor, first: int) -> torch.Tensor:
    """The sum of mixed words, (n,) int64; `first` is the place of the first."""
    size = _BLOCK.get(words.device.type, 1 << 20)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    places = torch.arange(min(size, words.numel()), device=words.device).mul_(_ODD[0])
    mixed, shifted = torch.empty_like(places), torch.empty_like(places)
    for begin in range(0, words.numel(), size):
        block = words[begin : begin + size]
        x, y = mixed[: block.numel()], shifted[: block.numel()]
        torch.add(places[: block.numel()], _wrap((first + begin) * _ODD[0]), out=x)
        x.bitwise_xor_(block)
        x.bitwise_xor_(torch.bitwise_right_shift(x, 31, out=y)).mul_(_ODD[1])
        total += x.bitwise_xor_(torch.bitwise_right_shift(x, 29, out=y)).sum()
    return total


def _wrap(number: int) -> int:
    """A whole number modulo 2^64, as a signed word."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def check_replicas(chunks: Sequence[torch.nn.Module], step: int) -> None:
    """Compare the parameters of all data-parallel replicas; a collective call.

    Args:
        chunks: the model's chunks on this rank.
        step: for the message.

    Raises:
        CptError: on every rank, naming the parameters and the ranks.
    """
    if dist.get_world_size() == 1:
        return
    named = [(name, p) for chunk in chunks for name, p in chunk.named_parameters()]
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    own = torch.stack([bit_hash(parameter) for _, parameter in named]).cpu()
    hashes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(hashes, own, group=group)
    found = _differences([name for name, _ in named], torch.stack(hashes), dist.get_process_group_ranks(group))
    if lines := gathered(found):
        more = f"; and {len(lines) - _MOST_NAMES} more" if len(lines) > _MOST_NAMES else ""
        raise CptError(
            f"step {step}: the data-parallel replicas differ in {'; '.join(lines[:_MOST_NAMES])}{more}; nothing was "
            "saved; start again from the last checkpoint, without the node of that rank if it happens again"
        )


def _differences(names: Sequence[str], hashes: torch.Tensor, ranks: Sequence[int]) -> list[str]:
    """A line for each parameter whose hashes, (num_replicas, num_parameters), are not one."""
    lines = []
    for place in (hashes != hashes[0]).any(dim=0).nonzero().flatten().tolist():
        values = hashes[:, place].tolist()
        most, count = Counter(values).most_common(1)[0]
        odd = [rank for rank, value in zip(ranks, values, strict=True) if value != most]
        who = f"on rank {', '.join(map(str, odd))}" if 2 * count > len(ranks) else f"among ranks {list(ranks)}"
        lines.append(f"{names[place].removeprefix('module.')} {who}")
    return lines
