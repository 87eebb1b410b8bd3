"""The verifier: the last box, exact comparison, and math-verify's verdicts on awkward answers."""

import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reval_mcore.config import VerifierConfig
from reval_mcore.verifiers import (
    MAX_ANSWER_CHARS,
    VERIFIER_VERSION,
    Verdict,
    VerifierPool,
    compare_exactly,
    count_reasons,
    last_boxed,
)
from tests.verifying import boxed, reasons_of, workers


def patient_verdicts(items: list[tuple[str, str]]) -> list[Verdict]:
    """For what the verdicts are, not for their time: the deadline is far beyond what they take."""
    with VerifierPool(VerifierConfig(timeout_s=60.0)) as pool:
        return pool.verify(items)


# ---------------------------------------------------------------- the last box


def slow_last_boxed(text: str) -> str | None:
    """The same by trying each end for the last start: count the braces that no backslash escapes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    for end in range(start, len(text)):
        bare = text[start : end + 1].replace("\\\\", "").replace("\\{", "").replace("\\}", "")
        if bare.endswith("}") and bare.count("}") == bare.count("{") + 1:
            return text[start:end]
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\}", "\\\\", "7", " x "]), max_size=30).map("".join))
def test_last_boxed_agrees_with_a_slow_search(text: str) -> None:
    assert last_boxed(text) == slow_last_boxed(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no box, 42", None),
        (r"\boxed{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{3} wait, \boxed{7}", "7"),
        (r"\boxed{3} wait, \boxed{7", None),  # cut off: the first was about to be taken back
        (r"\boxed 7", None),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace opens no group
        (r"\boxed{a \\} b}", r"a \\"),  # here the backslash is the escaped one
        (r"\boxed{}", ""),
        ("\\boxed{7\n}", "7\n"),
    ],
)
def test_last_boxed(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


# ---------------------------------------------------------------- exact comparison

integers = st.integers(-(10**30), 10**30)


@given(integers, integers)
def test_integers_are_settled_however_they_are_written(a: int, b: int) -> None:
    for form in (f"{a}", f"{a:+d}", f"${a}$", f" {a} ", f"{a:,}", f"{a:040d}", f"{a:,}".replace(",", "{,}")):
        assert compare_exactly(form, str(b)) is (a == b)
        assert compare_exactly(form, str(a)) is True


@given(st.integers(-99, 99), st.integers(1, 99), st.integers(-99, 99), st.integers(1, 99))
def test_fractions_are_settled_however_they_are_written(p: int, q: int, r: int, s: int) -> None:
    sign = "-" if p < 0 else ""
    for form in (
        f"{p}/{q}",
        rf"\frac{{{p}}}{{{q}}}",
        rf"{sign}\dfrac{{{abs(p)}}}{{{q}}}",
        rf"$\tfrac{{{-p}}}{{{-q}}}$",
    ):
        assert compare_exactly(form, f"{r}/{s}") is (Fraction(p, q) == Fraction(r, s))


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_equal_to_itself_and_breaks_nothing(a: str, b: str) -> None:
    assert compare_exactly(a, f" {a} ") is True
    compare_exactly(a, b)


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("0.5", r"\frac{1}{2}", True),
        (".50", "1/2", True),
        ("0.333333", "1/3", None),  # tolerance is math-verify's
        ("3", "2.5", None),
        (r"10,\!000", "10000", True),
        ("1,00", "100", None),  # a list, maybe
        ("1, 234", "1234", None),
        ("- 5", "-5", True),
        ("--5", "5", None),
        ("1/0", "1/0", True),
        ("1/0", "7", None),
        (r"\frac{1}{0}", "7", None),
        ("$$7$$", "7", True),
        ("7", r"\boxed{7}", True),
        ("7", r"$\boxed{8}$", False),
        ("x+1", "1+x", None),
        ("\u0663", "3", None),  # a digit, but not one of ours
        ("9" * 400, "9" * 401, None),
        ("", "", True),
    ],
)
def test_compare_exactly(answer: str, truth: str, same: bool | None) -> None:
    assert compare_exactly(answer, truth) is same


@given(
    st.text(st.sampled_from("+-0123456789./ \n\t\u00a0\u2009{}\\frac,$"), max_size=30),
    st.sampled_from(["5", "-5", "0.5"]),
)
def test_no_answer_makes_the_comparison_fail(answer: str, truth: str) -> None:
    assert compare_exactly(answer, truth) in (True, False, None)


@pytest.mark.parametrize("answer", ["-\n5", "-\t5", "- 5", "-\u00a05", "\\frac{-\n10}{2}"])
def test_white_space_of_any_kind_may_stand_in_a_number(answer: str) -> None:
    assert compare_exactly(answer, "-5") is True


# ---------------------------------------------------------------- what needs no worker


def test_integer_answers_start_no_worker() -> None:
    elsewhere = workers()
    pool = VerifierPool(VerifierConfig())
    verdicts = pool.verify([(boxed(str(i)), str(i - i % 2)) for i in range(500)])
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0] * 250
    assert count_reasons(verdict.reason for verdict in verdicts) == {
        "correct": 250,
        "wrong": 250,
        "no_answer": 0,
        "timeout": 0,
        "error": 0,
    }
    assert workers() == elsewhere


def test_no_answer_and_very_long_answers_start_no_worker() -> None:
    elsewhere = workers()
    pool = VerifierPool(VerifierConfig())
    long = "x" * (MAX_ANSWER_CHARS + 1)
    texts = ["I do not know", r"\boxed{ }", r"\boxed{7", boxed(long), boxed(long)]
    verdicts = pool.verify(list(zip(texts, ["7", "7", "7", "7", long], strict=True)))
    assert reasons_of(verdicts) == ["no_answer", "no_answer", "no_answer", "wrong", "correct"]
    assert [verdict.answer for verdict in verdicts] == ["", "", "", "x" * 200, "x" * 200]
    assert workers() == elsewhere


@pytest.mark.parametrize(
    "text",
    ["x", "{", "$", "9", "1,", "-+", "\\", "\\boxed", "\\boxed{", "\\boxed{}", "\\boxed "],
)
def test_a_megabyte_of_anything_starts_no_worker(text: str) -> None:
    """Nor does it take more than linear time: the session's time limit would say so."""
    elsewhere = workers()
    pool = VerifierPool(VerifierConfig())
    hostile = text * (10**6 // len(text))
    for verdict in pool.verify([(hostile, "7"), (boxed(hostile), "7"), (hostile + boxed("8"), hostile)]):
        assert verdict.reason in ("wrong", "no_answer")
        assert len(verdict.answer) <= 200
    assert workers() == elsewhere


def test_nothing_to_verify() -> None:
    assert VerifierPool(VerifierConfig()).verify([]) == []


def test_version_names_the_judge() -> None:
    assert "math-verify-0." in VERIFIER_VERSION


def test_workers_import_neither_torch_nor_numpy_nor_the_configuration() -> None:
    code = "import sys, reval_mcore.verifiers; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- math-verify's verdicts

RIGHT = [
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False),  # math-verify alone: True
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False),  # math-verify alone: True
    (r"\frac{1}{2^{99}}", r"2^{-99}", True),
    ("n=2, 3, 4", "n=1, 2, 3", False),
    ("D = (0, 1)", "D = (0, 1.5)", False),
    ("12:00", "1:00", False),
    (r"\pm 2021", "2021", False),
    (r"\text{13}", "13", True),
    ("2x+4y-3=0", r"y = -\frac{1}{2}x + \frac{3}{4}", True),
    (r"30^\circ", "30", True),
    (r"2\frac{1}{2}", "2.5", True),
    (r"\frac{1}{3}", "0.333333", True),
    ("5", r"5 \text{ cm}", True),
    ("B", r"\text{(B)}", True),
    ("7", r"3 \text{ or } 7", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
    ("4", r"4\sqrt(2)", False),
    ("x>3", r"(3,\infty)", True),
    ("1<x<2", "1 < x < 2", True),
    (r"\text{Evelyn}", "Evelyn", True),
    (r"$x^2-1$", "(x-1)(x+1)", True),
    (r"3\sqrt{2}+1", r"1+\sqrt{18}", True),
    ("42", "so we have 42 apples", False),
]
A_MATTER_OF_CHOICE = [(r"50\%", "0.5", True), ("50", r"50\%", True), ("10110_2", "10110", True)]
KNOWN_TO_BE_WRONG = [
    ("(1,2)", r"\{1,2\}", True),  # an ordered pair is not a set
    ("Evelyn", "nylevE", True),  # words without \text are products of letters
]


def test_verdicts_on_awkward_answers() -> None:
    """A record of what the verifier says: a new math-verify that says something else shows up here."""
    cases = RIGHT + A_MATTER_OF_CHOICE + KNOWN_TO_BE_WRONG
    verdicts = patient_verdicts([(boxed(answer), truth) for truth, answer, _ in cases])
    said = [(truth, answer, verdict.reason) for (truth, answer, _), verdict in zip(cases, verdicts, strict=True)]
    assert said == [(truth, answer, "correct" if good else "wrong") for truth, answer, good in cases]


def test_what_reaches_the_worker() -> None:
    """The last box alone; any characters at all; and a truth that says nothing is not the model's fault."""
    items = [
        (r"\boxed{3} wait, \boxed{x+7}", "7+x"),
        (r"\boxed{x+7} wait, \boxed{3}", "7+x"),
        (boxed("x"), ""),
        *((boxed(f"a{character}b"), "x+1") for character in ("\ud800", "\x00", "\u2028", "\n\n", "'\"", "\\")),
    ]
    assert reasons_of(patient_verdicts(items)) == ["correct", "wrong", "error"] + ["wrong"] * 6
