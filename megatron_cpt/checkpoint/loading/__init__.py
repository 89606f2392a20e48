"""Finding the newest valid checkpoint and loading it, verified while it is read."""
