"""An independent implementation of a training run, to compare the product with."""
