"""`python -m megatron_cpt` is `megatron-cpt`."""

import sys

from megatron_cpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
