"""SQL that assets, reports and people share: the views of every transfer, and the filter's verdicts on its pairs."""

import hashlib
from dataclasses import dataclass

from tuneshift_dag.config import Transfer
from tuneshift_dag.method.filters import Rule, apart_sql, repetition_sql, verdict_sql
from tuneshift_dag.store.tables import FILTERED_DATASET, SCORED_PAIRS, SYNTHETIC_PROMPTS


@dataclass(frozen=True)
class View:
    """A query that people can read like a table; it holds no rows of its own. docs/lineage.md has its columns."""

    name: str
    description: str
    query: str

    @property
    def comment(self) -> str:
        """What the database shows beside the view; it changes with the query."""
        return f"{self.description} [{hashlib.sha256(self.query.encode()).hexdigest()[:8]}]"

    def ddl(self) -> str:
        """For a connection whose schema is the transfer's: the query doesn't name the schema of its tables."""
        comment = self.comment.replace("'", "''")
        return f"CREATE OR REPLACE VIEW {self.name} AS {self.query}; COMMENT ON VIEW {self.name} IS '{comment}'"


def of_its_rounds(transfer: Transfer, table: str) -> str:
    """SQL of a table's rows of the rounds that there are; those of others stay in it when ``rounds`` is lowered."""
    return f"(SELECT * FROM {table} WHERE round <= '{transfer.round_keys[-1]}')"


def verdicts(
    transfer: Transfer,
    rule: Rule | None = None,
    threshold: float | str | None = None,
    by_round: bool = True,
    pairs: str = "",
) -> str:
    """`tuneshift_dag.method.filters.verdict_sql` of a transfer, with its own rule and threshold (a number, or SQL) if
    none are named; of the rows of ``pairs``, else of all scored pairs."""
    config = transfer.config
    value = config.filter.threshold if threshold is None else threshold
    sql = value if isinstance(value, str) else f"{value!r}::DOUBLE"
    pairs = pairs or of_its_rounds(transfer, SCORED_PAIRS.name)
    rounds = config.rounds if by_round else None
    return verdict_sql(rule or config.filter.rule, transfer.guards, sql, rounds, config.seed, pairs)


