"""The loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from megatron_cpt.backend import StopRequest
from megatron_cpt.errors import EXIT_OK, EXIT_STOPPED, CptError
from megatron_cpt.train.hook import Hook
from megatron_cpt.train.save import save
from megatron_cpt.train.setup import Session
from megatron_cpt.train.step import StepResult, train_step


def train(session: Session, hooks: Sequence[Hook], stop: StopRequest) -> int:
    """Train to the end of the run, to `stop_at_step`, or until a signal asks to stop; a collective call.

    Returns:
        The exit status: 0, or 75 when a signal stopped the run after a checkpoint was saved.
    """
    config, state = session.config, session.state
    for hook in hooks:
        hook.on_start(session)
    if not session.is_resumed:
        _validate(session, hooks)
    stopped = False
    while state.step < session.last_step and not stopped:
        rate = session.plan.schedule.rate(state.step + 1)
        data = session.loader.next_step()
        result = train_step(session.forward, session.optimizer, data, rate, config.optimizer.weight_decay)
        state.advance(config.tokens_per_step, data.counts, data.state)
        session.meter.add(result.loss_by_source, config.tokens_per_step)
        for hook in hooks:
            hook.on_step(session)
        stopped = stop.agreed()
        is_last = state.step == session.last_step
        saves = is_last or stopped or _is_due(state.step, config.checkpoint.every)
        if saves or _is_due(state.step, config.log.every):
            _report(session, hooks, rate, result)  # before saving: a loss that is not a number must not be saved
        if is_last or _is_due(state.step, config.validation.every if config.validation else None):
            _validate(session, hooks)
        if saves:
            _save(session, hooks)
    return EXIT_STOPPED if stopped and state.step < session.last_step else EXIT_OK


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _report(session: Session, hooks: Sequence[Hook], rate: float, result: StepResult) -> None:
    numbers = session.meter.take()
    line: dict[str, Any] = {
        "step": session.state.step,
        "tokens": session.state.tokens,
        "phase": session.plan.phase_of(session.state.step).name,
        "lr": rate,
        "loss": numbers["loss"],
        "grad_norm": result.grad_norm,
        "tokens_per_second": numbers["tokens_per_second"],
        "loss_by_source": numbers["loss_by_source"],
        "samples_by_source": session.state.samples_by_source,
    }
    for hook in hooks:
        hook.on_metrics(session, line)
    if not math.isfinite(line["loss"]):
        raise CptError(
            f"step {line['step']}: the loss is {line['loss']}; the run stops here, its last checkpoint is untouched; "
            "lower schedule.max_lr or look at the data of the last steps"
        )


def _validate(session: Session, hooks: Sequence[Hook]) -> None:
    if session.validator is None:
        return
    started = time.perf_counter()
    losses = session.validator.run(session.forward)
    session.meter.skip_time(time.perf_counter() - started)
    for hook in hooks:
        hook.on_validation(session, {"step": session.state.step, "validation": losses})


def _save(session: Session, hooks: Sequence[Hook]) -> None:
    started = time.perf_counter()
    path = save(session)
    session.meter.skip_time(time.perf_counter() - started)
    for hook in hooks:
        hook.on_checkpoint(session, str(path))
