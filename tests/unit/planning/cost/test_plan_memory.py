"""The memory estimate, compared with the formulas of its papers."""

from __future__ import annotations

import pytest

from megatron_cpt.config import draft_config
from megatron_cpt.planning import GIB, Layout, count_parameters
from megatron_cpt.planning.cost.activations import layer_activation_bytes
from megatron_cpt.planning.cost.memory import MIB, stage_memories, stage_memory
from megatron_cpt.planning.hardware import H100

HIDDEN, HEADS, LENGTH, MICRO = 128, 8, 64, 2
TOKENS = LENGTH * MICRO


def config(data, *overrides):
    draft = draft_config(data, overrides)
    assert draft.problems == []
    return draft.config


def stage(run, number=0, num_gpus=None):
    return stage_memory(run, Layout.build(run, num_gpus), number)


@pytest.fixture
def gpt3_shaped(run_data):
    """The model of Korthikanti et al.: as many key/value heads as query heads, 4 x hidden in the MLP, dropout."""
    run_data["model"] = {
        **{"layers": 4, "hidden": HIDDEN, "ffn_hidden": 4 * HIDDEN, "heads": HEADS, "vocab": 256, "norm": "layernorm"},
        **{"activation": "gelu", "hidden_dropout": 0.1, "attention_dropout": 0.1},
    }
    return run_data


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [
        # Table 2 of arXiv 2205.05198, in bytes per token and hidden unit
        ([], 34 + 5 * HEADS * LENGTH / HIDDEN),
        (["parallel.tensor=4"], 10 + 24 / 4 + 5 * HEADS * LENGTH / (HIDDEN * 4)),
        (["parallel={tensor: 4, sequence: true}"], (34 + 5 * HEADS * LENGTH / HIDDEN) / 4),
        (["parallel.tensor=4", "recompute.granularity=selective"], 10 + 24 / 4),
        (["parallel={tensor: 4, sequence: true}", "recompute.granularity=selective"], 34 / 4),
    ],
)
def test_the_activations_of_a_layer(gpt3_shaped, overrides, factor):
    run = config(gpt3_shaped, *overrides)
    assert layer_activation_bytes(run, fused_attention=False) == pytest.approx(factor * HIDDEN * TOKENS)


def test_fused_attention_keeps_no_scores(gpt3_shaped):
    run = config(gpt3_shaped)
    assert layer_activation_bytes(run) == pytest.approx((34 * HIDDEN + 4 * HEADS) * TOKENS)
    selective = config(gpt3_shaped, "recompute.granularity=selective")
    assert layer_activation_bytes(selective) == pytest.approx(34 * HIDDEN * TOKENS)


def test_torch_keeps_more_than_transformer_engine(run_data):
    """Without GQA torch saves the joint product of queries, keys and values, and copies of queries and keys."""
    run = config(run_data, "model.kv_groups=8", "precision.compute=fp32")
    ffn = run.model.ffn_hidden
    per_token = 4 * HIDDEN + (3 * HIDDEN + 2 * HIDDEN) + HIDDEN + 2 * ffn
    rotary = 4 * LENGTH * run.model.head_size * run.model.rotary_percent
    expected = (4 * per_token + 4 * HEADS) * TOKENS + 4 * rotary
    assert layer_activation_bytes(run) == layer_activation_bytes(run, spec="local") == pytest.approx(expected)


def test_fp8_keeps_the_inputs_of_matrix_products_in_a_byte(run_data):
    plain, fp8 = config(run_data), config(run_data, "precision.fp8={}")
    ffn = plain.model.ffn_hidden
    # outputs of two norms and the activation are halved; the attention output is saved in bf16 and in FP8
    saved = 2 * HIDDEN + ffn - HIDDEN
    assert layer_activation_bytes(plain) - layer_activation_bytes(fp8) == pytest.approx(saved * TOKENS)


def test_grouped_queries_and_gates(run_data):
    run_data["model"] = {"preset": "tiny_llama"}
    run = config(run_data)
    per_token = (
        4 * 128 + (128 + 2 * 64) + 128 + 3 * 344
    )  # norms and inputs; q, k, v; attention output; gate, up, product
    assert layer_activation_bytes(run) == pytest.approx((2 * per_token + 4 * HEADS) * TOKENS)
    run_data["speed"] = {"fused_activation": False}
    in_parts = per_token + 2 * 344  # activated, copied
    assert layer_activation_bytes(config(run_data)) == pytest.approx((2 * in_parts + 4 * HEADS) * TOKENS)


def test_context_parallelism_splits_the_sequence(run_data):
    whole, halved = config(run_data), config(run_data, "parallel.context=2")
    assert layer_activation_bytes(halved) == layer_activation_bytes(whole) / 2


