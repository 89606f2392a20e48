"""Train two steps of one rank on the fake device and print what was seen, as JSON.

    python -m tests.helpers.fake_cuda '[{"rank": 0, "world_size": 64, "overrides": ["parallel.tensor=8"]}]'
"""

from __future__ import annotations

import json
import sys

from tests.helpers.fake_cuda.device import load_guard

if __name__ == "__main__":
    load_guard()
    from tests.helpers.fake_cuda.steps import Case, run_case  # imports torch

    reports = [run_case(Case(**case)) for case in json.loads(sys.argv[1])]
    print(json.dumps(reports))
