"""Imports of a process that only reads data."""

import subprocess
import sys


def test_the_data_package_needs_neither_the_configuration_nor_torch():
    program = "import sys, megatron_cpt.data; print([n for n in ('pydantic', 'torch', 'megatron') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
