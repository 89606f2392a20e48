"""Exponential moving average (EMA) of the weights, divided over the ranks like the optimizer.

    ema = decay * ema + (1 - decay) * weight

in fp32, from the fp32 master weights, after the update of every step whose number is a multiple of `every`. It starts
as the weights before the first step. So it is a weighted mean of weights from the beginning, and needs no correction
for a bias: Adam's moments need one because they start at zero (arXiv 1412.6980, section 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.config.schema import EmaConfig
from megatron_cpt.optim.owned_weights import OwnedWeight, is_sharded, owned_weights


class WeightEma:
    """Moving average of the weights that this rank updates, 4 bytes per weight.

    The content is undefined until `restart` or a load has filled it.

    Args:
        config: section `ema`.
        chunks, optimizer: of this rank.
    """

    def __init__(
        self, config: EmaConfig, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
    ) -> None:
        self._config, self._chunks = config, chunks
        self._is_sharded = is_sharded(optimizer)
        self._owned = owned_weights(optimizer)
        self._masters = [owned.master.detach().view(-1) for owned in self._owned]
        self._averages = [torch.empty_like(master) for master in self._masters]

    def entries(self) -> Iterator[tuple[OwnedWeight, torch.Tensor]]:
        """Yield the weights with their average, fp32 (n,)."""
        yield from zip(self._owned, self._averages, strict=True)

    def restart(self) -> None:
        """Set the average to the current weights."""
        if self._averages:
            torch._foreach_copy_(self._averages, self._masters)

    def update(self, step: int) -> None:
        """Move the average towards the weights if it is due after this step, whose update has been applied."""
        if self._averages and step % self._config.every == 0:
            # ema + (1 - decay) * (weight - ema): both are read once
            torch._foreach_lerp_(self._averages, self._masters, 1.0 - self._config.decay)

    @contextlib.contextmanager
    def as_weights(self) -> Iterator[None]:
        """Compute with the average in place of the weights, which are afterwards the same again, bit for bit.

        A collective call at both ends. No save may be reading the weights. Meanwhile this rank keeps a copy of the
        weights that it updates, in the compute format; the fp32 master weights are not touched.

        After an exception the model keeps the average: the other ranks may not reach the second collective.
        """
        elements = [owned.elements() for owned in self._owned]
        self._wait_for_gather()
        kept = [part.clone() for part in elements]
        scales = [(tensor, tensor.clone()) for tensor in self._delayed_scaling()]
        self._set(elements, self._averages)
        yield
        self._set(elements, kept)
        for tensor, before in scales:
            tensor.copy_(before)

    def _set(self, elements: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        """Write the elements that this rank owns, rounded to the compute format, and exchange them."""
        if elements:
            torch._foreach_copy_(elements, values)
        if self._is_sharded:
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)

    def _wait_for_gather(self) -> None:
        """Finish an exchange of weights in progress, which `overlap_param_gather` may have left to the next forward."""
        for chunk in self._chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def _delayed_scaling(self) -> Iterator[torch.Tensor]:
        """Yield Transformer Engine's FP8 scales and histories, which a forward pass of another model would change."""
        for chunk in self._chunks:
            for module in chunk.modules():
                for scaling in getattr(module, "fp8_meta", {}).values():
                    if hasattr(scaling, "amax_history"):
                        yield from (scaling.scale, scaling.amax_history)
