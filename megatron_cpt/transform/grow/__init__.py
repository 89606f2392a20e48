"""Growth of a trained model to a larger one that computes the same function."""
