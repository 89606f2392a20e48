"""Distillation: the loss, and the teachers that it compares the model with."""