def test_states_are_18_bytes_a_parameter(run_data):
    run = config(run_data, "model.vocab=256")
    parameters = count_parameters(run.model).total
    memory = stage(run)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    fp32 = stage(config(run_data, "model.vocab=256", "precision.compute=fp32"))
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)


def test_moments_in_bf16_take_two_bytes_each(run_data):
    plain, bf16 = config(run_data), config(run_data, "optimizer.moments=bf16")
    assert stage(bf16).optimizer == stage(plain).optimizer * 8 / 12
    assert stage(bf16).total == stage(plain).total - stage(plain).optimizer * 4 / 12
    fp32 = config(run_data, "precision.compute=fp32")
    halved = config(run_data, "precision.compute=fp32", "optimizer.moments=bf16")
    assert stage(halved).optimizer == stage(fp32).optimizer / 2


def test_a_moving_average_takes_four_bytes_and_is_sharded_like_the_optimizer(run_data):
    run = config(run_data, "model.vocab=256", "ema.decay=0.99")
    without = config(run_data, "model.vocab=256")
    assert stage(without).ema == 0
    assert stage(run).ema == 4 * count_parameters(run.model).total
    assert stage(run, num_gpus=4).ema == stage(run).ema / 4
    assert stage(run).total == stage(without).total + stage(run).ema
    plain = config(run_data, "parallel.distributed_optimizer=false", "ema.every=7")
    assert stage(plain, num_gpus=4).ema == stage(plain).ema


def test_the_distributed_optimizer_shards_over_replicas(run_data):
    run = config(run_data)
    assert stage(run, num_gpus=4).optimizer == stage(run).optimizer / 4
    assert stage(config(run_data, "parallel.context=2"), num_gpus=4).optimizer == stage(run).optimizer / 4
    plain = config(run_data, "parallel.distributed_optimizer=false")
    assert stage(plain, num_gpus=4).optimizer == stage(plain).optimizer


def test_stages_share_the_model_out(run_data):
    run = config(run_data, "parallel={tensor: 2, pipeline: 4}")
    parts = count_parameters(run.model)
    table = 384 * 128  # padded
    layer = parts.layer.matmul / 2 + parts.layer.norms
    expected = [layer + table / 2, layer, layer, layer + table / 2 + parts.final_norm]
    assert [stage(run, number).weights / 2 for number in range(4)] == expected


def test_a_tied_head_is_a_copy_where_it_is_on_another_stage(run_data):
    one = stage(config(run_data, "model.tied_embeddings=true")).weights
    two = [stage(config(run_data, "model.tied_embeddings=true", "parallel.pipeline=2"), n).weights for n in (0, 1)]
    assert sum(two) == one + 2 * 384 * 128


def test_the_first_stage_holds_a_micro_batch_for_every_stage(run_data):
    """1F1B: stage i of p has p - i micro-batches in flight."""
    run = config(run_data, "parallel.pipeline=4")
    layer = layer_activation_bytes(run)
    assert [stage(run, number).activations / layer for number in range(3)] == [4, 3, 2]
    few = config(run_data, "parallel.pipeline=4", "batch.micro=4")  # 2 micro-batches: no more can be in flight
    assert stage(few).activations == 2 * layer_activation_bytes(few)


def test_the_interleaved_schedule_holds_more(run_data):
    """Section 4.2.3 of arXiv 2205.05198: 1 + (p - 1) / (p m) times as much on the first stage; and what was sent."""
    plain = config(run_data, "parallel={pipeline: 2}")
    interleaved = config(run_data, "parallel={pipeline: 2, virtual_pipeline: 2}")
    layer, sent = layer_activation_bytes(plain), 2 * HIDDEN * TOKENS
    assert stage(plain).activations == 2 * (2 * layer)
    assert stage(interleaved).activations == pytest.approx(2 * 2 * layer * (1 + 1 / (2 * 2)) + 5 * sent)


@pytest.mark.parametrize(
    ("recompute", "layers_kept", "inputs_kept"),
    [
        ("{granularity: full}", 0, 4),
        ("{granularity: full, num_layers: 2}", 0, 2),
        ("{granularity: full, method: block, num_layers: 3}", 1, 3),
        ("{granularity: full, method: block, num_layers: 9}", 0, 4),
    ],
)
def test_full_recomputation_keeps_inputs(run_data, recompute, layers_kept, inputs_kept):
    run = config(run_data, f"recompute={recompute}")
    layer_input, head = 2 * HIDDEN * TOKENS, 2 * 2 * HIDDEN * TOKENS
    expected = layers_kept * layer_activation_bytes(run) + inputs_kept * layer_input + head
    assert stage(run).activations == pytest.approx(expected)


