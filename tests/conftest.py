"""For all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# A developer's run looks for new examples each time; CI judges a change, not its luck.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
