"""Protection against waiting forever: heartbeats between ranks, and one clear error for a lost connection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_cpt.backend import Ranks
from megatron_cpt.backend.heartbeat import Peers, job_store, lost_connection
from megatron_cpt.config.resilience import ResilienceConfig
from megatron_cpt.errors import CptError
from megatron_cpt.train.resilience.watchdog import Progress, Watchdog, end_process


class LostPeerError(CptError):
    """Another rank of the job is gone, so this one cannot continue (exit status 1)."""


@contextlib.contextmanager
def guard(config: ResilienceConfig, ranks: Ranks, watchdog: Watchdog, progress: Progress) -> Iterator[None]:
    """Limit the time that this rank waits for another one, and report which rank is gone.

    Args:
        config: the limits.
        ranks: this process's place in the job.
        watchdog: of this process; its message will name the rank that is gone.
        progress: the current phase of this rank.

    Raises:
        LostPeerError: in place of an error of torch.distributed about a lost connection.
    """

    def end(message: str) -> None:
        path = watchdog.dump()
        end_process(f"{message}; stacks in {path}")

    peers = Peers(
        job_store(),
        ranks.rank,
        ranks.world_size,
        timeout=config.peer_timeout,
        doing=lambda: progress.phase,
        end=end,
    )
    with peers:
        watchdog.explain = peers.explain
        try:
            yield
        except Exception as error:
            trouble = lost_connection(error)
            if trouble is None or isinstance(error, CptError):
                peers.announce(error)
                raise
            raise LostPeerError(peers.explain(trouble)) from error
