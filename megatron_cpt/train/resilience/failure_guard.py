"""What keeps a rank from waiting for ever: a watchdog, signs of life, and plain words for a lost connection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_cpt.backend import Ranks
from megatron_cpt.backend.heartbeat import Peers, job_store, lost_connection
from megatron_cpt.config.resilience import ResilienceConfig
from megatron_cpt.errors import CptError
from megatron_cpt.train.resilience.watchdog import Progress, Watchdog, end_process


class LostPeerError(CptError):
    """Another rank of the job is gone, so this one cannot go on (exit status 1)."""


@contextlib.contextmanager
def guard(config: ResilienceConfig, ranks: Ranks, watchdog: Watchdog, progress: Progress) -> Iterator[None]:
    """Bound the time that this rank waits for another one, and say why it ends.

    Args:
        config: the limits.
        ranks: where this process stands.
        watchdog: of this process; from now on it says which rank is gone.
        progress: what this rank is doing.

    Raises:
        LostPeerError: instead of what torch.distributed raised for a connection that is gone.
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
