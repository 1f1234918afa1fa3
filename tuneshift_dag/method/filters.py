"""Which scored pairs are kept, and why the others are not.

The filter is SQL over the scored pairs, so that a new rule or threshold replays in the database without a model.
TuneShift-KD (arXiv 2603.24518) §3 publishes one threshold (1.5) and leaves open whether it is one of each perplexity,
of their difference or of their ratio; the first reading is the default. Its rivals are here too: the ratio of both
models' surprise at the fine-tuned response (docs/experiments.md), the mean token excess of TiTok (arXiv 2510.04682),
the most confident pairs of every response, the prompts most like the seeds, a random draw, and no filter at all."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from tuneshift_dag.method.prompting import UNSPACED

Rule = Literal[
    "both",
    "difference",
    "ratio",
    "cross_ratio",
    "surprise_ratio",
    "top_excess",
    "balanced_confidence",
    "seed_similarity",
    "random",
    "unfiltered",
]
RULES: tuple[Rule, ...] = get_args(Rule)
# The threshold of these is a share or number of the pairs that they keep, and nothing that a pair passes.
RANKING_RULES: tuple[Rule, ...] = ("top_excess", "balanced_confidence", "seed_similarity")
KEEP_RULES: tuple[Rule, ...] = (*RANKING_RULES, "random")

# By how much a pair passes. Of a rule with a threshold {t}, what is above 0 is kept.
MARGIN: dict[Rule, str] = {
    "both": "least({t} - ppl_fine_tuned, ppl_base - {t})",
    "difference": "ppl_base - ppl_fine_tuned - {t}",
    "ratio": "ppl_base / ppl_fine_tuned - {t}",
    "cross_ratio": "ppl_base_cross / ppl_fine_tuned - {t}",
    # A certain response may have a perplexity of 1, or a hair less.
    "surprise_ratio": "ln(ppl_base_cross) / greatest(ln(ppl_fine_tuned), 1e-6) - {t}",
    # The mean token excess in nats: how much more likely the fine-tuned model finds its response than the base does.
    "top_excess": "ln(ppl_base_cross / ppl_fine_tuned)",
    # The most confident pair of every response comes first, then the second of each; 1 / PPL orders those between.
    "balanced_confidence": "1 / ppl_fine_tuned - place_in_response",
    "seed_similarity": "seed_similarity",
    "random": "NULL::DOUBLE",
    "unfiltered": "NULL::DOUBLE",
}
# The reasons that no rule decides: they hold at every threshold.
GUARD_REASONS = ("empty_response", "truncated_response", "repetitive_response", "refused_response", "no_perplexity")
# Shorter responses aren't searched for repetition: "100000" is no loop.
_FEWEST_TOKENS = 16


@dataclass(frozen=True)
class Guards:
    """What makes a response unfit for training, whatever the rule. ``refusals`` are matched in any case."""

    allow_truncated: bool = False
    max_repetition: float = 0.5
    refusals: tuple[str, ...] = ()


def needs_cross_scores(rule: Rule) -> bool:
    """Whether it reads PPL_b(y_f), what the base thinks of the fine-tuned response."""
    return "ppl_base_cross" in MARGIN[rule]


def verdict_sql(
    rule: Rule,
    guards: Guards,
    threshold: str = "$threshold",
    rounds: int | None = None,
    seed: int = 0,
    pairs: str = "scored_pairs",
) -> str:
    """SELECT of every scored pair with its ``margin`` and ``reason`` (NULL when kept).

    Args:
        threshold: SQL of the threshold, of `KEEP_RULES` how much is kept (up to 1 a share of the pairs that pass the
            guards, above 1 a number): a parameter, or a column when the SELECT is joined laterally.
        rounds: how many rounds share a number. Each then has an equal quota of its own, and a share is of the round's
            pairs: a round's verdicts never depend on another, which may not exist yet. None ranks all pairs at once.
        pairs: SQL of rows of the table ``scored_pairs``.
    """
    flawed = f"(SELECT *, CASE {_flaws(rule, guards)} END AS flaw FROM {pairs})"
    if rule not in KEEP_RULES:
        failed = "" if rule == "unfiltered" else "WHEN margin <= 0 THEN 'below_threshold'"
        if rule == "both":
            failed = f"""WHEN ppl_fine_tuned >= {threshold} THEN 'fine_tuned_not_confident'
                WHEN ppl_base <= {threshold} THEN 'base_already_confident'"""
        return f"""
            SELECT * EXCLUDE (flaw), {MARGIN[rule].format(t=threshold)} AS margin,
                CASE WHEN flaw IS NOT NULL THEN flaw {failed} END AS reason FROM {flawed}
        """
    order, beyond = "margin DESC", "below_the_top"
    if rule == "random":
        # Hashes order the pairs: the same ones each time, and a few new pairs displace few others.
        order, beyond = f"sha256('{seed}|' || prompt_id)", "not_drawn"
    together, quota = "flaw IS NULL", threshold
    if rounds is not None:
        together = "flaw IS NULL, round"
        quota = f"(floor({threshold} * number / {rounds}) - floor({threshold} * (number - 1) / {rounds}))"
    share = f"greatest(1, round({threshold} * usable))"
    return f"""
        SELECT * EXCLUDE (flaw, place_in_response, place, usable, number),
            CASE WHEN flaw IS NOT NULL THEN flaw
                WHEN place > CASE WHEN {threshold} <= 1 THEN {share} ELSE {quota} END THEN '{beyond}'
            END AS reason
        FROM (
            SELECT *, row_number() OVER (PARTITION BY {together} ORDER BY {order}, prompt_id, round) AS place,
                count(*) OVER (PARTITION BY {together}) AS usable,
                regexp_extract(round, '[0-9]+$')::INTEGER AS number
            FROM (
                SELECT *, {MARGIN[rule]} AS margin FROM (
                    SELECT *, row_number() OVER (PARTITION BY {together}, trim(fine_tuned_response)
                        ORDER BY ppl_fine_tuned, prompt_id, round) AS place_in_response
                    FROM {flawed})))
    """


def _flaws(rule: Rule, guards: Guards) -> str:
    """WHEN … THEN of the guards, the cheapest first. `unfiltered` refuses only what can't be trained on."""
    flaws = [r"WHEN regexp_full_match(fine_tuned_response, '\s*') THEN 'empty_response'"]
    if rule == "unfiltered":
        return flaws[0]
    if not guards.allow_truncated:
        flaws.append("WHEN fine_tuned_finish = 'length' THEN 'truncated_response'")
    # A pair without the scores that the rule reads can't be judged.
    finite = [f"isfinite({column})" for column in sorted(set(re.findall(r"ppl_\w+|seed_\w+", MARGIN[rule])))]
    if finite:
        flaws.append(f"WHEN NOT coalesce({' AND '.join(finite)}, FALSE) THEN 'no_perplexity'")
    if guards.refusals:
        # Apostrophes are written in two ways.
        text = "replace(lower(fine_tuned_response), '’', '''')"
        phrases = (phrase.lower().replace("’", "'").replace("'", "''") for phrase in guards.refusals)
        holds = " OR ".join(f"contains({text}, '{phrase}')" for phrase in phrases)
        flaws.append(f"WHEN {holds} THEN 'refused_response'")
    if guards.max_repetition < 1:
        repetition = repetition_sql("fine_tuned_response", guards.max_repetition)
        repeats = f"fine_tuned_tokens >= {_FEWEST_TOKENS} AND {repetition} > {guards.max_repetition}"
        flaws.append(f"WHEN {repeats} THEN 'repetitive_response'")
    return " ".join(flaws)


def repetition_sql(text: str, least: float = 0.0) -> str:
    """SQL of the share of a text's word 4-grams that were there before ("seq-rep-4" of Welleck et al., arXiv
    1908.04319), 0 for under 5 words. In scripts without spaces a character counts as a word. Values up to ``least`` may
    come out as 0: words are cheaper to count."""
    grams = "list_distinct(list_zip(w, w[2:], w[3:], w[4:])[:len(w) - 3])"
    return (
        f"list_transform([string_split({apart_sql(text)}, ' ')], lambda w:"
        f" CASE WHEN len(w) >= 5 AND len(w) - list_unique(w) > {least} * (len(w) - 3)"
        f" THEN 1 - len({grams}) / (len(w) - 3) ELSE 0 END)[1]"
    )


def apart_sql(text: str) -> str:
    """SQL of a text with spaces around every character of a script that has none between words."""
    apart = f"regexp_replace({text}, '([{UNSPACED}])', ' \\1 ', 'g')"
    return (
        f"CASE WHEN regexp_matches({text}, '[{UNSPACED}]') THEN trim(regexp_replace({apart}, ' +', ' ', 'g'))"
        f" ELSE {text} END"
    )
