"""Metrics of the offline tasks, against numbers computed by hand."""

import math

import pytest

from megatron_cpt.errors import UserError
from megatron_cpt.evaluate.offline.scores import (
    score_answers,
    score_choices,
    score_letters,
    score_number,
    score_program,
    token_counter,
)
from megatron_cpt.evaluate.programs.code_execution import allow_code_execution

LN2 = math.log(2)


def results(*bits: float) -> list[tuple[float, bool]]:
    """Log-likelihoods of answers that have a probability of 2 ** -bits."""
    return [(-number * LN2, False) for number in bits]


def test_bits_per_byte_of_the_right_choice():
    # "über" has 5 bytes: 20 bits are 4 bits per byte.
    scores = score_choices({"choices": ["a", "über"], "gold": 1}, results(3, 20))
    assert scores["bits_per_byte"] == pytest.approx(4.0)


def test_accuracies_differ_by_their_normalization():
    # 4 characters, 8 bytes, 2 tokens each way: raw 12 < 14; per character 3 < 3.5; per byte 1.5 < 1.75
    doc = {"choices": ["öööö", "abcdefg"], "gold": 1}
    with token_counter({" öööö": 4, " abcdefg": 2}.__getitem__):
        scores = score_choices(doc, results(12, 14))
    # raw: 12 bits beat 14; per character: 12/4 = 3 against 14/7 = 2; per byte: 12/8 = 1.5 against 2;
    # per token: 12/4 = 3 against 14/2 = 7
    assert {name: value for name, value in scores.items() if name != "bits_per_byte"} == {
        "acc": 0.0,
        "acc_norm": 1.0,
        "acc_bytes": 0.0,
        "acc_tokens": 0.0,
    }


def test_without_a_token_counter_there_is_no_accuracy_per_token():
    assert "acc_tokens" not in score_choices({"choices": ["a", "b"], "gold": 0}, results(1, 2))


def test_mutual_information_subtracts_what_the_answer_costs_without_the_question():
    # With the question 5 and 6 bits, without it 5 and 12: the question explains 0 and 6 bits.
    scores = score_choices({"choices": ["yes", "no"], "gold": 1}, results(5, 6, 5, 12))
    assert (scores["acc"], scores["acc_mutual_info"]) == (0.0, 1.0)


def test_equal_values_count_for_the_first_choice():
    assert score_letters({"gold": 0}, results(2, 2))["acc"] == 1.0
    assert score_letters({"gold": 1}, results(2, 2))["acc"] == 0.0


def test_letters_have_one_byte():
    assert score_letters({"gold": 1}, results(2, 3)) == {"bits_per_byte": pytest.approx(3.0), "acc": 0.0}


def test_correct_answers_are_averaged():
    # 8 bits over 4 bytes, 3 bits over 1 byte
    assert score_answers({"choices": ["four", "1"]}, results(8, 3)) == {"bits_per_byte": pytest.approx(2.5)}


@pytest.mark.parametrize(
    ("text", "number", "right"),
    [
        (" 4,000 apples", "4000", 1.0),
        (" It is 21.90.", "21.9", 1.0),
        (" -3", "3", 0.0),
        (" 12 and 9", "9", 0.0),
        (" none", "9", 0.0),
        ("", "9", 0.0),
    ],
)
def test_numbers_are_compared_by_value(text, number, right):
    assert score_number({"number": number}, [text]) == {"exact_match": right}


def test_programs_are_run_with_their_tests():
    doc = {"prompt": "def two():\n", "test": "def check(f):\n    assert f() == 2\n\ncheck(two)\n"}
    with pytest.raises(UserError, match="allow-code-execution"):
        score_program(doc, ["    return 2\n"])
    with allow_code_execution():
        assert score_program(doc, ["    return 2\n"]) == {"pass@1": 1.0}
        assert score_program(doc, ["    return 3\n"]) == {"pass@1": 0.0}
