"""Rival of the GPU measurements: the same GPT in plain PyTorch, with what an experienced user would turn on.

Fused attention (SDPA), fused AdamW, torch.compile, and autocast to bf16 over fp32 weights, which gives the fp32 master
weights and fp32 gradients that this project has. Each layer is compiled on its own, and the head with the loss, as
torchtitan does: the layers share one compiled graph. The weights have the shapes and the order of megatron-core's, so
that a test can copy them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megatron_cpt.config import Activation, ModelConfig, Norm, RunConfig

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SQUARED_RELU: lambda x: functional.relu(x).square(),
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}


class PlainNorm(nn.Module):
    """LayerNorm, LayerNorm1P (stored weight w - 1) or RMSNorm."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.eps, self.is_zero_centered = model.norm_eps, model.norm is Norm.LAYERNORM1P
        self.weight = nn.Parameter(torch.zeros(model.hidden) if self.is_zero_centered else torch.ones(model.hidden))
        self.bias = None if model.norm is Norm.RMSNORM else nn.Parameter(torch.zeros(model.hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension."""
        weight = self.weight + 1 if self.is_zero_centered else self.weight
        if self.bias is None:
            return functional.rms_norm(x, weight.shape, weight, self.eps)
        return functional.layer_norm(x, weight.shape, weight, self.bias, self.eps)


class PlainLayer(nn.Module):
    """Attention and MLP, each with a norm before and a residual around it."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.groups, self.size = model.num_kv_groups, model.head_size
        self.heads, self.is_gated = model.heads, model.gated
        self.activation = _ACTIVATIONS[model.activation]
        self.norm1, self.norm2 = PlainNorm(model), PlainNorm(model)
        # For each group: the queries of its heads, then its key, then its value.
        self.qkv = nn.Linear(model.hidden, (self.heads + 2 * self.groups) * self.size, bias=False)
        self.proj = nn.Linear(self.heads * self.size, model.hidden, bias=False)
        self.fc1 = nn.Linear(model.hidden, model.ffn_hidden * (2 if self.is_gated else 1), bias=False)
        self.fc2 = nn.Linear(model.ffn_hidden, model.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Compute one layer; x is (b, s, hidden)."""
        batch, length, _ = x.shape
        per_group = self.heads // self.groups
        qkv = self.qkv(self.norm1(x)).view(batch, length, self.groups, per_group + 2, self.size)
        query = qkv[..., :per_group, :].reshape(batch, length, self.heads, self.size).transpose(1, 2)
        key, value = (qkv[..., per_group + i, :].transpose(1, 2) for i in (0, 1))
        attention = functional.scaled_dot_product_attention(
            rotate(query, cos, sin), rotate(key, cos, sin), value, is_causal=True, enable_gqa=per_group > 1
        )
        x = x + self.proj(attention.transpose(1, 2).reshape(batch, length, -1))
        hidden = self.fc1(self.norm2(x))
        if self.is_gated:
            gate, up = hidden.chunk(2, dim=-1)
            return x + self.fc2(self.activation(gate) * up)
        return x + self.fc2(self.activation(hidden))


class PlainGPT(nn.Module):
    """GPT decoder that returns the mean loss."""

    def __init__(self, model: ModelConfig, seq_length: int) -> None:
        super().__init__()
        self.vocab = model.vocab
        self.embedding = nn.Embedding(model.padded_vocab, model.hidden)
        self.layers = nn.ModuleList(PlainLayer(model) for _ in range(model.layers))
        self.norm = PlainNorm(model)
        self.head = nn.Linear(model.hidden, model.padded_vocab, bias=False)
        rotated = int(model.head_size * model.rotary_percent)
        frequencies = model.rotary_base ** (-torch.arange(0, rotated, 2).float() / rotated)
        angles = torch.outer(torch.arange(seq_length).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = self._loss

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a micro-batch; both arguments are (b, s)."""
        x = self.embedding(tokens)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.loss(x, labels)

    def compile_parts(self, backend: str) -> None:
        """Compile each layer, and the head with the loss."""
        for layer in self.layers:
            layer.compile(backend=backend)
        self.loss = torch.compile(self._loss, backend=backend)

    def _loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(x))[..., : self.vocab]  # rows that pad the vocabulary take no part, as in ours
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary embeddings to the first `cos.shape[-1]` dimensions of each head; x is (b, heads, s, d)."""
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1).to(x.dtype)


def copy_from_megatron(model: PlainGPT, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy the weights of a GPT of megatron-core with local layers, by its parameters' names."""
    names = {
        "norm1.": "input_layernorm.",
        "norm2.": "pre_mlp_layernorm.",
        "qkv.": "self_attention.linear_qkv.",
        "proj.": "self_attention.linear_proj.",
        "fc1.": "mlp.linear_fc1.",
        "fc2.": "mlp.linear_fc2.",
    }
    outside = {
        "embedding.": "embedding.word_embeddings.",
        "norm.": "decoder.final_layernorm.",
        "head.": "output_layer.",
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            pieces = name.split(".", 2)
            if pieces[0] == "layers":
                inner = pieces[2].partition(".")
                source = f"decoder.layers.{pieces[1]}.{names[inner[0] + '.']}{inner[2]}"
            else:
                source = outside[pieces[0] + "."] + pieces[1]
            parameter.copy_(weights[source])


def plain_steps(run: RunConfig, batches: list[Any]) -> Callable[[], float]:
    """Return a training step that returns its loss; a CPU traces the model for torch.compile without compiling it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = PlainGPT(run.model, run.seq_length)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=run.model.init_std)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    other = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [
        {"params": decayed, "weight_decay": run.optimizer.weight_decay},
        {"params": other, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=run.schedule.max_lr, betas=run.optimizer.betas, eps=run.optimizer.eps, fused=True
    )
    tensors = [[torch.from_numpy(x).to(device) for x in (batch.tokens, batch.labels)] for batch in batches]
    model.compile_parts("inductor" if device.type == "cuda" else "aot_eager")

    def step() -> float:
        total = torch.zeros((), device=device)
        for tokens, labels in tensors:
            with torch.autocast(device.type, torch.bfloat16, enabled=run.precision.compute == "bf16"):
                loss = model(tokens, labels) / len(tensors)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_grad, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step
