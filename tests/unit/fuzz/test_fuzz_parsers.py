"""No changed file ends a parser with anything but a message: no traceback, no hang, no gigabytes, no wrong acceptance.

`make test` tries a few inputs per parser; `make test-long` tries 100,000, or FUZZ_INPUTS, from FUZZ_SEED. A failure
names the mutations of the smallest input. Inputs that failed once are in CRASHES.
"""

from __future__ import annotations

import os
import resource
import signal
from types import FrameType

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from megatron_cpt.errors import CptError
from tests.helpers.fuzz_targets import Target, build_targets
from tests.helpers.mutations import Mutation, mutations

SECONDS = 20
MAX_BYTES = 2 << 30
INPUTS_SHORT, INPUTS_LONG = 600, int(os.environ.get("FUZZ_INPUTS", "110000"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return build_targets(tmp_path_factory.mktemp("fuzz"))


NAMES = [
    *("run.yaml", "overrides", ".idx", "sidecar", "plans.jsonl", "metrics.jsonl", "manifest", "state.json"),
    *("run.yaml of a checkpoint", "state.json, checksum", "run.yaml, checksum", "torch file", ".metadata", ".distcp"),
    *("common.pt", "run_config.yaml", "safetensors", "safetensors header", "config.json", "index.json"),
    *("pytorch_model.bin", "tokenizer.json", "tokenizer_config.json", "preprocess state.json"),
    *("preprocess settings.json", "convert journal"),
]
CRASHES = [
    ("run.yaml", b'a: !!int ""'),
    ("run.yaml", b'"\\ud800": 1'),
    ("run.yaml", b'output: "a\\0b"'),
    ("run.yaml", b"seq_length: 1:04"),
    ("overrides", b"a." * 5000 + b"b=1"),
    ("index.json", b'{"weight_map": {"a": "\\ud922"}}'),
    ("index.json", b'{"weight_map": {"a": "' + b"x" * 300 + b'"}}'),
    ("tokenizer_config.json", b'{"eos_token": "\\ud800"}'),
    ("preprocess state.json", b"3"),
    ("preprocess state.json", b'{"state": {}}'),
    ("preprocess state.json", b'{"state": {}, "lengths": {"0.tokens": "x"}}'),
    ("convert journal", b"3\n"),
    ("metrics.jsonl", b'3\n{"step": {}, "samples_by_source": 1}\n'),
    ("plans.jsonl", b'{"after_step": 0, "state": null, "run": {}, "plan": {}, "data_fingerprints": {"web": 0.5}}\n'),
    ("config.json", b'{"model_type": "llama", "num_hidden_layers": 10000000}'),
]


def _read(target: Target, content: bytes) -> None:
    """Read one input under a time limit and a limit on memory; only a `CptError` may come out."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {SECONDS} s of computing")

    before, limits = signal.signal(signal.SIGVTALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    # of the processor, not of the clock: a busy machine is no hang
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    with open("/proc/self/statm") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MAX_BYTES, limits[1]))
    try:
        target.read(content)
    except CptError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _fuzz(target: Target, num_inputs: int) -> int:
    num_read = 0
    inputs = st.tuples(st.sampled_from(target.seeds), mutations(is_yaml=target.is_yaml, is_json=target.is_json))

    @seed(SEED)
    @settings(
        max_examples=num_inputs,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(inputs)
    def read(drawn: tuple[bytes, list[Mutation]]) -> None:
        nonlocal num_read
        content, changes = drawn
        for change in changes:
            content = change.apply(content, target.seeds)
        num_read += 1
        _read(target, content)

    read()
    return num_read


def _share(target: Target, targets: dict[str, Target], total: int) -> int:
    return round(total * target.weight / sum(other.weight for other in targets.values()))


@pytest.mark.parametrize("name", NAMES)
def test_a_few_changed_files(name: str, targets: dict[str, Target]) -> None:
    assert set(targets) == set(NAMES)
    targets[name].read(targets[name].seeds[0])
    _fuzz(targets[name], _share(targets[name], targets, INPUTS_SHORT))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_many_changed_files(name: str, targets: dict[str, Target], record_property) -> None:
    num_read = _fuzz(targets[name], _share(targets[name], targets, INPUTS_LONG))
    print(f"\n{name}: {num_read:,} inputs")
    record_property("inputs", num_read)


@pytest.mark.parametrize(("name", "content"), CRASHES)
def test_inputs_that_failed_once(name: str, content: bytes, targets: dict[str, Target]) -> None:
    _read(targets[name], content)
