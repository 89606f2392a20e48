"""Speeds that bound every training step on this GPU: matrix products, copy, attention.

    python -m benchmarks.gpu.ceilings

Inputs are random, because products of zeros run faster. Each figure has several repetitions of many queued calls. A
product of m x k and k x n counts 2 m k n operations; causal attention counts half of all scores; a copy counts the
bytes read and written.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.measured import Report, run_item

TOKENS, HIDDEN, FFN, HEADS, GROUPS, HEAD_SIZE, LENGTH = 8192, 6144, 12_288, 24, 4, 128, 4096
REPETITIONS = 5
WARM_UP_SECONDS = 0.1


def shard_shapes() -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of the linear layers of one of two tensor-parallel ranks of the 15B."""
    qkv = (HEADS + 2 * GROUPS) * HEAD_SIZE
    return {"qkv": (HIDDEN, qkv), "proj": (HEADS * HEAD_SIZE, HIDDEN), "fc1": (HIDDEN, FFN), "fc2": (FFN, HIDDEN)}


def measure(report: Report) -> None:
    """Measure every ceiling; on a CPU at a small fraction of the sizes."""
    import torch

    divisor = 64 if report.is_rehearsal else 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = Ceilings(report, device, divisor)
    ceilings.products()
    ceilings.fp32_output()
    ceilings.copy()
    ceilings.attention()


