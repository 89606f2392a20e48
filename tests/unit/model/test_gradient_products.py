"""Weight gradients added to their buffer by the matrix product equal those that are added afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_cpt.backend import cpu
from megatron_cpt.backend.distributed import process_groups
from megatron_cpt.config import draft_config
from tests.unit.model.test_packed_documents import LENGTH, RUN, _batch

cpu.install()

from megatron.core.tensor_parallel import layers  # noqa: E402  # after the CPU backend

from megatron_cpt.model import build_model, gradient_products  # noqa: E402
from megatron_cpt.train.device_batch import make_upload  # noqa: E402
from megatron_cpt.train.forward import ForwardPass  # noqa: E402


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)


def _add(product):
    def add(inputs, output_gradient, buffer):
        buffer.copy_(product(inputs, output_gradient, buffer))

    return staticmethod(add)


@pytest.mark.parametrize(
    ("product", "is_exact"),
    [
        (lambda x, dy, buffer: buffer + dy.float().t() @ x.float(), True),
        (lambda x, dy, buffer: (buffer + dy.float().t() @ x.float()).bfloat16(), False),
        (lambda x, dy, buffer: dy.float().t() @ x.float(), False),
    ],
)
def test_a_product_that_rounds_is_found(monkeypatch, product, is_exact):
    monkeypatch.setattr(gradient_products.TorchProducts, "wgrad_gemm_accum_fp32", _add(product))
    assert gradient_products.adds_exactly(cpu.CPU) == is_exact


def test_a_cpu_has_no_such_product():
    assert not gradient_products.adds_exactly(cpu.CPU)


def _gradients(monkeypatch, knobs):
    run = draft_config({**RUN, "documents": {}}).finish("run.yaml")
    monkeypatch.setattr(build_model, "choose_knobs", lambda *_, **__: frozenset(knobs))
    with process_groups(run.parallel) as ranks:
        model = build_model.build_model(run)
        batch = dataclasses.replace(_batch(), attention_documents=None)
        batches = make_upload(ranks.device, packs_documents=False)([batch, batch]).wait()
        losses = ForwardPass(model, 2, 1, ranks.device)(batches, train=True)
        assert losses[:, 1].sum() == 2 * (3 * LENGTH - 5)
        return model, {name: p.main_grad.clone() for name, p in model.chunks[0].named_parameters()}


def test_gradients_of_a_model_are_equal(monkeypatch):
    _, plain = _gradients(monkeypatch, [])
    monkeypatch.setattr(gradient_products, "adds_exactly", lambda device: True)
    model, fused = _gradients(monkeypatch, ["fused_grad_accumulation"])
    assert model.config.gradient_accumulation_fusion
    assert layers.fused_weight_gradient_mlp_cuda is gradient_products.TorchProducts
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    assert all(gradient.any() for gradient in plain.values())


def test_without_the_product_only_transformer_engines_layers_add(monkeypatch):
    model, gradients = _gradients(monkeypatch, ["fused_grad_accumulation"])
    assert not model.config.gradient_accumulation_fusion
    assert all(gradient.any() for gradient in gradients.values())
    layer = torch.nn.Linear(1, 1)
    layer.fuse_wgrad_accumulation = False
    gradient_products.enable_in_transformer_engine([torch.nn.Sequential(layer, torch.nn.Linear(1, 1))])
    assert layer.fuse_wgrad_accumulation
