"""Variables that CUDA reads at start are set by the commands themselves, and the user's own values stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron_cpt.launch.environment import CLUSTER_VARIABLES, CUDA_VARIABLES, set_cuda_variables

ROOT = Path(__file__).parents[3]
NAMES = [variable.name for variable in CUDA_VARIABLES]


def test_a_value_of_the_user_stays():
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    set_cuda_variables(environment)
    assert environment == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def test_train_sets_the_variables_before_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text(
        f"import os, sys\nprint([os.environ.get(name) for name in {NAMES}])\nsys.exit(7)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "megatron_cpt", "train", "run.yaml"]
    done = subprocess.run(command, check=False, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert done.stdout.strip() == str([variable.value for variable in CUDA_VARIABLES])


def test_the_script_of_the_cluster_sets_only_the_variables_of_its_network():
    script = (ROOT / "examples" / "nemotron4_15b" / "cluster.sh").read_text(encoding="utf-8")
    for variable in CLUSTER_VARIABLES:
        assert f'export {variable.name}="${{{variable.name}:-{variable.value}}}"' in script
    assert not [name for name in NAMES if f"export {name}" in script]
