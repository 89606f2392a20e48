"""Gradients are divided by the number of tokens; a step without tokens leaves them unchanged."""

from __future__ import annotations

import pytest
import torch

from megatron_cpt.backend import cpu
from megatron_cpt.backend.distributed import process_groups
from tests.unit.model.test_packed_documents import RUN

cpu.install()

from megatron_cpt.config import draft_config  # noqa: E402
from megatron_cpt.model.build_model import build_model  # noqa: E402
from megatron_cpt.model.finalize_gradients import finalize_gradients  # noqa: E402


@pytest.mark.parametrize(("tokens", "divisor"), [(4, 4.0), (0, 1.0), (None, 1.0)])
def test_gradients_are_divided_by_the_tokens(tokens, divisor):
    run = draft_config(dict(RUN)).finish("run.yaml")
    with process_groups(run.parallel):
        chunks = build_model(run, draw_weights=False).chunks
        gradients = [parameter.main_grad for chunk in chunks for parameter in chunk.parameters()]
        for gradient in gradients:
            gradient.fill_(6.0)
        finalize_gradients(chunks, None if tokens is None else torch.tensor(tokens, dtype=torch.int))
        assert all((gradient == 6.0 / divisor).all() for gradient in gradients)
