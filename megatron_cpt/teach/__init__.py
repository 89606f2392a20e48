"""Cache of a teacher: its most likely next tokens for every position of the sources of a run."""
