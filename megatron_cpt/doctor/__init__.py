"""Checks of a node before a run. Each one reports the facts, the cost of a problem, and how to fix it."""

from megatron_cpt.doctor.diagnosis import Diagnosis, Level
from megatron_cpt.doctor.run_checks import Examination, examine

__all__ = ["Diagnosis", "Examination", "Level", "examine"]
