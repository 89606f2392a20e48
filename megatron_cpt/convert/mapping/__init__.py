"""Rules from the tensors of one format to those of another."""
