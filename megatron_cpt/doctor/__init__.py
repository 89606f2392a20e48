"""Is a node fit for a run? Each check looks at facts and says what it found, what that costs, and the way out."""

from megatron_cpt.doctor.diagnosis import Diagnosis, Level
from megatron_cpt.doctor.run_checks import Examination, examine

__all__ = ["Diagnosis", "Examination", "Level", "examine"]
