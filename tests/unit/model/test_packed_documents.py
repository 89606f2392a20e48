"""Packed sequences for Transformer Engine give the same attention as the mask of the local spec."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_cpt.backend import cpu
from megatron_cpt.backend.distributed import process_groups
from megatron_cpt.config import draft_config
from megatron_cpt.data.loading.batch import Batch, DocumentOptions, make_batch

cpu.install()

from megatron_cpt.model import spec  # noqa: E402  # megatron-core must be imported after the CPU backend
from megatron_cpt.model.build_model import build_model  # noqa: E402
from megatron_cpt.model.local_modules import LocalAttention  # noqa: E402
from megatron_cpt.train.device_batch import make_upload  # noqa: E402
from megatron_cpt.train.forward import ForwardPass  # noqa: E402

EOD, LENGTH = 256, 48
RUN = {
    "name": "run",
    "output": "out",
    "model": "tiny_nemotron",
    "seq_length": LENGTH,
    "batch": {"global": 2},
    "tokens": 96,
    "schedule": {"max_lr": 1e-3},
    "sources": {"a": {"path": "a"}},
    "phases": [{"name": "one", "blend": {"a": 1.0}}],
    "precision": {"compute": "fp32"},
    "documents": {"reset_attention": True, "eod_id": EOD},
}


@pytest.mark.parametrize(
    ("rows", "bounds", "longest"),
    [
        ([[0, 0, 0, 0]], [0, 4], 4),
        ([[0, 1, 1, 2]], [0, 1, 3, 4], 2),
        ([[0, 0, 0], [0, 0, 1]], [0, 3, 5, 6], 3),  # each sample starts a sequence, even with the same document number
        ([[0, 0, 1], [1, 1, 1]], [0, 2, 3, 6], 3),
    ],
)
def test_a_sequence_begins_with_each_document_and_each_sample(rows, bounds, longest):
    documents = np.array(rows, np.int32)
    batch = dataclasses.replace(_batch(), attention_documents=documents)
    (there,) = make_upload(torch.device("cpu"), packs_documents=True)([batch]).wait()
    assert there.sequence_bounds is not None
    assert there.attention_documents is None
    assert there.sequence_bounds.tolist() == bounds
    assert there.sequence_bounds.dtype == torch.int32
    assert there.longest_sequence == longest


class PackedAttention(LocalAttention):
    """Attention over packed sequences one by one, which defines Transformer Engine's `thd` format."""

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **_):  # type: ignore[override]
        assert attention_mask is None
        sizes = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = zip(*(x.unsqueeze(1).split(sizes) for x in (query, key, value)), strict=True)
        return torch.cat([super(PackedAttention, self).forward(*part, None) for part in parts]).squeeze(1)


def _batch() -> Batch:
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, EOD, LENGTH + 1) for _ in range(3)]
    for sample, ends in zip(samples, ([5, 6, 30], [], [0, LENGTH - 1]), strict=True):
        sample[ends] = EOD
    return make_batch(samples, [0, 1, 0], DocumentOptions(EOD, reset_attention=True, eod_loss=False))


def _losses_and_gradients(*, packed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    run = draft_config(dict(RUN)).finish("run.yaml")
    with process_groups(run.parallel) as ranks:
        model = dataclasses.replace(build_model(run), packs_documents=packed)
        batches = make_upload(ranks.device, packs_documents=packed)([_batch()]).wait()
        losses = ForwardPass(model, 2, 1, ranks.device)(batches, train=True)
        gradients = {name: p.main_grad.clone() for name, p in model.chunks[0].named_parameters()}
    return losses, gradients


def test_packed_documents_give_the_losses_and_gradients_of_masked_ones(monkeypatch):
    masked, gradients = _losses_and_gradients(packed=False)
    monkeypatch.setattr(spec, "LocalAttention", PackedAttention)
    packed, packed_gradients = _losses_and_gradients(packed=True)
    assert masked[:, 1].tolist() == packed[:, 1].tolist() == [2 * LENGTH - 5, LENGTH]
    torch.testing.assert_close(packed, masked, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
