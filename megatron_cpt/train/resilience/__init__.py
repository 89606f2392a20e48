"""Anomalies, hangs, lost ranks, differing replicas and time limits."""
