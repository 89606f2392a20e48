"""Run the command line with `python -m megatron_cpt`."""

import sys

from megatron_cpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
