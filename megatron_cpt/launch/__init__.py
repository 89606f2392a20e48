"""Start the ranks of a run under torchrun; pass stop signals to them and return their exit status.

torchrun alone mishandles a preempted job (torch 2.13 and 2.15: `torch/distributed/elastic/multiprocessing/api.py`,
`SubprocessContext._poll` and `_close`):

| event | torchrun alone | this launcher |
| --- | --- | --- |
| a rank ends with 75 (stopped, saved) | a failure: kills ranks that still save after 30 s, restarts all | 75 |
| SIGTERM | the ranks get 30 s | the ranks save, however long that takes |
| SIGUSR1 | torchrun dies, its ranks live on | as SIGTERM |
| SIGINT (Ctrl-C) | the ranks get 30 s | as SIGTERM; the second one kills the ranks: 130 |
| a rank fails | SIGTERM to the other ranks, restart | unchanged |

torchrun inherits blocked stop signals, so only the launcher handles them (`supervise.py`). Each rank runs inside
`rank.py`, which writes its exit status to a file for the launcher and shows torchrun nothing but failures.

A rank that has not started training ends on SIGTERM immediately. Either the job is being stopped, or torchrun is ending
the rank because another one failed. Only the launcher knows: it creates a stop file when it receives a signal itself.
Without that file, such an end is never reported as 75.

Under plain torchrun a rank cannot tell the two apart, and need not: agreeing to stop and saving are collectives of all
ranks, so after a failure no rank gets as far as status 75.
"""

from megatron_cpt.launch.options import check_options, check_port, with_defaults
from megatron_cpt.launch.supervise import supervise

__all__ = ["check_options", "check_port", "supervise", "with_defaults"]
