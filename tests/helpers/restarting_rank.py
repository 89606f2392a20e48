"""A rank that connects to the others over gloo; rank 0 is killed in the first attempt."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def main() -> int:
    attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    dist.all_reduce(torch.ones(1))
    print(f"rank {rank} connected in attempt {attempt}", flush=True)
    if attempt != "0":
        dist.destroy_process_group()
        return 0
    if rank == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError:
        return 1
    raise AssertionError("the other rank was killed")


if __name__ == "__main__":
    sys.exit(main())
