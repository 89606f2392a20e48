"""Grid of runs from one trunk: arms that override a base run.yaml, seeds, and comparisons with confidence intervals.

`experiment_file` reads EXPERIMENT.yaml, `arms` plans every arm, `run_units` and its engines train the runs, and
`compare_arms` turns their held-out losses into a ranking.
"""
