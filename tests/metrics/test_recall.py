"""Normalized answers."""

import pytest

from lightning_curvature.metrics import RecallAccuracy
from lightning_curvature.metrics import functional as F


# Answers
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel\n\tTower.", "eiffel tower"),
        ("a cat, an owl & the theory", "cat owl theory"),
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ("\u201c\uff2f\uff53\uff4c\uff4f\u201d\u00a0\u2163", "oslo iv"),
        ("it\u2019s it's", "its its"),
        ("Ärger \ufb01n", "ärger fin"),
        ("$1,000", "1000"),
        ("THE", ""),
        ("", ""),
    ],
)
def test_normalize_answer(text, expected):
    assert F.normalize_answer(text) == expected
    assert F.normalize_answer(expected) == expected


@pytest.mark.parametrize(
    ("preds", "answers", "message"),
    [
        (["Oslo"], ["Oslo"], r"answers\[0\] must be a list .* found the string 'Oslo'\. Write \['Oslo'\]"),
        (["Oslo", "Nile"], [["Oslo"], []], r"answers\[1\] is empty, .* leave the question out"),
        (["Oslo"], [], "found 1 predictions and 0 lists of answers"),
        ("Oslo", [["Oslo"]] * 4, "preds must be a list with one entry for each question, found the string 'Oslo'"),
        (["Oslo"], "O", "answers must be a list .* found the string 'O'"),
        ([7], [["Oslo"]], r"Expected an answer as a string, found 7\. Decode token ids first"),
        (["Oslo"], [[b"Oslo"]], "found b'Oslo'"),
    ],
)
def test_answers_are_checked(preds, answers, message):
    for call in (F.recall_accuracy, RecallAccuracy().update):
        with pytest.raises(ValueError, match=message):
            call(preds, answers)
