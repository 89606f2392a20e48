"""Error handling for the scripts in tools/ and examples/."""

from __future__ import annotations

import sys
from collections.abc import Callable

from megatron_cpt.errors import EXIT_OK, CptError
from megatron_cpt.files.terminal import escaped_output


def run_tool(tool: Callable[[], None]) -> int:
    """Run a function and print a CptError as one message.

    Returns:
        The exit status, see `megatron_cpt.errors`. An unexpected exception is not caught and keeps its traceback.
    """
    with escaped_output():
        try:
            tool()
        except CptError as error:
            print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
            return error.exit_status
    return EXIT_OK
