"""Import of the scripts in tools/dev, which import each other as top-level modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "tools" / "dev"


def load_dev_tool(name: str) -> ModuleType:
    """Import tools/dev/NAME.py as it imports itself."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)
