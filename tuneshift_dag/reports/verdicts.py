"""What `evaluation` found, in words: whether the target has the skill, and whether it kept what it knew."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tuneshift_dag.config.schema import Evaluation
from tuneshift_dag.method.statistics import bootstrap_share


@dataclass(frozen=True)
class Verdict:
    """The outcome of one asset check of ``evaluation``."""

    name: str
    passed: bool
    words: str


def verdicts(
    answers: Iterable[Mapping[str, Any]], retained: Iterable[Mapping[str, Any]], settings: Evaluation, seed: int
) -> list[Verdict]:
    """From rows of the tables ``evaluations`` and ``retention``; without held-out answers none on the skill."""
    correct: dict[str, list[bool]] = {}
    for row in sorted(answers, key=lambda row: str(row["prompt_id"])):
        correct.setdefault(row["model"], []).append(bool(row["correct"]))
    perplexity = {row["model"]: float(row["perplexity"]) for row in retained}
    ratio = perplexity["target_distilled"] / perplexity["target_base"]
    skill = [_skill(correct, settings, seed)] if correct else [Verdict("keeps_skill", True, "No held-out file.")]
    most = settings.keeps_general_text
    words = (
        f"General text: {ratio:.2f} times the perplexity of the target before it was tuned;"
        f" evaluation.keeps_general_text allows {most:g}."
    )
    return [*skill, Verdict("keeps_general_text", ratio <= most, words)]


def _skill(correct: Mapping[str, list[bool]], settings: Evaluation, seed: int) -> Verdict:
    least = settings.keeps_skill
    share = bootstrap_share(correct["target_distilled"], correct["source_fine_tuned"], settings.bootstrap_samples, seed)
    if share is None:
        words = "Skill: the source answers no held-out prompt right, so nothing can be said of the target."
        return Verdict("keeps_skill", False, words)
    words = (
        f"Skill: {share.value:.2f} of the source's held-out accuracy (95 % interval {share.low:.2f} to"
        f" {share.high:.2f}); evaluation.keeps_skill asks for {least:g}."
    )
    return Verdict("keeps_skill", share.value >= least, words)
