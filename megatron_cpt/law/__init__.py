"""A law of the run: held-out loss as a function of learning rate, tokens and blend, fitted on finished small runs."""
