"""From streams of samples to the micro-batches of a rank."""
