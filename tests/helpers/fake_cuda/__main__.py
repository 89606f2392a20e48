"""Train two steps of one rank on the fake device and print what was seen, as JSON.

python -m tests.helpers.fake_cuda '[{"rank": 0, "world_size": 64, "overrides": ["parallel.tensor=8"]}]'
python -m tests.helpers.fake_cuda probe
"""

from __future__ import annotations

import json
import sys

from tests.helpers.fake_cuda.device import load_guard


def main(argument: str) -> None:
    """Run the cases, or the probes of the fake device itself."""
    load_guard()  # before torch, which the modules below import
    if argument == "probe":
        from tests.helpers.fake_cuda.probe import run_probe

        print(json.dumps(run_probe()))
        return
    from tests.helpers.fake_cuda.steps import Case, run_case

    print(json.dumps([run_case(Case(**case)) for case in json.loads(argument)]))


if __name__ == "__main__":
    main(sys.argv[1])
