"""Which documents a step has read, and what a run was made of. Imports no torch."""
