"""Heartbeats, with ranks that are threads of one process and share a store."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from megatron_cpt.backend import heartbeat as module
from megatron_cpt.backend.heartbeat import Peers, lost_connection
from megatron_cpt.errors import RefusedError


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Shorten all waiting times to a tenth."""
    for name in ("_BEAT_SECONDS", "_ROLL_CALL_SECONDS", "_GRACE_SECONDS"):
        monkeypatch.setattr(module, name, getattr(module, name) / 10)


class Job:
    """Ranks that share a store; `ends` collects the message with which a thread ends its rank."""

    def __init__(self, num_ranks, *, timeout=60.0):
        self.store, self.ends = dist.HashStore(), {}
        self.ranks = [
            Peers(
                self.store,
                rank,
                num_ranks,
                timeout=timeout,
                doing=lambda: "step 17",
                end=lambda message, rank=rank: self.ends.setdefault(rank, message),
            )
            for rank in range(num_ranks)
        ]
        for peers in self.ranks:
            peers.__enter__()

    def vanish(self, rank):
        """Stop the heartbeats without a message, as `kill -9` does."""
        self.ranks[rank]._stop.set()

    def leave(self, rank, error=None):
        self.ranks[rank].__exit__(type(error) if error else None, error, None)

    def wait_for_ends(self, ranks, seconds=300.0):
        deadline = time.monotonic() + seconds
        while set(self.ends) != set(ranks):
            assert time.monotonic() < deadline, self.ends
            time.sleep(0.01)


@pytest.fixture
def job():
    made = []

    def make(*args, **kwargs):
        made.append(Job(*args, **kwargs))
        return made[-1]

    yield make
    for made_job in made:
        for rank in range(len(made_job.ranks)):
            made_job.leave(rank)


def test_all_ranks_name_the_dead_rank(job):
    ranks = job(4)
    time.sleep(0.2)
    ranks.vanish(2)
    message = ranks.ranks[3].explain("Connection closed by peer")
    assert message == "rank 3 in step 17: rank 2 gives no sign of life; step 17: Connection closed by peer"
    ranks.leave(3, RuntimeError())
    # the others are stuck in a collective: their threads end them, for the same reason
    ranks.wait_for_ends([0, 1])
    for rank in (0, 1):
        assert ranks.ends[rank] == (
            f"rank {rank} in step 17: rank 2 gives no sign of life; rank 3 in step 17: Connection closed by peer"
        )


@pytest.mark.parametrize("silent", [1, 0], ids=["a-rank", "the-main-rank"])
def test_silence_is_noticed_without_any_error(job, silent):
    ranks = job(3, timeout=0.8)
    time.sleep(0.2)
    ranks.vanish(silent)
    others = [rank for rank in range(3) if rank != silent]
    ranks.wait_for_ends(others)
    for rank in others:
        text = f"rank {rank} in step 17: rank {silent} gave no sign of life for 1 s (resilience.peer_timeout)"
        assert ranks.ends[rank] == text


def test_a_rank_that_fails_gives_the_reason(job):
    ranks = job(3)
    error = RefusedError("data/web: document 7 is damaged\nmore")
    ranks.ranks[1].announce(error)
    ranks.leave(1, error)
    ranks.wait_for_ends([0, 2])
    assert ranks.ends[2] == "rank 2 in step 17: rank 1 ended in step 17: RefusedError: data/web: document 7 is damaged"


def test_ranks_that_are_done_are_not_missed(job):
    ranks = job(3, timeout=0.5)
    time.sleep(0.2)
    ranks.leave(0)
    ranks.leave(1)
    time.sleep(1.5)
    assert ranks.ends == {}


def test_a_main_thread_that_ends_by_itself_is_not_ended(job):
    ranks = job(2)
    time.sleep(0.2)
    ranks.vanish(1)
    ranks.ranks[0].explain("Broken pipe")
    ranks.leave(0, RuntimeError())
    time.sleep(1.0)
    assert ranks.ends == {}


def test_a_store_that_is_gone_ends_the_rank_after_the_timeout():
    class Gone:
        def __getattr__(self, name):
            raise dist.DistNetworkError("the host has closed the connection")

    ends, done = [], threading.Event()
    store = dist.HashStore()
    peers = Peers(store, 1, 2, timeout=0.5, doing=lambda: "setup", end=lambda text: (ends.append(text), done.set()))
    with peers:
        peers._store._store = Gone()
        assert done.wait(300)
    assert ends == ["rank 1 in setup: the store of the job is gone (the host has closed the connection)"]


class Frozen:
    """Store of a host that no longer answers: no call returns until the test ends."""

    def __init__(self):
        self.thaw = threading.Event()

    def __getattr__(self, name):
        def call(*args):
            self.thaw.wait(300)
            raise dist.DistNetworkError("the host has closed the connection")

        return call


@pytest.fixture
def freeze():
    stores = []

    def freeze_store_of(peers):
        stores.append(Frozen())
        peers._store._store = stores[-1]

    yield freeze_store_of
    for store in stores:
        store.thaw.set()


FROZEN = "the store of the job gave no answer for 1 s (resilience.peer_timeout); its host, the node of rank 0,"


def test_a_store_that_never_answers_ends_every_rank(job, freeze):
    ranks = job(3, timeout=0.8)
    for peers in ranks.ranks:
        freeze(peers)
    ranks.wait_for_ends([0, 1, 2])
    for rank in range(3):
        assert ranks.ends[rank] == f"rank {rank} in step 17: {FROZEN} is frozen or cut off"


def test_an_error_ends_a_rank_although_the_store_never_answers(job, freeze):
    ranks = job(2)
    freeze(ranks.ranks[1])
    error = ValueError("a defect")
    ranks.ranks[1].announce(error)
    ranks.leave(1, error)
    ranks.leave(0)
    assert ranks.ends == {}


def test_alone_or_without_a_limit_nothing_is_watched():
    for world_size, timeout in ((1, 60.0), (2, None)):
        before = threading.active_count()
        with Peers(dist.HashStore(), 0, world_size, timeout=timeout, doing=lambda: "setup", end=print) as peers:
            assert threading.active_count() == before
            assert peers.explain("Broken pipe") == "rank 0 in setup: Broken pipe"


def test_what_counts_as_a_lost_connection():
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4711")
    assert lost_connection(gloo) == "Connection closed by peer"
    assert lost_connection(dist.DistBackendError("NCCL error in: x.cpp:1\nncclRemoteError")) == "NCCL error in: x.cpp:1"
    wrapped = ValueError("a save failed")
    wrapped.__cause__ = gloo
    assert lost_connection(wrapped) == "Connection closed by peer"
    assert lost_connection(RuntimeError("shapes do not match")) is None
    assert lost_connection(KeyError("gloo/transport")) is None
