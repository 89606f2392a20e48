"""Nemotron-4 15B as converted, compared with the model that megatron-core builds for TP8 x PP4 on the meta device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_cpt.backend import cpu
from megatron_cpt.config import ModelConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_cpt.config.presets import preset
from megatron_cpt.convert.mapping.families import NEMOTRON
from megatron_cpt.convert.mapping.names import stored_name
from megatron_cpt.convert.mapping.resolve import resolve
from megatron_cpt.convert.mapping.shapes import expected_tensors
from megatron_cpt.convert.megatron.torch_dist_plan import Target, TensorSpec, plan_files
from megatron_cpt.planning.cost.parameters import count_parameters

MODEL = ModelConfig(**preset("nemotron4_15b"))
PARAMETERS = 15_628_775_424
PARALLEL = ParallelConfig(tensor=8, pipeline=4, sequence=True)


def test_converted_tensors_are_the_model() -> None:
    rules = resolve(NEMOTRON, MODEL)
    expected = expected_tensors(MODEL)
    assert {rule.megatron: rule.megatron_shape for rule in rules} == expected
    assert sum(math.prod(shape) for rule in rules for shape in rule.hf_shapes) == PARAMETERS
    assert sum(math.prod(shape) for shape in expected.values()) == PARAMETERS == count_parameters(MODEL).total
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in expected.items()}
    assert sum(spec.num_bytes for spec in specs.values()) == 2 * PARAMETERS
    files = plan_files(specs, MODEL.layers, Target(8, 4))
    names = [name for file in files for name in file.tensors]
    assert sorted(names) == sorted(expected)
    assert {file.name.split("_")[2] for file in files} == {"0", "1", "2", "3"}


def _shards_of_rank(rank: int) -> list[Any]:
    """Return every sharded tensor of one of the 32 ranks, without memory or other processes."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from megatron_cpt.model.initialize import _shards
    from megatron_cpt.model.spec import local_spec
    from megatron_cpt.model.transformer_config import transformer_config

    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=32)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=PARALLEL.tensor, pipeline_model_parallel_size=PARALLEL.pipeline
        )
        config = transformer_config(MODEL, PARALLEL, PrecisionConfig(compute="bf16"), RecomputeConfig())
        with torch.device("meta"):
            model = GPTModel(
                config=config,
                transformer_layer_spec=local_spec(qk_norm=False).block(config, None),
                vocab_size=MODEL.padded_vocab,
                max_sequence_length=4096,
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
                position_embedding_type="rope",
                rotary_percent=MODEL.rotary_percent,
                share_embeddings_and_output_weights=False,
            )
        # norms choose their device themselves; they take a few kilobytes
        assert all(parameter.is_meta for parameter in model.parameters() if parameter.dim() > 1)
        return list(_shards(model.sharded_state_dict()))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _boxes(shards: list[Any]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Yield key, global shape, offset and size of every box that a rank writes, without copies for other ranks."""
    for shard in shards:
        if not any(shard.replica_id):
            layer_axes = (1,) * shard.prepend_axis_num
            yield shard.key, tuple(shard.global_shape), tuple(shard.global_offset), (*layer_axes, *shard.data.shape)


@pytest.mark.long
def test_all_ranks_of_tp8_pp4() -> None:
    """All 32 ranks together have the names, shapes and number of parameters of the converted checkpoint."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401 - registers the backend

    cpu.install()
    shapes: dict[str, tuple[int, ...]] = {}
    covered: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for rank in range(32):
        for key, shape, offset, size in _boxes(_shards_of_rank(rank)):
            assert shapes.setdefault(key, shape) == shape
            assert (offset, size) not in covered.setdefault(key, set())
            covered[key].add((offset, size))
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in expected_tensors(MODEL).items():
        key, layer = stored_name(name)
        expected[key] = shape if layer is None else (MODEL.layers, *shape)
    assert shapes == expected
    counts = {key: sum(math.prod(size) for _, size in boxes) for key, boxes in covered.items()}
    assert counts == {key: math.prod(shape) for key, shape in expected.items()}
    assert sum(counts.values()) == PARAMETERS
