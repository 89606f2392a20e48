"""Automatic garbage collection is off while a run trains, and as before afterwards."""

from __future__ import annotations

import gc

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
