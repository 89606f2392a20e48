"""Forward passes of rows of tokens through megatron-core's pipeline schedule, with a KV cache.

Every pass is one sequence of tokens [1, s] for the model: a `TokenRow`, or the newest token of each text that is being
generated. Replaced parts of the model give each token its own position and its own past:

| part | replacement |
| --- | --- |
| rotary embedding | a hook picks the rows of the tokens' positions |
| core attention | `RowAttention`: attention under the mask of a row, or over the cache of each text |
| output layer | a hook drops the hidden states whose logits nobody needs, before the largest matrix product |
| megatron-core's linear layers, without tensor parallelism | `_plain_linear`: no autograd, 6 % of a new token's time |

megatron-core's `StaticInferenceContext` has one length for all texts of a batch and refuses virtual pipelines
("Virtual pipeline parallelism is not supported for inference", transformer/attention.py in 0.16.1 and 0.19.2), so the
cache is our own.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_cpt.backend import rng_state, set_rng_state
from megatron_cpt.backend.cpu import unchanged_calls
from megatron_cpt.checkpoint.state.state_dicts import unwrap
from megatron_cpt.evaluate.token_tree import Ids, RowSegment, TokenRow, segments_of
from megatron_cpt.model.local_modules import LocalAttention

T = TypeVar("T")


class KvCache:
    """Keys and values of some texts, for the layers of this rank.

    Attributes:
        capacity: largest number of tokens per text.
        lengths: (slots,) number of cached tokens of each text, on the device.
        longest: largest of `lengths`.
    """

    def __init__(self, *, slots: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.set_lengths([0] * slots, device)
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # (slots, groups, capacity, d) each

    def set_lengths(self, lengths: Sequence[int], device: torch.device) -> None:
        """Set the number of cached tokens of each text."""
        self.lengths = torch.tensor(lengths, device=device)
        self.longest = max(lengths)
        self._slots = torch.arange(len(lengths), device=device)
        # for the cached tokens and the new one: 0 where a text may look, else -inf
        is_hidden = torch.arange(self.longest + 1, device=device) > self.lengths[:, None]
        self._mask = torch.zeros(is_hidden.shape, device=device).masked_fill_(is_hidden, float("-inf"))

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the mask (slots, 1, 1, longest + 1) that is added to attention scores."""
        self._mask = self._mask.to(dtype)
        return self._mask[:, None, None]

    def write_path(self, layer: int, key: torch.Tensor, value: torch.Tensor, slot: int, path: torch.Tensor) -> None:
        """Store the tokens of a row that make up a text; key and value are (s, 1, groups, d)."""
        for stored, new in zip(self._layer(layer, key), (key, value), strict=True):
            stored[slot, :, : len(path)] = new[path, 0].transpose(0, 1)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the newest token of each text, and return all keys and values up to the longest text."""
        layers = self._layer(layer, key)
        for stored, new in zip(layers, (key, value), strict=True):
            stored[self._slots, :, self.lengths] = new[:, 0]
        keys, values = (stored[:, :, : self.longest + 1] for stored in layers)
        return keys, values

    def keep(self, slots: Sequence[int]) -> None:
        """Keep these texts, in this order, and drop the others."""
        index = torch.tensor(slots, device=self.lengths.device)
        self.set_lengths(self.lengths[index].tolist(), self.lengths.device)
        self._layers = {layer: (key[index], value[index]) for layer, (key, value) in self._layers.items()}

    def _layer(self, layer: int, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self._layers:
            shape = (len(self.lengths), key.shape[2], self.capacity, key.shape[3])
            # zeros: memory that a mask hides must not be NaN
            self._layers[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        return self._layers[layer]


@dataclass(frozen=True)
class MaskedSegment:
    """RowSegment of a packed row.

    Attributes:
        keys: ranges of the row that the tokens see at least in part, the last one is the segment itself.
        mask: (1, 1, tokens, keys), True where attention is forbidden; None: each token sees all tokens before it.
    """

    keys: Sequence[range]
    mask: torch.Tensor | None

    @classmethod
    def of(cls, segment: RowSegment, ends: torch.Tensor) -> MaskedSegment:
        """Return a segment of a row; `ends` is on the device."""
        prefix, start, stop = segment
        own = range(start, stop)
        ends = ends[start:stop]
        if not prefix and bool((ends == ends[0]).all()):
            return cls([own], None)
        index = torch.arange(start, stop, device=ends.device)
        hidden = (index[None, :] > index[:, None]) | (index[:, None] >= ends[None, :])
        return cls([*prefix, own], nn.functional.pad(hidden, (sum(map(len, prefix)), 0))[None, None])

    def of_keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows (keys, ...) of a tensor (s, ...)."""
        parts = [tensor[keys.start : keys.stop] for keys in self.keys]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def masked_segments(ends: Ids, device: torch.device) -> list[MaskedSegment]:
    """Return the segments of a row; `ends` as in `TokenRow`."""
    on_device = torch.from_numpy(ends).to(device)
    return [MaskedSegment.of(segment, on_device) for segment in segments_of(ends)]