class Ceilings:
    """Measurements on one device, with sizes divided by `divisor`."""

    def __init__(self, report: Report, device: Any, divisor: int) -> None:
        self.report, self.device, self.divisor = report, device, divisor
        self.repetitions = REPETITIONS if divisor == 1 else 2

    def products(self) -> None:
        """Measure products in bf16 and FP8: 8192^3, and the linear layers of the shard, forward and backward."""
        size = 8192 // self.divisor
        self.report.repeated("bf16_8192_tflops", self._bf16(size, size, size))
        rates: dict[str, dict[str, float]] = {}
        seconds = {"bf16": 0.0, "fp8": 0.0}
        operations = 0.0
        tokens = TOKENS // self.divisor
        for name, (k, n) in shard_shapes().items():
            k, n = k // self.divisor, n // self.divisor
            shapes = {"forward": (tokens, k, n), "input": (tokens, n, k), "weight": (n, tokens, k)}
            for part, shape in shapes.items():
                flops = 2.0 * shape[0] * shape[1] * shape[2]
                row = {"bf16": statistics.median(self._bf16(*shape)), "fp8": self._fp8(*shape)}
                rates[f"{name} {part} {'x'.join(map(str, shape))}"] = row
                operations += flops
                for kind, rate in row.items():
                    seconds[kind] += flops / rate / 1e12 if rate else float("nan")
            self.report.note(shard_tflops=rates)
        for kind, total in seconds.items():
            self.report.note(**{f"{kind}_shard_tflops": operations / total / 1e12 if total == total else None})

    def _bf16(self, m: int, k: int, n: int) -> list[float]:
        import torch

        a, b = (torch.randn(*shape, device=self.device).bfloat16() for shape in ((m, k), (n, k)))
        return [2 * m * k * n / seconds / 1e12 for seconds in self._seconds(lambda: a @ b.T)]

    def _fp8(self, m: int, k: int, n: int) -> float:
        """Return the median TFLOP/s of a tensorwise product; 0 where torch has none for the device."""
        import torch

        a, b = (torch.randn(*shape, device=self.device).to(torch.float8_e4m3fn) for shape in ((m, k), (n, k)))
        one = torch.ones((), device=self.device)
        try:
            seconds = self._seconds(
                lambda: torch._scaled_mm(
                    a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
                )
            )
        except (RuntimeError, NotImplementedError) as error:
            self.report.note(fp8_error=first_line(error))
            return 0.0
        return statistics.median(2 * m * k * n / each / 1e12 for each in seconds)

    def fp32_output(self) -> None:
        """Compare adding a weight gradient into fp32 inside the product with a product and an addition."""
        import torch

        m, k, n = HIDDEN // self.divisor, TOKENS // self.divisor, FFN // self.divisor
        a, b = (torch.randn(*shape, device=self.device).bfloat16() for shape in ((m, k), (k, n)))
        total = torch.zeros(m, n, device=self.device)

        def separate() -> Any:
            return total.add_(a @ b)

        def fused() -> Any:
            return torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)

        product = statistics.median(self._seconds(lambda: a @ b))
        self.report.note(separate_over_bf16=product / statistics.median(self._seconds(separate)))
        total.zero_()
        try:
            fused()
        except (RuntimeError, NotImplementedError) as error:
            self.report.note(addmm_fp32_error=first_line(error))
            return
        exact = a.double() @ b.double()
        self.report.note(addmm_fp32_relative_error=((total.double() - exact).norm() / exact.norm()).item())
        self.report.note(addmm_fp32_over_bf16=product / statistics.median(self._seconds(fused)))

    def copy(self) -> None:
        """Measure a copy within the device's memory."""
        import torch

        source = torch.randn((1 << 29) // self.divisor, device=self.device)
        target = torch.empty_like(source)
        rates = [2 * source.nbytes / seconds / 1e12 for seconds in self._seconds(lambda: target.copy_(source))]
        self.report.repeated("copy_tb_per_second", rates)

    def attention(self) -> None:
        """Measure causal attention with grouped queries, forward and with backward, by kernel."""
        heads, groups = (HEADS, GROUPS) if self.divisor == 1 else (6, 1)
        shapes = [(2, count, LENGTH // self.divisor, HEAD_SIZE) for count in (heads, groups, groups)]
        forward_flops = 2.0 * 2 * shapes[0][0] * heads * shapes[0][2] ** 2 * HEAD_SIZE / 2
        rows: dict[str, Any] = {}
        for name, (attend, layout) in self._attention_kernels(heads, groups).items():
            dims = shapes if layout == "bhsd" else [(b, s, h, d) for b, h, s, d in shapes]
            rows[name] = self._attention_rates(attend, dims, forward_flops)
            self.report.note(
                attention_tflops=rows, attention_best_tflops=max(row.get("forward", 0.0) for row in rows.values())
            )

    def _attention_rates(self, attend: Callable[..., Any], shapes: Sequence[Any], flops: float) -> dict[str, Any]:
        """Return the TFLOP/s of one kernel, or why it does not run."""
        import torch

        inputs = [torch.randn(*shape, device=self.device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        try:
            gradient = torch.ones_like(attend(*inputs))
            forward = statistics.median(self._seconds(lambda: attend(*inputs)))
            both = statistics.median(self._seconds(lambda: attend(*inputs).backward(gradient)))
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            return {"error": first_line(error)}
        # A backward pass has five products of the size of the two of a forward pass.
        return {"forward": flops / forward / 1e12, "both": 3.5 * flops / both / 1e12}

    def _attention_kernels(self, heads: int, groups: int) -> dict[str, tuple[Callable[..., Any], str]]:
        """Return functions of query, key and value by kernel, with the layout of their inputs."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        def with_sdpa(backend: Any, *, expand: bool = False) -> Callable[..., Any]:
            def attend(query: Any, key: Any, value: Any) -> Any:
                if expand:
                    key, value = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=not expand)

            return attend

        kernels: dict[str, tuple[Callable[..., Any], str]] = {
            "SDPA flash": (with_sdpa(SDPBackend.FLASH_ATTENTION), "bhsd"),
            "SDPA cuDNN": (with_sdpa(SDPBackend.CUDNN_ATTENTION), "bhsd"),
            "SDPA cuDNN, expanded groups": (with_sdpa(SDPBackend.CUDNN_ATTENTION, expand=True), "bhsd"),
        }
        from megatron_cpt.model.capabilities import read_machine

        machine = read_machine()
        if machine.transformer_engine is None:
            self.report.note(attention_transformer_engine=f"not measured: {machine}")
            return kernels
        from transformer_engine.pytorch import DotProductAttention

        attention = DotProductAttention(
            heads, HEAD_SIZE, num_gqa_groups=groups, attn_mask_type="causal", qkv_format="bshd", attention_dropout=0.0
        )
        kernels["Transformer Engine"] = (attention, "bshd")
        return kernels

    def _seconds(self, function: Callable[[], Any]) -> list[float]:
        """Return the seconds per call of several repetitions of queued calls."""
        import torch

        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        function()
        wait()
        end = time.perf_counter() + (WARM_UP_SECONDS if self.divisor == 1 else 0.0)
        while time.perf_counter() < end:  # an idle GPU has a low clock
            function()
            wait()
        begin = time.perf_counter()
        function()
        wait()
        calls = 1 if self.divisor > 1 else max(1, min(200, round(0.02 / (time.perf_counter() - begin))))
        seconds = []
        for _ in range(self.repetitions):
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            wait()
            seconds.append((time.perf_counter() - begin) / calls)
        return seconds


def first_line(error: Exception) -> str:
    """Return the start of a message, or the name of an error without one."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


IMPORTS = ("torch.nn.attention", "megatron_cpt.model.capabilities")

if __name__ == "__main__":
    sys.exit(run_item(measure, imports=IMPORTS))
