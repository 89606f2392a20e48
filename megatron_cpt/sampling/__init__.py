"""Which token comes next: permutation, spans and blend. Pure functions, no disk."""
