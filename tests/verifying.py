"""Answers, verdicts, and the processes that give them."""

from __future__ import annotations

import psutil

from reval_mcore.verifiers import Verdict


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
