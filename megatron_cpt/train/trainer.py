"""The trainer: opens a run, trains it, and closes everything again.

megatron-core reads `torch.cuda` when it is imported, and on a machine without a GPU `backend/cpu.py` must replace parts
of it first. So this module imports neither megatron-core nor `train/setup.py` before `Trainer.__enter__`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from megatron_cpt.backend import (
    StopRequest,
    kernel_settings,
    launched_rank,
    launched_world_size,
    own_process,
    process_groups,
)
from megatron_cpt.backend.collectives import on_main
from megatron_cpt.checkpoint.preflight import check_allowed_names
from megatron_cpt.config import RunConfig, format_duration
from megatron_cpt.errors import EXIT_OK, EXIT_STOPPED, CptError
from megatron_cpt.hooks import Hook, HookList, build_hooks
from megatron_cpt.prepare import PreparedRun, prepare_config
from megatron_cpt.train.garbage import COLLECT_EVERY, manual_collection
from megatron_cpt.train.metrics import mean_objective, metrics_line
from megatron_cpt.train.resilience.anomalies import Anomaly, describe, find_anomaly, note_loss, reason_to_stop
from megatron_cpt.train.resilience.replicas import check_replicas
from megatron_cpt.train.resilience.run_lock import run_lock
from megatron_cpt.train.resilience.wall_time import WallTime
from megatron_cpt.train.resilience.watchdog import Progress, Watchdog, guard
from megatron_cpt.train.run_files import compare_eod_ids, note_published, read_tokenizer, record, write_run_files
from megatron_cpt.train.step import StepResult, train_step

if TYPE_CHECKING:
    from megatron_cpt.train.evaluation import Evaluator
    from megatron_cpt.train.setup import Session

# Seconds after which torch.distributed aborts a collective: 20 days, because the watchdog ends what hangs. torch counts
# the time in which a job is suspended, and in places it counts milliseconds in 32 bits (24 days).
logger = logging.getLogger(__name__)

_COLLECTIVE_TIMEOUT = 20 * 86400.0


@dataclass(frozen=True)
class RunResult:
    """Outcome of `Trainer.fit`.

    Attributes:
        status: exit status of the command: 0 if the run or its `stop_at_step` is reached, 75 if it stopped early.
        step: steps done since the start of the run.
        checkpoint: the newest checkpoint of the run; None if it has none. It is older than `step` if the run ended
            without a save (`checkpoint.at_end: false`).
        reason: why it stopped early, for example "stopped by SIGTERM"; empty with status 0.
    """

    status: int
    step: int
    checkpoint: Path | None
    reason: str


class Trainer:
    """Trainer of one run, alone or on every rank that torchrun started.

    Training resumes from the newest valid checkpoint of the run's output. Errors are `CptError`s: a `UserError` for a
    mistake of the user, a `RefusedError` for a checkpoint or dataset that must not be used.

    Example:
        run = cpt.load_run("run.yaml", ["stop_at_step=100"])
        with cpt.Trainer(run, hooks=[MyHook()]) as trainer:
            result = trainer.fit()

    Args:
        run: a run.yaml that `load_run` read, or a prepared run.
        hooks: called after the hooks that the run itself asks for.
        allow: changes since the checkpoint that are intended; see `megatron-cpt train --allow`.
        restart: start from scratch where a run has lost its checkpoints; see `megatron-cpt train --restart`.
        console: whether to print progress to stderr.
        owns_process: whether to handle SIGTERM, SIGUSR1 and SIGINT, print log messages to stderr and silence warnings.
            The command does so; without it the trainer changes neither signal handlers, loggers nor warnings filters.

    Attributes:
        session: the run, from `__enter__` on.
        hooks: all hooks as one, from `__enter__` on.
        wall_time: limit on the run time of this process (`resilience.wall_time`).
    """

    session: Session
    hooks: Hook

    def __init__(
        self,
        run: RunConfig | PreparedRun,
        *,
        hooks: Sequence[Hook] = (),
        allow: Collection[str] = (),
        restart: bool = False,
        console: bool = False,
        owns_process: bool = False,
    ) -> None:
        if isinstance(run, RunConfig):
            run = prepare_config(run, need_files=True, num_gpus=launched_world_size())
        if not isinstance(run, PreparedRun):
            raise TypeError(f"run: {run!r}; give a RunConfig, as load_run returns")
        if isinstance(hooks, Hook) or not all(isinstance(hook, Hook) for hook in hooks):
            raise TypeError(f"hooks: {hooks!r}; give a list of instances of classes derived from Hook")
        allow = [allow] if isinstance(allow, str) else allow
        check_allowed_names(allow)
        self._prepared, self._allow, self._restart = run, allow, restart
        self._own_hooks, self._has_console, self._owns_process = hooks, console, owns_process
        self._stop, self._progress = StopRequest(), Progress()
        self._newest: Path | None = None
        self._evaluator: Evaluator | None = None
        self._resources = contextlib.ExitStack()
        self.wall_time = WallTime(run.config.resilience.wall_time)

    def __enter__(self) -> Trainer:
        """Open process groups, model, data and files.

        Raises:
            UserError: a mistake of the user; nothing was written.
            RefusedError: a checkpoint or dataset must not be used.
            LostPeerError: another rank is gone.
        """
        config = self._prepared.config
        eod_id, tokenizer_fingerprint = read_tokenizer(config)
        limits, stacks = config.resilience, Path(config.output) / "stacks"
        with contextlib.ExitStack() as opened:
            if self._owns_process:
                self._stop = opened.enter_context(own_process())
            watchdog = Watchdog(self._progress, limits.hang_timeout, rank=launched_rank(), folder=stacks)
            opened.enter_context(watchdog)
            opened.enter_context(kernel_settings(deterministic=config.deterministic))  # before CUDA and NCCL start
            ranks = opened.enter_context(process_groups(config.parallel, timeout=_COLLECTIVE_TIMEOUT))
            opened.enter_context(guard(limits, ranks, watchdog, self._progress))
            # Before anything is written, because a hook may refuse to run.
            self.hooks = HookList([*build_hooks(config, console=self._has_console), *self._own_hooks])
            opened.enter_context(run_lock(Path(config.output)))
            if ranks.is_main:
                for note in (*self._prepared.notes, *compare_eod_ids(eod_id, self._prepared.eod_ids)):
                    logger.info(note)
            if limits.verify_data:
                from megatron_cpt.train.open_data import verify_data

                verify_data(self._prepared.prefixes, self._progress.note)
            tasks = None
            if config.evaluation is not None:
                from megatron_cpt.train.evaluation import EvaluationTasks

                self._progress.note("loading the tasks of the evaluation")
                tasks = EvaluationTasks(config)
            self._progress.note("setup")
            from megatron_cpt.train.setup import setup

            self.session = setup(
                config,
                self._prepared.plan,
                ranks,
                eod_id=eod_id,
                tokenizer_fingerprint=tokenizer_fingerprint,
                data_tokenizer=self._prepared.tokenizer,
                allow=self._allow,
                restart=self._restart,
                note=self._progress.note,
            )
            if self.session.is_resumed:
                self._newest = self.session.origin
            if tasks is not None:
                from megatron_cpt.train.evaluation import Evaluator

                self._evaluator = Evaluator(tasks, self.session.config, self.session.model, ranks)
            write_run_files(self.session, restart=self._restart)
            opened.callback(lambda: self.hooks.on_end(self.session))
            opened.callback(self.session.saver.close)
            opened.callback(self.session.loader.close)
            self._resources = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close everything in reverse order, also after an error.

        Raises:
            LostPeerError: in place of an error that a lost connection to another rank caused.
        """
        try:
            self._resources.__exit__(kind, error, trace)
        finally:
            del self.session
            gc.collect()  # model and optimizer are cycles; the memory of the device is free for the next run

    def fit(self) -> RunResult:
        """Train to the end of the run, to `stop_at_step`, to the limit of time, or until a signal; a collective call.

        Raises:
            CptError: too many bad steps in a row, replicas that differ, or a file that cannot be written.
        """
        if not hasattr(self, "session"):
            raise RuntimeError("fit: the run is not open; use it inside `with Trainer(run) as trainer:`")
        with manual_collection():
            return self._fit()

    def _fit(self) -> RunResult:
        session, config, state = self.session, self.session.config, self.session.state
        hash_every = config.resilience.parameter_hash_every
        self.hooks.on_start(session)
        session.meter.take()  # the first line excludes the time since setup
        if not session.is_resumed:
            self._validate()
        reason, is_save_due = self._evaluate(is_first=True), False
        while state.step < session.last_step and not reason:
            self._progress.note(f"step {state.step + 1}")
            self.wall_time.begin_step()
            is_save_due |= _is_due(state.step + 1, config.checkpoint.every)
            result = self._train_step(is_save_due)
            if result.anomaly is not None:
                self._report_anomaly(result, result.anomaly)
            is_last = state.step == session.last_step
            reason = "" if is_last else self._early_end_reason(result)
            is_end = is_last or reason != ""
            # After a skipped update the save waits for an applied one, because the weights may be the reason for it.
            saves = reason != "" or (is_last and session.saves_at_last_step)
            saves |= is_save_due and state.skipped_in_a_row == 0
            if hash_every is not None and (saves or _is_due(state.step, hash_every)):
                check_replicas(session.model.chunks, state.step)
            if saves or is_end or _is_due(state.step, config.log.every):
                self.hooks.on_metrics(session, metrics_line(session, result))
            if is_last or _is_due(state.step, config.validation.every if config.validation else None):
                self._validate()
            if saves:
                self._save(wait=is_end)
                is_save_due = False
            else:
                self._note_published(session.saver.finish() if is_end else session.saver.poll())
                if state.skipped_in_a_row == 0 and not is_end:
                    session.saver.reserve()
            if not reason:
                reason = self._evaluate()
                if reason and not saves:
                    self._save(wait=True)
            if saves or _is_due(state.step, COLLECT_EVERY):
                gc.collect()
            self.wall_time.end_step()
        self.hooks.on_stop(session, reason)
        return RunResult(EXIT_STOPPED if reason else EXIT_OK, state.step, self._newest, reason)

    def _train_step(self, is_save_due: bool) -> StepResult:
        """Train on the next global batch and count it."""
        session, state = self.session, self.session.state
        self.hooks.on_step_start(session)
        with session.meter.data_wait:
            data = session.loader.next_step()
        result = train_step(
            session.forward,
            session.update,
            data,
            session.plan.schedule.rate(state.step + 1),
            contributes_loss=session.meter.contributes_loss,
            requests=lambda: (self._stop.received is not None, self._is_last_step(is_save_due)),
            judge=self._judge,
            before_update=session.saver.wait_for_copy,
            sync_wait=session.meter.sync_wait,
        )
        state.advance(data.num_tokens, data.counts, data.state)
        session.meter.add(result.loss_by_source, data.num_tokens, session.flops_per_token(state.step))
        self.hooks.on_step(session)
        return result

    def _is_last_step(self, is_save_due: bool) -> bool:
        step, due = self.session.state.step, self.session.plan.evaluation_steps
        return self.wall_time.is_last_step(
            is_save_due=is_save_due, is_evaluation_due=step + 1 in due or step + 2 in due
        )

    def _judge(self, losses: torch.Tensor, grad_norm: float, is_finite: bool) -> Anomaly | None:
        """Compare a step with the previous ones, before its update is applied."""
        plan, state, spike = self.session.plan, self.session.state, self.session.config.resilience.spike
        if state.step and plan.phase_of(state.step).name != plan.phase_of(state.step + 1).name:
            state.recent_losses = []  # another blend has another level of loss
        loss = mean_objective(losses, self.session.meter.names, self.session.config.teacher)
        anomaly = find_anomaly(loss, grad_norm, is_finite, state.recent_losses, spike)
        note_loss(state, loss, anomaly, spike)
        return anomaly

    def _early_end_reason(self, result: StepResult) -> str:
        """Return why the process ends before the end of the run; empty if it continues."""
        is_signaled, is_out_of_time = result.requests
        if is_signaled:
            return self._signal_reason()
        limit = self.session.config.resilience.wall_time
        if is_out_of_time and limit is not None:
            return f"another step would not fit into resilience.wall_time: {format_duration(limit)}"
        return ""

    def _signal_reason(self) -> str:
        return f"stopped by {self._stop.received.name if self._stop.received else 'a signal to another rank'}"

    def _report_anomaly(self, result: StepResult, anomaly: Anomaly) -> None:
        session = self.session
        line = describe(anomaly, result, session)
        self.hooks.on_anomaly(session, line)
        reason = reason_to_stop(anomaly, session.state, session.config.resilience)
        if reason is not None:
            self._note_published(session.saver.finish())  # a save in the background has the state before the bad steps
            raise CptError(reason)

    def _validate(self) -> None:
        session = self.session
        if session.validator is None:
            return
        activity, started = f"validation after step {session.state.step}", time.perf_counter()
        losses = session.validator.run(session.forward, lambda source: self._progress.note(f"{activity}: {source}"))
        self.hooks.on_validation(session, {"step": session.state.step, "validation": losses})
        session.meter.skip_time(time.perf_counter() - started)

    def _evaluate(self, *, is_first: bool = False) -> str:
        """Run the evaluation that is due after this step, unless an earlier process of the run has done it.

        It follows the save of the step. So a process that is killed meanwhile loses no step, and a resumed process
        evaluates first.

        Args:
            is_first: before the first step of this process; only then can an earlier process have evaluated.

        Returns:
            The reason why the process must end, if it was asked to stop meanwhile; else "".
        """
        session, evaluator = self.session, self._evaluator
        step = session.state.step
        if evaluator is None or step not in session.plan.evaluation_steps:
            return ""
        from megatron_cpt.train.evaluation import has_evaluation

        if is_first and on_main(lambda: has_evaluation(session.output, step)):
            return ""
        activity, started = f"evaluation after step {step}", time.perf_counter()
        self.wall_time.begin_evaluation()
        measured = evaluator.run(lambda: self._progress.note(activity), lambda: self._stop.received is not None)
        seconds = time.perf_counter() - started
        self.wall_time.end_evaluation()
        if measured is None:
            return self._signal_reason()
        self.hooks.on_evaluation(session, {"step": step, **measured, "evaluation_seconds": seconds})
        session.meter.skip_time(time.perf_counter() - started)
        return ""

    def _save(self, *, wait: bool) -> None:
        """Start a save; finish the previous one first, and this one too if `wait`."""
        session, started = self.session, time.perf_counter()
        self._progress.note(f"saving step {session.state.step}")
        self._note_published(session.saver.finish())
        self.wall_time.begin_save()
        path = session.saver.save(session.state.step, record(session))
        if wait and path is None:
            path = session.saver.finish()
        self.wall_time.end_stall()
        session.meter.skip_time(time.perf_counter() - started)
        self._note_published(path)

    def _note_published(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            if self._newest is None:
                note_published(self.session)
            self._newest = checkpoint
            self.wall_time.end_save()
            self.hooks.on_checkpoint(self.session, str(checkpoint))


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
