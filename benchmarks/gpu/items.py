"""Table of the measurements of tools/dev/gpu_measure.py and the predictions that were written before any of them ran.

Imports nothing outside the standard library, because the runner needs no installed package.

Convention of FLOPs: forward and backward passes without recomputation, as `planning/cost/parameters.py` counts them;
`full` counts attention as if it were not causal, as Megatron-LM does. MFU (model FLOPs utilization) is `full` over the
datasheet's dense bf16 peak, also for FP8, so that the formats can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONVENTION = __doc__.partition("Convention of FLOPs: ")[2].strip()


@dataclass(frozen=True, kw_only=True)
class Item:
    """One measurement, in processes of its own.

    Attributes:
        key: number and letter in the table; `--items 3` selects 3a, 3b and so on.
        command: arguments of Python.
        expected: seconds on an H200, where a fresh process imports for about 15. An item that expects more than what
            is left of the budget is skipped.
        limit: seconds after which its processes are killed.
        is_first: it prepares what the other items import, so none of them starts before its end.
    """

    key: str
    title: str
    command: tuple[str, ...]
    expected: float
    limit: float
    is_first: bool = False


def _item(
    key: str, title: str, module: str, *arguments: str, seconds: tuple[float, float], first: bool = False
) -> Item:
    command = ("-m", f"benchmarks.gpu.{module}", *arguments)
    return Item(key=key, title=title, command=command, expected=seconds[0], limit=seconds[1], is_first=first)


def _stack(key: str, which: str, precision: str) -> Item:
    title = f"15B layers, shard of TP2: {which}, {precision}"
    return _item(key, title, "stack", f"--which={which}", f"--precision={precision}", seconds=(36, 60))


# In the order of their worth: correctness, the speed of a step against its rivals, then details. With a budget of 540
# seconds the first call ends near 3d, and `--resume` measures the rest.
ITEMS = (
    _item("0", "unpack the bundle, probe the machine", "probe", seconds=(30, 80), first=True),
    _item("6a", "tests of layers: tests/gpu/test_layers.py", "gpu_tests", "--file=test_layers", seconds=(60, 120)),
    _item("6b", "tests of runs: tests/gpu/test_training.py", "gpu_tests", "--file=test_training", seconds=(90, 150)),
    _item("7", "deterministic resume", "resume", seconds=(60, 100)),
    _stack("3a", "ours", "bf16"),
    _stack("3b", "bare", "bf16"),
    _item("4", "`train` of a 1.1B, 40 steps, with saves", "train_1b", seconds=(110, 160)),
    _item("1", "ceilings: matrix products, copy, attention", "ceilings", seconds=(22, 45)),
    _stack("3c", "ours", "tensorwise"),
    _stack("3d", "bare", "tensorwise"),
    _item("2", "losses of 20 steps: CPU, GPU, Transformer Engine, bf16", "losses", seconds=(80, 120)),
    _item("5a", "rival of 4: bare megatron-core loop", "rivals", "--which=bare", seconds=(36, 70)),
    _item("5b", "rival of 4: plain PyTorch, torch.compile", "rivals", "--which=plain", seconds=(32, 70)),
    _stack("3g", "local", "bf16"),
    _stack("3e", "ours", "delayed"),
    _stack("3f", "bare", "delayed"),
    _stack("3h", "local", "tensorwise"),
    _item("8", "speed knobs, one at a time", "knobs", seconds=(90, 160)),
)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Bound of a figure, written before the measurement.

    Attributes:
        text: the statement.
        figure: "ITEM.NAME"; a repeated figure counts with its median.
        over: figure that `figure` is divided by.
        at_least, at_most: the bounds, inclusive.
        device: part of the device name for which the prediction was made; "" is any device.
    """

    text: str
    figure: str
    over: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    device: str = ""

    @property
    def item(self) -> str:
        """Key of the item that measures the figure."""
        return self.figure.partition(".")[0]

    @property
    def bounds(self) -> str:
        """The bounds as text, such as ">= 700 on H100" or "0.9 to 1.1"."""
        device = f" on {self.device}" if self.device else ""
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g}{device}"
        return f">= {self.at_least:g}{device}" if self.at_least is not None else f"<= {self.at_most:g}{device}"

    def judge(self, figures: Mapping[str, Mapping[str, Any]], device: str) -> dict[str, Any]:
        """Compare the figure with its bounds.

        Args:
            figures: figures by name, by key of the item.
            device: name of the device that was measured.

        Returns:
            The prediction, the value, and a verdict: met, missed or not measured.
        """
        value = _value(figures, self.figure)
        divisor = 1.0 if self.over is None else _value(figures, self.over)
        if value is None or not divisor or self.device.upper() not in device.upper():
            value, verdict = None, "not measured"
        else:
            value /= divisor
            is_met = (self.at_least is None or value >= self.at_least) and (
                self.at_most is None or value <= self.at_most
            )
            verdict = "met" if is_met else "missed"
        return {"text": self.text, "figure": self.figure, "bounds": self.bounds, "value": value, "verdict": verdict}


