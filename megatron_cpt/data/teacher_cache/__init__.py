"""Cache of a teacher's most likely tokens: made by `teach`, read in training. Imports no torch."""