@dataclass
class Row(Generic[T]):
    """One forward pass.

    Attributes:
        tokens, positions: (s,) on the device.
        selected: (n,) indices of the tokens whose logits are needed.
        collect: makes the result of a row from its logits (n, columns of this rank), on the last stage.
        segments: of a packed row, with their masks; None for a row of newest tokens, which attend to `cache`.
        cache: the cache that the row reads or fills; None if keys and values are not needed again.
        cached_paths: slot of the cache by number of a row's sequence, and the indices of its tokens.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    selected: torch.Tensor
    collect: Callable[[torch.Tensor], T]
    segments: Sequence[MaskedSegment] | None = None
    cache: KvCache | None = None
    cached_paths: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of_tokens(
        cls, row: TokenRow, selected: torch.Tensor, collect: Callable[[torch.Tensor], T], device: torch.device
    ) -> Row[T]:
        """Return the forward pass of a packed row, without a cache."""
        tokens, positions = (torch.from_numpy(x).to(device) for x in (row.tokens, row.positions))
        return cls(tokens, positions, selected.to(device), collect, masked_segments(row.ends, device))

    def fill(self, cache: KvCache, paths: Mapping[int, Ids]) -> None:
        """Let the row store keys and values of its sequences in slots of a cache."""
        self.cache = cache
        self.cached_paths = {slot: torch.from_numpy(path).to(self.tokens.device) for slot, path in paths.items()}


class RowAttention(nn.Module):
    """Replaces the core attention of a layer while rows run."""

    def __init__(self, config: TransformerConfig, layer: int, runner: RowRunner) -> None:
        super().__init__()
        self.layer = layer
        self.scale = config.softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.masked = LocalAttention(config, layer, AttnMaskType.causal, "self", softmax_scale=self.scale).eval()
        self._runner = [runner]  # in a list, so that it is no submodule

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Compute attention; query (s, 1, heads, d), key and value (s, 1, groups, d), result (s, 1, heads * d)."""
        row = self._runner[0].row
        if row.segments is None:
            return self._newest_tokens(query, key, value, row.cache)
        for slot, path in row.cached_paths.items():
            assert row.cache is not None
            row.cache.write_path(self.layer, key, value, slot, path)
        out = []
        for segment in row.segments:
            own = segment.keys[-1]
            queries = query[own.start : own.stop]
            out.append(self.masked(queries, segment.of_keys(key), segment.of_keys(value), segment.mask))
        return torch.cat(out) if len(out) > 1 else out[0]

    def _newest_tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: KvCache | None
    ) -> torch.Tensor:
        assert cache is not None
        keys, values = cache.append(self.layer, key, value)
        texts, _, heads, size = query.shape
        groups = keys.shape[1]
        out = nn.functional.scaled_dot_product_attention(
            query.view(texts, groups, heads // groups, size),  # the heads of a group are queries of one length
            keys,
            values,
            attn_mask=cache.mask(query.dtype),
            scale=self.scale,
        )
        return out.reshape(texts, 1, heads * size)


class RowRunner:
    """Runs rows through the model of a job; see the table of the module."""

    def __init__(self, chunks: Sequence[nn.Module], config: TransformerConfig, *, device: torch.device) -> None:
        self.chunks = list(chunks)
        self.config = config
        self.device = device
        self._row: Row[Any] | None = None

    @property
    def row(self) -> Row[Any]:
        """The row that is being computed."""
        assert self._row is not None
        return self._row

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Replace the parts of the model and leave training mode; restore everything on exit."""
        # tensors of inference mode in a cache of the model, such as the rotary embedding's, would break training
        is_trained = any(parameter.requires_grad for chunk in self.chunks for parameter in chunk.parameters())
        with contextlib.ExitStack() as stack, torch.no_grad() if is_trained else torch.inference_mode():
            stack.callback(set_rng_state, rng_state())
            for chunk in self.chunks:
                stack.callback(chunk.train, chunk.training)  # runs last, when the chunk has its own parts again
                chunk.eval()
            for chunk in self.chunks:
                self._replace_parts(chunk, stack)
            _set(stack, self.config, "sequence_parallel", False)
            yield

    def _replace_parts(self, chunk: nn.Module, stack: contextlib.ExitStack) -> None:
        model = unwrap(chunk)
        hooks = [model.rotary_pos_emb.register_forward_hook(self._rotary_of_positions)]
        if model.post_process:
            hooks.append(model.output_layer.register_forward_pre_hook(self._selected_states))
        for hook in hooks:
            stack.callback(hook.remove)
        is_whole = self.config.tensor_model_parallel_size == 1
        for module in model.modules():
            # not subclasses, which may compute in FP8
            if is_whole and type(module) in (ColumnParallelLinear, RowParallelLinear):
                module.forward = functools.partial(_plain_linear, module)
                stack.callback(delattr, module, "forward")
        for layer in model.decoder.layers:
            # `layer_number` is unique over all pipeline stages
            attention = RowAttention(self.config, layer.layer_number, self)
            _set(stack, layer.self_attention, "core_attention", attention)
        for module in model.modules():
            for name, value in list(vars(module).items()):
                # `ub_`: Transformer Engine's buffers for overlapped communication, which fit training's shapes only
                if value is True and (name in _SEQUENCE_PARALLEL or name.startswith("ub_")):
                    _set(stack, module, name, False)

    def _rotary_of_positions(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        cache = self.row.cache
        # megatron-core makes one row per token, enough for a packed row; its `forward` caches by length
        table = output if self.row.segments is not None or cache is None else module.forward(cache.capacity)
        return table[self.row.positions]

    def _selected_states(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][self.row.selected], *inputs[1:])

    def __call__(self, rows: Sequence[Row[T]]) -> list[T]:
        """Run rows of one length; the results are on the ranks of the last pipeline stage, other ranks get none."""
        stages = self.config.pipeline_model_parallel_size
        is_interleaved = len(self.chunks) > 1
        # the interleaved schedule takes multiples of the number of stages
        filled = [*rows, *[rows[-1]] * (-len(rows) % stages if is_interleaved else 0)]
        iterators = [iter(filled) for _ in self.chunks]
        found = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iterators if is_interleaved else iterators[0],
            model=self.chunks,
            num_microbatches=len(filled),
            seq_length=len(rows[0].tokens),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return list(found[: len(rows)])

    def _forward(self, rows: Iterator[Row[T]], chunk: nn.Module) -> tuple[torch.Tensor, Any]:
        self._row = row = next(rows)
        with unchanged_calls():
            output = chunk(row.tokens[None], row.positions[None], None)
        return output, lambda logits, **_: row.collect(logits[0])


def _plain_linear(
    layer: ColumnParallelLinear | RowParallelLinear, states: torch.Tensor, weight: torch.Tensor | None = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute a linear layer as its `forward` does on one rank; return the result and the bias that is left to add."""
    bias, left = (None, layer.bias) if layer.skip_bias_add else (layer.bias, None)
    return nn.functional.linear(states, layer.weight if weight is None else weight, bias), left


_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""Attributes of megatron-core's and Transformer Engine's modules; rows are not cut over tensor-parallel ranks."""


def _set(stack: contextlib.ExitStack, target: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack ends."""
    stack.callback(setattr, target, name, getattr(target, name))
    setattr(target, name, value)