def _value(figures: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """Return a figure as a number; the median of a repeated one; None if it is absent or no number."""
    key, _, figure = name.partition(".")
    value = figures.get(key, {}).get(figure)
    if isinstance(value, Mapping):
        value = value.get("median")
    return float(value) if isinstance(value, int | float) else None


def _least(figure: str, bound: float, text: str, *, over: str | None = None, device: str = "") -> Prediction:
    return Prediction(text=text, figure=figure, over=over, at_least=bound, device=device)


def _most(figure: str, bound: float, text: str, *, over: str | None = None) -> Prediction:
    return Prediction(text=text, figure=figure, over=over, at_most=bound)


def _near(figure: str, least: float, most: float, text: str) -> Prediction:
    return Prediction(text=text, figure=figure, at_least=least, at_most=most)


PREDICTIONS = (
    _least("1.bf16_8192_tflops", 700, "bf16 8192^3, TFLOP/s", device="H100"),
    _least("1.bf16_8192_tflops", 700, "bf16 8192^3, TFLOP/s", device="H200"),
    _least("1.fp8_shard_tflops", 1.5, "FP8 over bf16 at the shard's shapes", over="1.bf16_shard_tflops"),
    _least("1.copy_tb_per_second", 2.7, "copy, TB/s read and written", device="H100"),
    _least("1.copy_tb_per_second", 3.9, "copy, TB/s read and written", device="H200"),
    _least("1.attention_best_tflops", 400, "causal attention forward, TFLOP/s of the best kernel"),
    _least("1.addmm_fp32_over_bf16", 0.8, "addmm into fp32, share of the bf16 product's speed"),
    _most("2.gpu_over_cpu", 2e-3, "losses in fp32: GPU against CPU, largest relative difference"),
    _most("2.te_over_local", 2e-3, "losses in fp32: Transformer Engine against local layers"),
    _most("2.bf16_over_fp32", 1e-2, "losses in bf16 against fp32, local layers"),
    _most("2.te_over_local_bf16", 1e-2, "losses in bf16: Transformer Engine against local layers"),
    _most("3a.step_seconds", 1.03, "15B layers, bf16: our step over the bare step", over="3b.step_seconds"),
    _most("3c.step_seconds", 1.03, "15B layers, tensorwise: our step over the bare step", over="3d.step_seconds"),
    _most("3e.step_seconds", 1.03, "15B layers, delayed: our step over the bare step", over="3f.step_seconds"),
    _least("3a.mfu", 0.5, "15B layers, bf16: MFU"),
    _least("3a.tflops", 0.7, "15B layers, bf16: share of the bf16 products' speed", over="1.bf16_shard_tflops"),
    _least("3a.step_seconds", 1.2, "15B layers: tensorwise FP8 against bf16, speed-up", over="3c.step_seconds"),
    _least("3a.gpu_busy_share", 0.97, "15B layers, bf16: share of a step in which the GPU is busy"),
    _most("3a.host_synchronizations_per_step", 2, "15B layers, bf16: host synchronizations per step"),
    _most(
        "3g.step_seconds", 1.25, "15B layers: step of local layers over Transformer Engine's", over="3a.step_seconds"
    ),
    _least("3g.step_seconds", 1.1, "15B layers, local: tensorwise FP8 by torch, speed-up", over="3h.step_seconds"),
    _near("3a.step_over_adviser", 0.8, 1.25, "15B layers: measured step over the adviser's"),
    _least("4.mfu", 0.45, "1.1B train: MFU"),
    _near("4.memory_over_plan", 0.9, 1.1, "1.1B train: peak memory over the plan"),
    _near("4.step_over_adviser", 0.8, 1.25, "1.1B train: measured step over the adviser's"),
    _most(
        "4.async_stall_seconds",
        0.05,
        "1.1B train: stall of an asynchronous over a synchronous save",
        over="4.sync_stall_seconds",
    ),
    _most("4.data_wait_share", 0.01, "1.1B train: share of a step that waits for data"),
    _most("4.step_seconds", 1.03, "1.1B: our step over the bare step", over="5a.step_seconds"),
    _most("4.step_seconds", 1.0, "1.1B: our step over plain PyTorch with torch.compile", over="5b.step_seconds"),
    _most("6a.failed", 0, "failed tests of tests/gpu/test_layers.py"),
    _most("6a.seconds", 60, "seconds of tests/gpu/test_layers.py"),
    _most("6b.failed", 0, "failed tests of tests/gpu/test_training.py"),
    _most("6b.seconds", 90, "seconds of tests/gpu/test_training.py"),
    _most("7.different_steps", 0, "steps of the resumed run that differ in loss or gradient norm"),
    _least("8.best_over_default", 0.99, "fastest knob set over the default"),
)
