"""One page about a run, made from its files: what was planned, what happened, what was learned and what was forgotten.

`read_run` reads a run directory, `sections` turns it into tables and charts, `html_page` and `markdown_page` write
them. Imports no torch.
"""
