"""Is a node fit for a run? Each check looks at facts and says what it found, what that costs, and the way out."""

from megatron_cpt.doctor.examine import Examination, examine
from megatron_cpt.doctor.findings import Finding, Level, render

__all__ = ["Examination", "Finding", "Level", "examine", "render"]
