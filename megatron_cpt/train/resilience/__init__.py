"""Detection of anomalies, hangs, lost ranks, differing replicas and time limits."""
