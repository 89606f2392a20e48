"""Length of the longest run that reads no general source more than four times.

The length decides the batch, the step of the switch and the rounding of samples, so it is found by trying.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_cpt.config import format_count, parse_count
from megatron_cpt.errors import UserError
from megatron_cpt.recipe.blend_weights import TooLongRunError
from megatron_cpt.recipe.compose_run import RecipeChoices, compose_run

_DIGITS = 3  # significant digits of the advice


def advise_tokens(refused: int, choices_for: Callable[[int], RecipeChoices]) -> str | None:
    """Return a value of --tokens that passes, such as `4.61M`; None if the data is too little for any.

    Args:
        refused: a length that is too long.
        choices_for: returns the choices for a length.
    """
    choices = choices_for(refused)
    if not all(source.samples(choices.seq_length.value) for source in (*choices.general, *choices.qa)):
        return None
    fitting, too_long = 0, refused
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if _fits(choices_for(middle), too_short_fits=True):
            fitting = middle
        else:
            too_long = middle
    for tokens in (_round_down(fitting), fitting):
        if tokens and _fits(choices_for(tokens), too_short_fits=False):
            short = format_count(tokens)
            return short if parse_count(short) == tokens else str(tokens)
    return None


def _fits(choices: RecipeChoices, *, too_short_fits: bool) -> bool:
    try:
        compose_run(choices)
    except TooLongRunError:
        return False
    except UserError:  # too short for two phases
        return too_short_fits
    return True


def _round_down(tokens: int) -> int:
    """Round down to three significant digits: 4,617,000 becomes 4,610,000."""
    unit = 10 ** max(0, math.floor(math.log10(tokens)) + 1 - _DIGITS) if tokens else 1
    return tokens // unit * unit
