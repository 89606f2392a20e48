"""What the scripts in tools/ share with the commands: how a mistake ends them."""

from __future__ import annotations

import sys
from collections.abc import Callable

from megatron_cpt.errors import EXIT_OK, CptError


def run_tool(tool: Callable[[], None]) -> int:
    """Run a script's work.

    Returns:
        The exit status: see `megatron_cpt.errors`. A defect of ours is not caught and keeps its traceback.
    """
    try:
        tool()
    except CptError as error:
        print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
        return error.exit_status
    return EXIT_OK
