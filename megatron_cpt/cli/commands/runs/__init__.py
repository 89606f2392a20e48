"""Commands on runs: what a run will do, does and did."""
