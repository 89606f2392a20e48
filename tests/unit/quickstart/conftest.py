"""The quickstart is a folder of scripts, not a package: its modules are found the way `python demo.py` finds them."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = ROOT / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))


@pytest.fixture
def quickstart() -> Path:
    return QUICKSTART
