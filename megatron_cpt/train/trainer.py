"""The loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.backend import StopRequest
from megatron_cpt.config import format_duration
from megatron_cpt.errors import EXIT_OK, EXIT_STOPPED, CptError
from megatron_cpt.model.kernel_options import gather_weights
from megatron_cpt.optim.update import Update
from megatron_cpt.train.hook import Hook
from megatron_cpt.train.metrics import mean_losses
from megatron_cpt.train.resilience.anomalies import Anomaly, describe, find_anomaly, note_loss, reason_to_stop
from megatron_cpt.train.resilience.replicas import check_replicas
from megatron_cpt.train.resilience.wall_time import WallTime
from megatron_cpt.train.resilience.watchdog import Progress
from megatron_cpt.train.save import save
from megatron_cpt.train.setup import Session
from megatron_cpt.train.step import StepResult, train_step


def train(
    session: Session,
    hooks: Sequence[Hook],
    stop: StopRequest,
    *,
    progress: Progress | None = None,
    wall_time: WallTime | None = None,
) -> int:
    """Train to the end of the run, to `stop_at_step`, to the limit of time, or until a signal; a collective call.

    Args:
        session: what to train.
        hooks: called at fixed points.
        stop: what the signals of this process asked for.
        progress: told what this rank is doing.
        wall_time: how long this process may run; left out: by `resilience.wall_time`.

    Returns:
        The exit status: 0, or 75 when the run was stopped after a checkpoint was saved.

    Raises:
        CptError: too many bad steps in a row, or replicas that differ; nothing was saved.
    """
    config, state = session.config, session.state
    progress, wall_time = progress or Progress(), wall_time or WallTime(config.resilience.wall_time)
    update = Update(session.optimizer, config.optimizer.weight_decay)
    for hook in hooks:
        hook.on_start(session)
    if not session.is_resumed:
        _validate(session, hooks, progress)
    reason, is_save_owed = "", False
    while state.step < session.last_step and not reason:
        progress.note(f"step {state.step + 1}")
        wall_time.begin_step()
        is_save_owed |= _is_due(state.step + 1, config.checkpoint.every)
        requests = partial(_requests, stop, wall_time, is_save_owed)
        result = _step(session, hooks, update, requests)
        if result.anomaly is not None:
            _report_anomaly(session, hooks, result, result.anomaly, wall_time)
        is_last = state.step == session.last_step
        reason = "" if is_last else _reason(result, stop, config.resilience.wall_time)
        is_end = is_last or reason != ""
        # weights that have only given bad steps since are not what a run should go on from: wait for a sound step
        saves = is_end or (is_save_owed and state.skipped_in_a_row == 0)
        hash_every = config.resilience.parameter_hash_every
        if hash_every is not None and (saves or _is_due(state.step, hash_every)):  # nothing unsound into a checkpoint
            gather_weights(session.model.chunks)
            check_replicas(session.model.chunks, state.step)
        if saves or _is_due(state.step, config.log.every):
            _report(session, hooks, result)
        if is_last or _is_due(state.step, config.validation.every if config.validation else None):
            _validate(session, hooks, progress)
        if saves:
            progress.note(f"saving step {state.step}")
            _save(session, hooks, wall_time, wait=is_end)
            is_save_owed = False
        else:
            _announce(session, hooks, wall_time, session.saver.poll())  # one that is written in the background
        wall_time.end_step()
    for hook in hooks:
        hook.on_stop(session, reason)
    return EXIT_STOPPED if reason else EXIT_OK


def _step(
    session: Session, hooks: Sequence[Hook], update: Update, requests: Callable[[], Sequence[bool]]
) -> StepResult:
    """Train on the next global batch and count it."""
    state = session.state
    rate = session.plan.schedule.rate(state.step + 1)
    data = session.loader.next_step()
    result = train_step(
        session.forward,
        update,
        data,
        rate,
        counts=session.meter.counts,
        requests=requests,
        judge=lambda *numbers: _judge(session, *numbers),
        before_update=session.saver.wait_for_copy,
    )
    state.advance(data.num_tokens, data.counts, data.state)
    session.meter.add(result.loss_by_source, data.num_tokens)
    for hook in hooks:
        hook.on_step(session)
    return result


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _requests(stop: StopRequest, wall_time: WallTime, is_save_due: bool) -> tuple[bool, bool]:
    """Why this rank wants to end the run: a signal, or the time."""
    return stop.received is not None, wall_time.is_last_step(is_save_due=is_save_due)


def _reason(result: StepResult, stop: StopRequest, limit: float | None) -> str:
    """Why the run ends before its end; empty: it does not."""
    is_signaled, is_out_of_time = result.requests
    if is_signaled:
        return f"stopped by {stop.received.name if stop.received else 'a signal to another rank'}"
    if is_out_of_time:
        limit_text = format_duration(limit) if limit is not None else "the limit of time"
        return f"another step would not fit into resilience.wall_time: {limit_text}"
    return ""


def _judge(session: Session, losses: torch.Tensor, grad_norm: float, is_finite: bool) -> Anomaly | None:
    """Hold a step against those before it, before its update is applied."""
    state, spike = session.state, session.config.resilience.spike
    if state.step and session.plan.phase_of(state.step).name != session.plan.phase_of(state.step + 1).name:
        state.recent_losses = []  # another blend has losses of another height
    loss = mean_losses(losses, session.meter.names)[0]
    anomaly = find_anomaly(loss, grad_norm, is_finite, state.recent_losses, spike)
    note_loss(state, loss, anomaly, spike)
    return anomaly


def _report_anomaly(
    session: Session, hooks: Sequence[Hook], result: StepResult, anomaly: Anomaly, wall_time: WallTime
) -> None:
    line = describe(anomaly, session.state, result.loss_by_source, session.meter.names, result.grad_norm, session.model)
    for hook in hooks:
        hook.on_anomaly(session, line)
    reason = reason_to_stop(anomaly, session.state, session.config.resilience)
    if reason is not None:
        _announce(session, hooks, wall_time, session.saver.finish())  # what is being written is sound
        raise CptError(reason)


def _report(session: Session, hooks: Sequence[Hook], result: StepResult) -> None:
    numbers = session.meter.take()
    shape = session.plan.segment_of(session.state.step)
    line: dict[str, Any] = {
        "step": session.state.step,
        "tokens": session.state.tokens,
        "global_batch": shape.global_batch,
        "seq_length": shape.seq_length,
        "phase": session.plan.phase_of(session.state.step).name,
        "lr": result.rate,
        "loss": numbers["loss"],
        "grad_norm": result.grad_norm,
        "tokens_per_second": numbers["tokens_per_second"],
        "loss_by_source": numbers["loss_by_source"],
        "samples_by_source": session.state.samples_by_source,
        "skipped_updates": session.state.skipped,
    }
    for hook in hooks:
        hook.on_metrics(session, line)


def _validate(session: Session, hooks: Sequence[Hook], progress: Progress) -> None:
    if session.validator is None:
        return
    after = f"validation after step {session.state.step}"
    started = time.perf_counter()
    losses = session.validator.run(session.forward, lambda source: progress.note(f"{after}: {source}"))
    session.meter.skip_time(time.perf_counter() - started)
    for hook in hooks:
        hook.on_validation(session, {"step": session.state.step, "validation": losses})


def _save(session: Session, hooks: Sequence[Hook], wall_time: WallTime, *, wait: bool) -> None:
    started = time.perf_counter()
    _announce(session, hooks, wall_time, session.saver.finish())  # the save before this one
    wall_time.begin_save()
    path = save(session)
    if wait and path is None:
        path = session.saver.finish()
    wall_time.end_stall()
    session.meter.skip_time(time.perf_counter() - started)
    _announce(session, hooks, wall_time, path)


def _announce(session: Session, hooks: Sequence[Hook], wall_time: WallTime, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        wall_time.end_save()
        for hook in hooks:
            hook.on_checkpoint(session, str(checkpoint))
