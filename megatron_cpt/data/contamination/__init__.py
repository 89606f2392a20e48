"""Search for held-out data in training data by shared n-grams."""
