"""Comparison of our model's logits and losses with transformers' at any TP x PP; run by all ranks of a job.

The checkpoint is loaded into megatron-core's GPT as in training, and runs through its pipeline schedule. Rank 0 then
runs the Hugging Face model and compares. Both compute in fp32.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn import functional

from megatron_cpt.backend import launched_rank, launched_world_size
from megatron_cpt.checkpoint.loading.inference_model import inference_run, load_inference_model, open_checkpoint
from megatron_cpt.checkpoint.record import SavedRun, WeightSet
from megatron_cpt.config import ModelConfig
from megatron_cpt.errors import UserError

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at one hundred degrees Celsius because",
    "1, 1, 2, 3, 5, 8, 13, 21,",
)
_RANDOM_LENGTHS = (5, 17, 32)

T = TypeVar("T")


@dataclass(frozen=True)
class LogitsReport:
    """Differences between the logits of both models.

    Attributes:
        layout: layout of our model, such as `TP 2 x PP 2`.
        tokens: origin of the prompts' ids: `tokenizer` or `random ids`.
        max_difference: largest absolute difference of any logit.
        max_loss_difference: largest absolute difference of a prompt's mean loss per token; ours over all columns of the
            output layer, as training computes it, so padding that takes part in the softmax shows.
        mean_kl: Kullback-Leibler divergence of our distribution from transformers', in nats, mean over positions.
        top1_agreement: share of positions where both models rank the same token first.
    """

    layout: str
    num_prompts: int
    num_tokens: int
    tokens: str
    max_difference: float
    max_loss_difference: float
    mean_kl: float
    top1_agreement: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)


def compare_logits(
    hf: str | Path,
    checkpoint: str | Path,
    prompts: Sequence[str] | None = None,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    weights: WeightSet = "raw",
) -> LogitsReport | None:
    """Compare the logits of a checkpoint and a Hugging Face folder; every rank of the job calls this function.

    Args:
        prompts: texts. None: `PROMPTS`, or random ids if the folder has no tokenizer.
        weights: `ema`: the moving average of the checkpoint's weights.
        tensor, pipeline: tensor- and pipeline-parallel sizes; their product is the number of processes.

    Returns:
        The report on rank 0, None on the other ranks.

    Raises:
        UserError: the number of processes is another one, or the folder has no tokenizer to encode `prompts`.
    """
    if launched_world_size() != tensor * pipeline:
        raise UserError(
            f"--logits: TP {tensor} x PP {pipeline} takes {tensor * pipeline} processes, but {launched_world_size()} "
            f"started; run torchrun --nproc-per-node {tensor * pipeline} -m megatron_cpt convert verify ..."
        )
    saved = open_checkpoint(checkpoint)
    model = ModelConfig.model_validate(saved.run["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of transformers and torch do not concern a reader of the report
        ids, origin = _prompt_ids(Path(hf), model, prompts)
        ours = map_logits(saved, ids, lambda logits, _: logits, tensor=tensor, pipeline=pipeline, weights=weights)
        if launched_rank() != 0:
            return None
        return _compare(ours, _hf_logits(Path(hf), ids), ids, f"TP {tensor} x PP {pipeline}", origin)


def _prompt_ids(hf: Path, model: ModelConfig, prompts: Sequence[str] | None) -> tuple[list[torch.Tensor], str]:
    has_tokenizer = any((hf / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    if has_tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True)
        texts = prompts or PROMPTS
        return [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts], "tokenizer"
    if prompts:
        raise UserError(f"--prompts: {hf} has no tokenizer to encode them; omit --prompts to compare on random ids")
    return random_prompts(model), "random ids"


def random_prompts(model: ModelConfig) -> list[torch.Tensor]:
    """Return prompts of random ids, equal in every call."""
    generator = torch.Generator().manual_seed(1234)
    return [torch.randint(0, model.vocab, (length,), generator=generator) for length in _RANDOM_LENGTHS]


def map_logits(
    saved: SavedRun,
    prompts: Sequence[torch.Tensor],
    function: Callable[[torch.Tensor, torch.Tensor], T],
    *,
    tensor: int = 1,
    pipeline: int = 1,
    weights: WeightSet = "raw",
) -> list[T]:
    """Load a checkpoint in fp32 and return `function(logits, ids)` per prompt, on every rank of the job.

    Args:
        prompts: ids of each text.
        function: called on the last pipeline stage with (length, padded vocab) float32 logits; its result is picklable.
        tensor, pipeline: tensor- and pipeline-parallel sizes; their product is the number of processes.
        weights: `ema`: the moving average of the checkpoint's weights.
    """
    layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    run = inference_run(saved, [*layout, "precision={compute: fp32}"])
    with load_inference_model(saved, run, weights) as loaded:
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        device = loaded.ranks.device

        def forward(ids: torch.Tensor, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            tokens = ids[None].to(device)
            positions = torch.arange(len(ids), device=device)[None]
            return chunk(tokens, positions, None), functools.partial(collect, ids)

        def collect(ids: torch.Tensor, logits: torch.Tensor, **_: Any) -> T:
            gathered: torch.Tensor = gather_from_tensor_model_parallel_region(logits)
            return function(gathered[0].float().cpu(), ids)

        results: list[T] = []
        for ids in prompts:
            with torch.no_grad():
                found = get_forward_backward_func()(
                    forward_step_func=lambda iterator, chunk: forward(next(iterator), chunk),
                    data_iterator=iter([ids]),
                    model=list(loaded.model.chunks),
                    num_microbatches=1,
                    seq_length=len(ids),
                    micro_batch_size=1,
                    forward_only=True,
                    collect_non_loss_data=True,
                )
            shared: list[Any] = [found[0] if found else None]
            dist.broadcast_object_list(shared, src=dist.get_world_size() - 1)  # the last rank is on the last stage
            results.append(shared[0])
        return results


def _hf_logits(hf: Path, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    with torch.no_grad():
        return [model(ids[None]).logits[0].float() for ids in prompts]


def _compare(
    ours: Sequence[torch.Tensor],
    hf: Sequence[torch.Tensor],
    prompts: Sequence[torch.Tensor],
    layout: str,
    origin: str,
) -> LogitsReport:
    differences, loss_differences, divergence, agreeing, num_tokens = [], [], 0.0, 0, 0
    for our_logits, hf_logits, ids in zip(ours, hf, prompts, strict=True):
        our_loss, hf_loss = (
            functional.cross_entropy(logits[:-1].double(), ids[1:]) for logits in (our_logits, hf_logits)
        )
        loss_differences.append((our_loss - hf_loss).abs())
        our_logits = our_logits[:, : hf_logits.shape[1]]  # without padding
        differences.append((our_logits - hf_logits).abs().max())
        log_ours, log_hf = (functional.log_softmax(logits.double(), -1) for logits in (our_logits, hf_logits))
        divergence += float(functional.kl_div(log_ours, log_hf, reduction="sum", log_target=True))
        agreeing += int((our_logits.argmax(-1) == hf_logits.argmax(-1)).sum())
        num_tokens += len(our_logits)
    return LogitsReport(
        layout=layout,
        num_prompts=len(ours),
        num_tokens=num_tokens,
        tokens=origin,
        max_difference=float(torch.stack(differences).max()),  # unlike Python's max, it keeps a NaN
        max_loss_difference=float(torch.stack(loss_differences).max()),
        mean_kl=max(divergence / num_tokens, 0.0),
        top1_agreement=agreeing / num_tokens,
    )
