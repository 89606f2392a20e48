"""For all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No test may depend on the speed of the machine.
_ANY_SPEED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# A developer's run looks for new examples each time; CI judges a change, not its luck.
settings.register_profile("any speed", _ANY_SPEED)
settings.register_profile("ci", _ANY_SPEED, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "any speed")
