"""Order of training samples: which source, and which sample of that source, comes next. Pure arithmetic, no disk."""
