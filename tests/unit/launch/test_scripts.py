"""Shell scripts, Dockerfile and Kubernetes files: shellcheck, hadolint, and references between files."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "nemotron4_15b"
SCRIPTS = sorted(
    path
    for folder in ("examples", "tools", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
BIN = Path(sysconfig.get_path("scripts"))


def _check(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_script_of_the_example_is_checked() -> None:
    assert {path.name for path in SCRIPTS} >= {"cluster.sh", "train.sh", "train.sbatch"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_passes(script: Path) -> None:
    _check(BIN / "shellcheck", "--external-sources", "--source-path", "SCRIPTDIR", script)


def test_hadolint_passes() -> None:
    _check(BIN / "hadolint", ROOT / "Dockerfile")


def test_the_job_on_kubernetes_means_the_runtime_beside_it_and_files_that_are_here() -> None:
    job = yaml.safe_load((EXAMPLE / "kubernetes" / "trainjob.yaml").read_text())
    runtime = yaml.safe_load((EXAMPLE / "kubernetes" / "runtime.yaml").read_text())
    reference = job["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes
    words = job["spec"]["trainer"]["args"][0].split()
    for path in (word for word in words if word.startswith("examples/")):
        assert (ROOT / path).exists(), path
    # Kubeflow Trainer 2.2 removed numProcPerNode from the runtime's torch policy (PR 3239); the job has it.
    assert runtime["spec"]["mlPolicy"]["torch"] == {}
    assert job["spec"]["trainer"]["numProcPerNode"] == 8
