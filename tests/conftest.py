"""For all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No test may depend on the speed of the machine. `make test` tries few inputs of each property, `make test-long` many.
_FEW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=25)
# A developer's run looks for new examples each time; CI judges a change, not its luck.
settings.register_profile("few", _FEW)
settings.register_profile("ci", _FEW, derandomize=True)
settings.register_profile("many", _FEW, max_examples=300)
settings.load_profile("ci" if os.environ.get("CI") else "few")
