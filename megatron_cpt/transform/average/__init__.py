"""Weighted averages of checkpoints of one model.

`average_checkpoints` has the function to call. `average_weights` computes the weights, `average_inputs` opens the
checkpoints and refuses those that do not belong together.
"""