@pytest.mark.parametrize(
    ("recompute", "again"),
    [
        ("{granularity: full}", 1),
        ("{granularity: full, num_layers: 2}", 2),
        ("{granularity: full, method: block}", 0),
        ("{granularity: full, method: block, num_layers: 2}", 1),
    ],
)
def test_recomputed_layers_count_as_working_memory(run_data, recompute, again):
    plain, full = (config(run_data, "parallel.pipeline=2", *more) for more in ([], [f"recompute={recompute}"]))
    wide = 2 * (3 * plain.model.ffn_hidden + HIDDEN) * TOKENS
    assert stage(plain).working == pytest.approx(wide)
    assert stage(full).working == pytest.approx(wide + again * layer_activation_bytes(plain))


def test_logits_are_freed_before_the_layers_run_backward(run_data):
    run = config(run_data, "parallel.pipeline=2", "model.vocab=100000")
    assert stage(run, 0).working > 0
    assert stage(run, 1).working == 0


def test_a_gpu_takes_memory_of_its_own(run_data):
    run = config(run_data, "parallel.tensor=2")
    layout = Layout.build(run, 8)
    bare, on_gpu = stage_memory(run, layout, 0), stage_memory(run, layout, 0, gpu=H100)
    assert bare.reserved == 0
    # CUDA, two workspaces of 32 MiB, and communicators for tensor parallel, data parallel and all ranks
    assert on_gpu.total - bare.total == on_gpu.reserved == (512 + 2 * 32 + 3 * 2 * 32 * 4) * MIB


def test_unequal_stages_have_their_own_layers(run_data):
    run = config(run_data, "parallel={pipeline: 3, pipeline_layout: [1, 3, 0]}")
    parts = count_parameters(run.model)
    table, layer = 384 * 128, parts.layer.total
    expected = [layer + table, 3 * layer, table + parts.final_norm]
    assert [stage(run, number).weights / 2 for number in range(3)] == expected
    # stage 0 holds three micro-batches of one layer, stage 1 two of three layers, both without the outputs they sent;
    # the head has no layer
    saved, hidden = layer_activation_bytes(run), 2 * HIDDEN * TOKENS
    activations = [stage(run, number).activations for number in range(3)]
    assert activations == pytest.approx([3 * saved, 2 * 3 * saved, 2 * hidden])


def test_unequal_chunks_hold_what_the_schedule_keeps(run_data):
    """Stage 0 of 2 with 2 chunks and 8 micro-batches holds 5 passes, at its peak 4 of the first chunk.

    F and B are passes of a chunk: F0 F0 F1 F1 F0, then B1 F0, B1 F1, B0 F1, B0 F0, ...: after B1 F0 it holds 4 + 1.
    """
    saved, hidden = layer_activation_bytes(config(run_data)), 2 * HIDDEN * TOKENS
    for layout, layers in (([2, 1, 1, 0], 4 * 2 + 1), ([1, 1, 2, 0], 3 * 1 + 2 * 2)):
        run = config(run_data, f"parallel={{pipeline: 2, virtual_pipeline: 2, pipeline_layout: {layout}}}")
        assert stage(run).activations == pytest.approx(layers * saved + 5 * hidden)


def test_logits_are_on_the_last_stage(run_data):
    run = config(run_data, "parallel={tensor: 2, pipeline: 2}")
    assert stage(run, 0).logits == 0
    assert stage(run, 1).logits == (2 + 4) * 384 / 2 * TOKENS


def test_fp8_adds_two_copies_of_the_linear_weights(run_data):
    plain, fp8 = stage(config(run_data)), stage(config(run_data, "precision.fp8={}"))
    assert fp8.weights - plain.weights == 2 * 4 * count_parameters(config(run_data).model).layer.matmul


def test_weights_that_are_kept_in_fp8_have_no_bf16_copy(run_data):
    run_data["model"]["preset"] = "tiny_nemotron"
    assert stage(config(run_data, "precision.fp8={params: true}")).weights == stage(config(run_data)).weights


def test_more_stages_than_layers_are_not_counted_one_by_one(run_data):
    """Build a plan for an invalid run.yaml, so that all its problems are reported together."""
    run = draft_config(run_data, ["parallel.pipeline=1000000000000"]).config
    assert len(stage_memories(run, Layout.build(run))) == run.model.layers + 2


def test_the_largest_stage_counts(run_data):
    big_head = config(run_data, "model.vocab=100000", "parallel.pipeline=2")
    memory = max(stage_memories(big_head, Layout.build(big_head)), key=lambda stage: stage.total)
    assert memory.stage == 1
    assert memory.total == max(one.total for one in stage_memories(big_head, Layout.build(big_head)))
    assert sum(gib for part, gib in memory.to_dict().items() if part != "stage") == pytest.approx(memory.total / GIB)
