"""Writing a checkpoint in the background and publishing it atomically."""
