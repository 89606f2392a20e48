"""Automatic garbage collection is off while a run trains, and as before afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from megatron_cpt.train.garbage import manual_collection


@pytest.fixture(autouse=True)
def _restore():
    yield
    gc.enable()


@manual_collection()
def _fail_while_collection_is(expected):
    assert gc.isenabled() == expected
    raise ValueError("bad step")


def test_collection_is_restored_after_an_error():
    with pytest.raises(ValueError, match="bad step"):
        _fail_while_collection_is(False)
    assert gc.isenabled()


def test_collection_that_was_off_stays_off():
    gc.disable()
    with manual_collection():
        pass
    assert not gc.isenabled()


class _Cycle:
    def __init__(self):
        self.itself = self


def test_what_exists_before_the_steps_is_skipped_until_their_end():
    gc.unfreeze()
    cycle = _Cycle()
    before, is_gone = weakref.ref(cycle), weakref.ref(_Cycle())
    with manual_collection():
        assert is_gone() is None
        del cycle
        during = weakref.ref(_Cycle())
        gc.collect()
        assert (before() is None, during() is None) == (False, True)
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert before() is None


def test_objects_that_the_caller_froze_stay_frozen():
    gc.freeze()
    with manual_collection():
        pass
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
