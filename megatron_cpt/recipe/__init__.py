"""A run.yaml by the rules of "Reuse, Don't Retrain" (arXiv 2407.07263), in which every value has its reason."""
