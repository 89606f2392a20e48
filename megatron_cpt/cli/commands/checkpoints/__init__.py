"""Commands on checkpoints and models."""
