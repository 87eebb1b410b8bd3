"""The verifier: exact comparison, math-verify's verdicts on awkward answers, and a pool that nothing can hang."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction

import psutil
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

ENDLESS = "2^{3000000000}"


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    """One pool for many tests: whatever one of them does to its worker, the next one must find a pool that works."""
    with VerifierPool(VerifierConfig(timeout_s=1.0)) as pool:
        yield pool


@pytest.fixture
def worker(pool: VerifierPool) -> psutil.Process:
    """The worker of the pool, started and idle."""
    assert reasons_of(pool.verify([(boxed("x+1"), "1+x")])) == ["correct"]
    (worker,) = workers()
    return worker


def patient_verdicts(items: list[tuple[str, str]]) -> list[Verdict]:
    """For what the verdicts are, not for their time: the deadline is far beyond what they take."""
    with VerifierPool(VerifierConfig(timeout_s=60.0)) as pool:
        return pool.verify(items)


def boxed(answer: str) -> str:
    return rf"So the answer is $\boxed{{{answer}}}$."


def reasons_of(verdicts: list[Verdict]) -> list[str]:
    return [verdict.reason for verdict in verdicts]


def workers() -> list[psutil.Process]:
    """Those that live. Servers of other tests may be children of this process too, with dead ones of their own."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE
        and "from reval_mcore.verifiers import serve" in " ".join(child.cmdline())
    ]


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


# ---------------------------------------------------------------- deadlines, deaths, leftovers


@pytest.mark.parametrize(
    "answer",
    ["2^(3*10^9)", "{" * 10_000 + "1" + "}" * 10_000, "{" * 900 + "1" + "}" * 900, "x" * 10**6],
    ids=["power", "10000_braces", "900_braces", "megabyte"],
)
@pytest.mark.usefixtures("worker")  # its start is not what is measured
def test_a_hostile_answer_costs_one_deadline_at_most(pool: VerifierPool, answer: str) -> None:
    before = time.monotonic()
    (verdict,) = pool.verify([(boxed(answer), "7")])
    assert time.monotonic() - before < 4.0  # a deadline of 1 s, and room for a busy machine
    assert verdict.reason in ("wrong", "timeout")
    assert verdict.reward == 0.0
    assert len(verdict.answer) <= 200
    assert reasons_of(pool.verify([(boxed("x+2"), "2+x")])) == ["correct"]
    assert len(workers()) == 1


@pytest.mark.usefixtures("worker")
def test_equal_hostile_answers_cost_one_deadline_together(pool: VerifierPool) -> None:
    before = time.monotonic()
    verdicts = pool.verify([(boxed(ENDLESS), "7"), (boxed("x+1"), "1+x")] * 16)
    assert reasons_of(verdicts) == ["timeout", "correct"] * 16
    assert time.monotonic() - before < 8.0  # sixteen deadlines would take longer


def test_workers_work_side_by_side() -> None:
    elsewhere = workers()
    with VerifierPool(VerifierConfig(timeout_s=1.0, num_workers=2)) as pool:
        verdicts = pool.verify([(boxed(answer), "7+x") for answer in (ENDLESS, "x+7", "x+8", "7 + x")])
        assert reasons_of(verdicts) == ["timeout", "correct", "wrong", "correct"]
        assert len(workers()) == len(elsewhere) + 2
    assert workers() == elsewhere


def test_starting_takes_nothing_from_the_deadline() -> None:
    with VerifierPool(VerifierConfig(timeout_s=0.2)) as pool:  # a worker takes longer than that to start
        assert reasons_of(pool.verify([(boxed("x+1"), "1+x")])) == ["correct"]


def test_a_worker_that_dies_by_itself_is_an_error_and_replaced() -> None:
    elsewhere = workers()
    with VerifierPool(VerifierConfig(timeout_s=60.0)) as pool:
        pool.verify([(boxed("x+1"), "1+x")])
        (worker,) = (process for process in workers() if process not in elsewhere)
        killer = threading.Timer(0.2, worker.kill)
        killer.start()
        verdicts = pool.verify([(boxed(ENDLESS), "7"), (boxed("x+2"), "2+x")])
        killer.join()
    assert reasons_of(verdicts) == ["error", "correct"]


def test_a_worker_that_dies_while_idle_costs_no_verdict(pool: VerifierPool, worker: psutil.Process) -> None:
    worker.kill()
    while worker.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert reasons_of(pool.verify([(boxed("x+2"), "2+x")])) == ["correct"]


def test_signals_to_the_whole_job_leave_workers_working(pool: VerifierPool, worker: psutil.Process) -> None:
    worker.terminate()
    assert reasons_of(pool.verify([(boxed("x+2"), "2+x")])) == ["correct"]
    assert workers() == [worker]


def test_workers_that_never_start_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = workers()
    pool = VerifierPool(VerifierConfig())
    monkeypatch.setattr("reval_mcore.verifiers._WORKER_PROGRAM", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="do not start"):
        pool.verify([(boxed("x+1"), "1+x")])
    assert workers() == elsewhere


@pytest.mark.usefixtures("worker")
def test_close_leaves_no_process_and_the_pool_can_be_used_again(pool: VerifierPool) -> None:
    pool.close()
    assert workers() == []
    assert reasons_of(pool.verify([(boxed("x+1"), "1+x")])) == ["correct"]


@pytest.mark.parametrize("last_words", ["os.kill(os.getpid(), 9)", f"pool.verify([(box('{ENDLESS}'), '7')])"])
def test_workers_do_not_outlive_a_killed_parent(last_words: str) -> None:
    """Killed between verdicts, or with a worker in the middle of an endless answer."""
    code = f"""if True:
        import os, psutil
        from reval_mcore.config import VerifierConfig
        from reval_mcore.verifiers import VerifierPool
        box = "\\\\boxed{{{{{{}}}}}}".format
        pool = VerifierPool(VerifierConfig(timeout_s=0.3))
        pool.verify([(box("x+1"), "1+x")])
        print(psutil.Process().children()[0].pid, flush=True)
        {last_words}
    """
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.3)
        parent.kill()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running()


@given(
    st.text(st.sampled_from("+-0123456789./ \n\t\u00a0\u2009{}\\frac,$"), max_size=30),
    st.sampled_from(["5", "-5", "0.5"]),
)
def test_no_answer_makes_the_comparison_fail(answer: str, truth: str) -> None:
    assert compare_exactly(answer, truth) in (True, False, None)


@pytest.mark.parametrize("answer", ["-\n5", "-\t5", "- 5", "-\u00a05", "\\frac{-\n10}{2}"])
def test_white_space_of_any_kind_may_stand_in_a_number(answer: str) -> None:
    assert compare_exactly(answer, "-5") is True
