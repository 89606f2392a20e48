"""Parameters, FLOPs and memory of a run."""
