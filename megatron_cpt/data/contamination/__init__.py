"""n-gram overlap between training data and held-out data."""
