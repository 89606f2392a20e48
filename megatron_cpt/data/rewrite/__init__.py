"""New datasets from existing ones: merging and splitting."""
