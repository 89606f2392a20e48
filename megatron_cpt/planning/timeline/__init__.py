"""Steps, phases, epochs and learning rates of a run."""
