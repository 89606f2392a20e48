"""Programs that a model writes, and the sandbox that runs them."""
