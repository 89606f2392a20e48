"""Starting the ranks of a run with torchrun, so that their exit statuses and a scheduler's signals get through.

torchrun by itself knows one kind of failure. Of a rank that ends with 75 it makes a fault: it stops the ranks that are
still saving after 30 seconds, starts all of them again, and ends with 1. A SIGTERM makes it give its ranks 30 seconds
too, and SIGUSR1 ends it on the spot while its ranks, in sessions of their own, live on (torch 2.13 and 2.15:
`torch/distributed/elastic/multiprocessing/api.py`, `SubprocessContext._poll` and `_close`).

So torchrun is started with the stop signals blocked, each rank through `rank.py`, which tells it of faults only, and
`supervise.py` passes the signals to the ranks and makes one status of theirs.
"""

from megatron_cpt.launch.options import check_options, with_defaults
from megatron_cpt.launch.supervise import supervise

__all__ = ["check_options", "supervise", "with_defaults"]
