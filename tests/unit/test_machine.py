"""What the machine cannot do is said before anything is built."""

from __future__ import annotations

import pytest

from megatron_cpt.backend import cpu
from megatron_cpt.config import draft_config
from megatron_cpt.errors import UserError

cpu.install()

RUN = {
    "name": "run",
    "output": "out",
    "model": "tiny_nemotron",
    "seq_length": 64,
    "batch": {"global": 2},
    "tokens": 1280,
    "schedule": {"max_lr": 1e-3},
    "sources": {"a": {"path": "a"}},
    "phases": [{"name": "one", "blend": {"a": 1.0}}],
    "documents": {"reset_attention": True, "eod_id": 256},
}


@pytest.mark.parametrize(
    ("spec", "override", "message"),
    [
        ("transformer_engine", "documents.reset_positions=true", "documents.reset_attention: Transformer Engine"),
        ("local", "precision.fp8.recipe=delayed", "precision.fp8: needs a GPU with Transformer Engine"),
        ("local", "parallel.context=2", "parallel.context: 2: needs a GPU with Transformer Engine"),
    ],
)
def test_what_a_spec_cannot_do_is_refused(spec: str, override: str, message: str) -> None:
    from megatron_cpt.model.build import _check_machine
    from megatron_cpt.model.spec import LayerSpec

    config = draft_config(dict(RUN), [override]).finish("run.yaml")
    with pytest.raises(UserError, match=message):
        _check_machine(config, LayerSpec(spec, layer=None, norm=None))
