"""Training: set up a prepared run, then step through it."""
