"""Evaluation of a model: log-likelihoods and generated text at any parallel layout."""