# Recursion is over generator calls, not prompts: prompts of one call share their ancestors, so there are
# some hundred times fewer of them. USING KEY keeps the nearest way to each call and ends when no new call
# is met, also where a round that was grown anew is seeded by prompts that it led to (a cycle).
LINEAGE = View(
    "lineage",
    "Where a prompt came from: step by step back through generator calls and their seeds to the seed set.",
    """
    WITH RECURSIVE shown AS (
        SELECT proposal_id, unnest(seed_ids) AS prompt_id FROM proposals
    ),
    calls (root_call, proposal_id, depth) USING KEY (root_call, proposal_id) AS (
        SELECT DISTINCT proposal_id, proposal_id, 1 FROM proposals
        UNION
        SELECT near.root_call, writer.proposal_id, min(near.depth) + 1
        FROM calls near
        JOIN shown ON shown.proposal_id = near.proposal_id
        JOIN synthetic_prompts writer ON writer.prompt_id = shown.prompt_id
        LEFT JOIN recurring.calls known
            ON known.root_call = near.root_call AND known.proposal_id = writer.proposal_id
        WHERE known.root_call IS NULL
        GROUP BY near.root_call, writer.proposal_id
    ),
    seeds AS (
        SELECT DISTINCT root.prompt_id AS root_prompt_id, root.proposal_id AS root_call, calls.depth,
            shown.prompt_id, calls.proposal_id
        FROM synthetic_prompts root
        JOIN calls ON calls.root_call = root.proposal_id
        JOIN shown ON shown.proposal_id = calls.proposal_id
    )
    SELECT prompt_id AS root_prompt_id, 0 AS depth, 'seed' AS kind, prompt_id AS id, NULL::VARCHAR AS led_to,
        NULL::VARCHAR AS round, prompt AS text
    FROM seed_set
    UNION ALL
    SELECT prompt_id, 0, 'prompt', prompt_id, NULL, round, prompt FROM synthetic_prompts
    UNION ALL
    SELECT root.prompt_id, 1, 'call', proposal_id, root.prompt_id, proposals.round, proposals.text
    FROM synthetic_prompts root JOIN proposals USING (proposal_id)
    UNION ALL
    SELECT seeds.root_prompt_id, seeds.depth,
        CASE WHEN s.prompt_id IS NOT NULL THEN 'seed' WHEN p.prompt_id IS NOT NULL THEN 'prompt' ELSE 'gone' END,
        seeds.prompt_id, seeds.proposal_id, CASE WHEN s.prompt_id IS NULL THEN p.round END,
        coalesce(s.prompt, p.prompt)
    FROM seeds
    LEFT JOIN seed_set s ON s.prompt_id = seeds.prompt_id
    LEFT JOIN synthetic_prompts p ON p.prompt_id = seeds.prompt_id
    UNION ALL
    SELECT DISTINCT seeds.root_prompt_id, calls.depth, 'call', calls.proposal_id, seeds.prompt_id, proposals.round,
        proposals.text
    FROM seeds
    JOIN synthetic_prompts p ON p.prompt_id = seeds.prompt_id
    JOIN calls ON calls.root_call = seeds.root_call AND calls.proposal_id = p.proposal_id
    JOIN proposals ON proposals.proposal_id = p.proposal_id
    WHERE seeds.prompt_id <> seeds.root_prompt_id
    """,
)
# `steps` knows the rounds that ran and had nothing to do. A geometric mean, because a few confused
# answers have perplexities of thousands; it is exp of the mean loss.
ROUND_SUMMARY = View(
    "round_summary",
    "What each round did and brought.",
    f"""
    WITH rounds AS (
        SELECT round FROM steps WHERE round IS NOT NULL UNION SELECT round FROM proposals
        UNION SELECT round FROM synthetic_prompts UNION SELECT round FROM scored_pairs
    ),
    calls AS (SELECT round, count(*) AS n FROM proposals GROUP BY round),
    prompts AS (SELECT round, count(*) AS n FROM synthetic_prompts GROUP BY round),
    dropped AS (SELECT round, count(*) AS n FROM rejected_prompts GROUP BY round),
    scored AS (
        SELECT round, count(*) AS n,
            exp(avg(ln(ppl_fine_tuned)) FILTER (isfinite(ppl_fine_tuned))) AS fine_tuned,
            exp(avg(ln(ppl_base)) FILTER (isfinite(ppl_base))) AS base
        FROM scored_pairs GROUP BY round
    ),
    kept AS (
        SELECT round, count(*) AS n, count(DISTINCT trim(response)) AS responses FROM filtered_dataset GROUP BY round
    ),
    fresh AS (
        SELECT round, count(*) AS n
        FROM (SELECT min(round) AS round FROM filtered_dataset GROUP BY trim(response)) GROUP BY round
    ),
    words AS (
        SELECT round, string_split(trim(regexp_replace(regexp_replace(lower({apart_sql("prompt")}), '[''’]', '', 'g'),
            '[\\s.,;:!?"“”‘…()\\[\\]]+', ' ', 'g')), ' ') AS w
        FROM synthetic_prompts
    ),
    bigrams AS (
        SELECT round, count(DISTINCT bigram) / count(*) AS share
        FROM (SELECT round, unnest(list_zip(w, w[2:])[:len(w) - 1]) AS bigram FROM words) GROUP BY round
    ),
    loops AS (SELECT round, avg({repetition_sql("prompt")}) AS share FROM synthetic_prompts GROUP BY round)
    SELECT round, coalesce(calls.n, 0) AS generator_calls, coalesce(prompts.n, 0) AS prompts,
        coalesce(dropped.n, 0) AS rejected_prompts, coalesce(scored.n, 0) AS scored, coalesce(kept.n, 0) AS kept,
        coalesce(kept.n, 0) / scored.n AS kept_share, coalesce(kept.responses, 0) AS distinct_responses,
        coalesce(fresh.n, 0) AS new_responses, scored.fine_tuned AS mean_ppl_fine_tuned, scored.base AS mean_ppl_base,
        bigrams.share AS distinct_bigrams, loops.share AS repetition, round_similarity.similarity
    FROM rounds LEFT JOIN calls USING (round) LEFT JOIN prompts USING (round) LEFT JOIN dropped USING (round)
        LEFT JOIN scored USING (round) LEFT JOIN kept USING (round) LEFT JOIN fresh USING (round)
        LEFT JOIN bigrams USING (round) LEFT JOIN loops USING (round) LEFT JOIN round_similarity USING (round)
    ORDER BY round
    """,
)
REJECTIONS = View(
    "rejections",
    "Everything that was dropped, one row each, with its reason.",
    """
    SELECT round, 'prompt' AS stage, reason, NULL::VARCHAR AS prompt_id, proposal_id, prompt,
        NULL::VARCHAR AS fine_tuned_response, NULL::VARCHAR AS base_response, NULL::DOUBLE AS ppl_fine_tuned,
        NULL::DOUBLE AS ppl_base, NULL::DOUBLE AS ppl_base_cross
    FROM rejected_prompts
    UNION ALL
    SELECT r.round, 'pair', r.reason, r.prompt_id, p.proposal_id, coalesce(s.prompt, p.prompt), s.fine_tuned_response,
        s.base_response, s.ppl_fine_tuned, s.ppl_base, s.ppl_base_cross
    FROM rejected_pairs r
    LEFT JOIN scored_pairs s ON s.round = r.round AND s.prompt_id = r.prompt_id
    LEFT JOIN synthetic_prompts p ON p.round = r.round AND p.prompt_id = r.prompt_id
    """,
)
TRANSFER_VIEWS = (LINEAGE, ROUND_SUMMARY, REJECTIONS)

# What each column is made from, as (table, column): Dagster draws it from column to column.
COLUMN_SOURCES: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    SYNTHETIC_PROMPTS.name: {
        "round": (("round_seeds", "round"),),
        "proposal_id": (("round_seeds", "call"), ("round_seeds", "prompt_id"), ("round_seeds", "prompt")),
        **dict.fromkeys(("prompt_id", "prompt", "position"), (("round_seeds", "prompt"),)),
    },
    SCORED_PAIRS.name: {
        column.name: (("synthetic_prompts", column.name if column.name in ("round", "prompt_id") else "prompt"),)
        for column in SCORED_PAIRS.columns
    },
    FILTERED_DATASET.name: {
        **{c: (("scored_pairs", c),) for c in ("round", "prompt_id", "prompt", "ppl_fine_tuned", "ppl_base")},
        "response": (("scored_pairs", "fine_tuned_response"),),
        # The rule decides which two of them.
        "margin": tuple(("scored_pairs", c) for c in ("ppl_fine_tuned", "ppl_base", "ppl_base_cross")),
    },
}
