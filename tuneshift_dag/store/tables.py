"""Every table, view and column, declared once: the DDL, Dagster's schemas and the docs come from here."""

import hashlib
from dataclasses import dataclass

import polars as pl

from tuneshift_dag.method.filters import repetition_sql

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    description: str


@dataclass(frozen=True)
class Table:
    name: str
    description: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    indexed: bool = True
    """Whether DuckDB keeps the key's index. It holds an index in memory whole, however large the table."""

    def ddl(self, schema: str) -> str:
        columns = [f'"{c.name}" {c.type}' for c in self.columns]
        if self.key and self.indexed:
            columns.append(f"PRIMARY KEY ({', '.join(self.key)})")
        return f'CREATE TABLE IF NOT EXISTS "{schema}".{self.name} ({", ".join(columns)})'

    def empty(self) -> pl.DataFrame:
        return pl.DataFrame(schema={c.name: _POLARS[c.type] for c in self.columns})

    def frame(self, rows: list[dict[str, object]]) -> pl.DataFrame:
        """Rows as a frame with exactly this table's columns, also for no rows."""
        return pl.DataFrame(rows, schema=self.empty().schema, orient="row")


@dataclass(frozen=True)
class View:
    """A query that people can read like a table; it follows the code and holds no rows of its own."""

    name: str
    description: str
    columns: tuple[Column, ...]
    query: str

    @property
    def comment(self) -> str:
        """What the database shows beside the view; it changes with the query."""
        return f"{self.description} [{hashlib.sha256(self.query.encode()).hexdigest()[:8]}]"

    def ddl(self) -> str:
        """For a connection whose schema is the transfer's: the query doesn't name the schema of its tables."""
        comment = self.comment.replace("'", "''")
        return f"CREATE OR REPLACE VIEW {self.name} AS {self.query}; COMMENT ON VIEW {self.name} IS '{comment}'"


_POLARS: dict[str, pl.DataType | type[pl.DataType]] = {
    "VARCHAR": pl.String,
    "INTEGER": pl.Int32,
    "BIGINT": pl.Int64,
    "DOUBLE": pl.Float64,
    "BOOLEAN": pl.Boolean,
    "INTEGER[]": pl.List(pl.Int32),
    "VARCHAR[]": pl.List(pl.String),
    "DOUBLE[]": pl.List(pl.Float64),
    "TIMESTAMP": pl.Datetime("us"),
}

_ROUND = Column("round", "VARCHAR", "Round (Dagster partition key), for example round_01.")
_PROMPT_ID = Column("prompt_id", "VARCHAR", "First 16 hex digits of the SHA-256 of the normalized prompt.")
_PROMPT = Column("prompt", "VARCHAR", "The prompt, without the template.")

SEED_SET = Table(
    "seed_set",
    "The example prompts that the user wrote.",
    (_PROMPT_ID, _PROMPT, Column("response", "VARCHAR", "The fine-tuned model's greedy response.")),
    ("prompt_id",),
)
ROUND_SEEDS = Table(
    "round_seeds",
    "Which prompts seed each generator call of a round: the loop's feedback edge.",
    (
        _ROUND,
        Column("call", "INTEGER", "Generator call of the round, from 0."),
        Column("slot", "INTEGER", "Place of the seed in the call, from 0."),
        _PROMPT_ID,
        _PROMPT,
        Column("response", "VARCHAR", "The fine-tuned model's response to it."),
    ),
    ("round", "call", "slot"),
)
PROPOSALS = Table(
    "proposals",
    "Generator calls of a round.",
    (
        _ROUND,
        Column("proposal_id", "VARCHAR", "Hash of generator, instruction, seeds and sampling settings."),
        Column("call", "INTEGER", "Generator call of the round, from 0."),
        Column("seed_ids", "VARCHAR[]", "prompt_id of the seeds shown, in order."),
        Column("text", "VARCHAR", "What the generator wrote."),
    ),
    ("round", "call"),
)
SYNTHETIC_PROMPTS = Table(
    "synthetic_prompts",
    "New prompts written by the generator.",
    (
        _ROUND,
        _PROMPT_ID,
        _PROMPT,
        Column("proposal_id", "VARCHAR", "The generator call that wrote the prompt."),
        Column("position", "INTEGER", "Place in that call's list, from 0."),
    ),
    ("round", "prompt_id"),
)
REJECTED_PROMPTS = Table(
    "rejected_prompts",
    "List items that the generator wrote and that were dropped before scoring.",
    (
        _ROUND,
        Column("proposal_id", "VARCHAR", "The generator call that wrote the item."),
        Column("position", "INTEGER", "Place in that call's list, from 0."),
        _PROMPT,
        Column("reason", "VARCHAR", "empty, overlong, duplicate, near_duplicate, seed or held_out."),
    ),
)
SCORED_PAIRS = Table(
    "scored_pairs",
    "Both source models' responses to every prompt, with four log-likelihoods and perplexities.",
    (
        _ROUND,
        _PROMPT_ID,
        _PROMPT,
        Column("fine_tuned_response", "VARCHAR", "y_f: the fine-tuned model's response."),
        Column("base_response", "VARCHAR", "y_b: the base model's response."),
        Column("fine_tuned_tokens", "INTEGER", "|y_f| in tokens, the end token included when produced."),
        Column("base_tokens", "INTEGER", "|y_b| in tokens, the end token included when produced."),
        Column("fine_tuned_finish", "VARCHAR", "stop (end token) or length (truncated)."),
        Column("base_finish", "VARCHAR", "stop (end token) or length (truncated)."),
        Column("fine_tuned_own_logprob", "DOUBLE", "log p_f(y_f | x) in nats, summed over tokens."),
        Column("base_own_logprob", "DOUBLE", "log p_b(y_b | x)."),
        Column("base_cross_logprob", "DOUBLE", "log p_b(y_f | x): the base on the fine-tuned response."),
        Column("fine_tuned_cross_logprob", "DOUBLE", "log p_f(y_b | x): the fine-tuned model on the base response."),
        Column("fine_tuned_eos_logprob", "DOUBLE", "End token's part of fine_tuned_own_logprob; NULL if truncated."),
        Column("base_eos_logprob", "DOUBLE", "End token's part of base_own_logprob; NULL if truncated."),
        Column("ppl_fine_tuned", "DOUBLE", "PPL_f(y_f); NULL for an empty response."),
        Column("ppl_base", "DOUBLE", "PPL_b(y_b)."),
        Column("ppl_base_cross", "DOUBLE", "PPL_b(y_f)."),
        Column("ppl_fine_tuned_cross", "DOUBLE", "PPL_f(y_b)."),
        Column(
            "base_alone_logprob", "DOUBLE", "log p_b(y_f) without the prompt; NULL unless a rule `ifd` asks for it."
        ),
        Column("ppl_base_alone", "DOUBLE", "PPL_b(y_f) without the prompt; NULL unless a rule `ifd` asks for it."),
        Column("agreement", "DOUBLE", "Share of `response.samples` whose answer is that of y_f; NULL without samples."),
        Column(
            "ppl_target",
            "DOUBLE",
            "PPL of y_f under the target's base, over its own tokens but the end token; NULL without `filter.target`.",
        ),
        Column(
            "discriminator_score",
            "DOUBLE",
            "How sure the discriminator is that the prompt is real and not generated, P(yes) / (P(yes) + P(no)); NULL"
            " without `filter.discriminator`.",
        ),
    ),
    ("round", "prompt_id"),
    indexed=False,
)
FILTERED_DATASET = Table(
    "filtered_dataset",
    "Pairs that the filter keeps: the distillation dataset.",
    (
        _ROUND,
        _PROMPT_ID,
        _PROMPT,
        Column("response", "VARCHAR", "The fine-tuned response, as generated (leading space included)."),
        Column("ppl_fine_tuned", "DOUBLE", "PPL_f(y_f)."),
        Column("ppl_base", "DOUBLE", "PPL_b(y_b)."),
        Column(
            "margin",
            "DOUBLE",
            "By how much the pair passes the rule; of top_excess the mean token excess in nats, of balanced_confidence"
            " 1 / PPL minus the place in its response; NULL for a draw.",
        ),
    ),
    # No key here and in rejected_pairs: a million rows are rewritten four times as fast without its index.
)
REJECTED_PAIRS = Table(
    "rejected_pairs",
    "Scored pairs that the filter drops, each with its reason.",
    (_ROUND, _PROMPT_ID, Column("reason", "VARCHAR", "Why the filter drops the pair.")),
)
THRESHOLD_REPORT = Table(
    "threshold_report",
    "How many pairs each rule would keep at each threshold of a grid.",
    (
        Column("rule", "VARCHAR", "Filter rule."),
        Column("threshold", "DOUBLE", "The cut; what `filter.keep` says for rules that have it, of unfiltered 1."),
        Column("pairs_kept", "BIGINT", "Scored pairs that pass."),
        Column("kept_share", "DOUBLE", "Their share of all scored pairs."),
        Column("distinct_responses", "BIGINT", "Different responses among them, outer spaces aside."),
        Column("mean_margin", "DOUBLE", "Mean of `filtered_dataset.margin`; NULL when there is none."),
        Column("by_round", "VARCHAR", "Pairs kept in each round, as JSON."),
        Column("current", "BOOLEAN", "Whether these are the rule and threshold of transfer.yaml."),
    ),
    ("rule", "threshold"),
)
DIVERSITY_MAP = Table(
    "diversity_map",
    "Seeds and prompts as points: near each other when they mean nearly the same.",
    (
        _PROMPT_ID,
        Column("x", "DOUBLE", "Place on the map; only distances within one map mean anything."),
        Column("y", "DOUBLE", "Place on the map."),
    ),
    ("prompt_id",),
)
ROUND_SIMILARITY = Table(
    "round_similarity",
    "How alike the prompts of a round are, by meaning.",
    (
        _ROUND,
        Column("prompts", "INTEGER", "Prompts that were compared, all or a sample of them."),
        Column("similarity", "DOUBLE", "Mean cosine similarity of all their pairs (MiniLM); NULL for one prompt."),
    ),
    ("round",),
)
DISTILLED_MODELS = Table(
    "distilled_models",
    "Trained target adapters; an adapter is identified by its dataset, base model and settings.",
    (
        Column("model_id", "VARCHAR", "Hash of dataset version, target and distillation settings."),
        Column("dataset_version", "VARCHAR", "Hash of the training pairs."),
        Column("pairs", "INTEGER", "Training pairs, the validation slice included."),
        Column("target", "VARCHAR", "The target base model; NULL in rows of older versions."),
        Column("target_weights", "VARCHAR", "Fingerprint of its files; NULL in rows of older versions."),
        Column("settings", "VARCHAR", "Distillation settings, as JSON."),
        Column("filter", "VARCHAR", "The filter that kept its pairs when distilled_model last pointed at it."),
        Column("curve", "VARCHAR", "Losses by step and epoch, as JSON."),
        Column("seconds", "DOUBLE", "Training time."),
        Column("path", "VARCHAR", "Folder of the PEFT adapter."),
        Column("created_at", "TIMESTAMP", "When it was trained (UTC)."),
        Column("current", "BOOLEAN", "Whether distilled_model points at it."),
    ),
    ("model_id",),
)
TRAINING_EXAMPLES = Table(
    "training_examples",
    "Which pairs each model was trained on.",
    (Column("model_id", "VARCHAR", "The model."), _PROMPT_ID, _ROUND),
    ("model_id", "prompt_id"),
)
EVALUATIONS = Table(
    "evaluations",
    "Each model's response to the held-out file, and whether it is right, prompt by prompt.",
    (
        Column("model", "VARCHAR", "source_base, source_fine_tuned, target_base or target_distilled."),
        _PROMPT_ID,
        _PROMPT,
        Column("expected", "VARCHAR", "The held-out response."),
        Column("response", "VARCHAR", "The model's greedy response, stripped."),
        Column(
            "correct", "BOOLEAN", "Whether they are equal; of evaluation.metric numeric, whether the number after ####."
        ),
        Column(
            "correct_flexible", "BOOLEAN", "Whether the last number of the response is right; NULL for exact_match."
        ),
    ),
    ("model", "prompt_id"),
)
ACCURACY = Table(
    "accuracy",
    "Held-out accuracy by model with a 95 % bootstrap interval.",
    (
        Column("model", "VARCHAR", "source_base, source_fine_tuned, target_base or target_distilled."),
        Column("value", "DOUBLE", "Share of held-out prompts answered right (`evaluations.correct`)."),
        Column("low", "DOUBLE", "Lower end of the 95 % interval."),
        Column("high", "DOUBLE", "Upper end of the 95 % interval."),
        Column("n", "INTEGER", "Held-out prompts."),
        Column("flexible", "DOUBLE", "Share by `evaluations.correct_flexible`; NULL for exact_match."),
        Column("flexible_low", "DOUBLE", "Lower end of its 95 % interval."),
        Column("flexible_high", "DOUBLE", "Upper end."),
    ),
    ("model",),
)
RETENTION = Table(
    "retention",
    "How well the target predicts general text, before and after: what the distillation made it forget.",
    (
        Column("model", "VARCHAR", "target_base or target_distilled."),
        Column("perplexity", "DOUBLE", "Per token of the packaged text."),
        Column("bits_per_byte", "DOUBLE", "The same per byte, which compares models with different tokenizers."),
        Column("tokens", "INTEGER", "Tokens of the text."),
        Column("bytes", "INTEGER", "Its bytes (UTF-8)."),
    ),
    ("model",),
)
TASK_SCORES = Table(
    "task_scores",
    "What lm-evaluation-harness measured on `evaluation.tasks`, for the target before and after, by task.",
    (
        Column(
            "key", "VARCHAR", "SHA-256 of model fingerprint, task, its examples and settings, limit, harness version."
        ),
        Column("model", "VARCHAR", "target_base or target_distilled."),
        Column("task", "VARCHAR", "Task, or group of tasks."),
        Column("task_version", "VARCHAR", "Version that the task's file gives."),
        Column("metric", "VARCHAR", "Such as exact_match or acc."),
        Column("filter", "VARCHAR", "How the answer was taken from the response, such as strict-match; none."),
        Column("value", "DOUBLE", "The score."),
        Column("stderr", "DOUBLE", "Its standard error, as the harness gives it; NULL where it gives none."),
        Column("n", "INTEGER", "Examples."),
        Column("example_limit", "INTEGER", "`evaluation.task_limit`, or NULL."),
        Column("current", "BOOLEAN", "Whether the last evaluation used it."),
    ),
    ("key", "task", "metric", "filter"),
)
COMPARISON = Table(
    "comparison",
    "Rival filters: held-out accuracy of models trained on equally many pairs of each, with 95 % intervals.",
    (
        Column("arm", "VARCHAR", "A filter, random, unfiltered or oracle; or target_base, source_fine_tuned."),
        Column("runs", "INTEGER", "Trainings, each with its own seed and draw of pairs; 1 for a model."),
        Column("candidates", "INTEGER", "Pairs that the arm could draw from."),
        Column("pairs", "INTEGER", "Training pairs of each run."),
        Column("shared_with_random", "DOUBLE", "Share of its pairs that random trained on too, mean over runs."),
        Column("distinct_responses", "DOUBLE", "Different responses among its pairs, mean over runs."),
        Column("distinct_bigrams", "DOUBLE", "Different bigrams over all bigrams of its prompts, mean over runs."),
        Column("repetition", "DOUBLE", "Share of a prompt's word 4-grams that repeat in it, mean over its prompts."),
        Column(
            "similarity",
            "DOUBLE",
            "Mean cosine similarity of all pairs of its prompts (MiniLM), mean over runs; NULL without the encoder.",
        ),
        Column("by_run", "DOUBLE[]", "Accuracy of each run."),
        Column("value", "DOUBLE", "Accuracy, mean over runs."),
        Column("low", "DOUBLE", "Lower end of its 95 % interval, for new runs and new prompts."),
        Column("high", "DOUBLE", "Upper end."),
        Column("vs_random", "DOUBLE", "Accuracy minus that of random, paired by run and prompt."),
        Column("vs_random_low", "DOUBLE", "Lower end of its 95 % interval."),
        Column("vs_random_high", "DOUBLE", "Upper end."),
        Column("vs_unfiltered", "DOUBLE", "Accuracy minus that of unfiltered, paired by run and prompt."),
        Column("vs_unfiltered_low", "DOUBLE", "Lower end of its 95 % interval."),
        Column("vs_unfiltered_high", "DOUBLE", "Upper end."),
    ),
    ("arm",),
)
COMPARISON_ANSWERS = Table(
    "comparison_answers",
    "What every model of the comparison answered to every held-out prompt.",
    (
        Column("arm", "VARCHAR", "As in comparison."),
        Column("seed", "INTEGER", "Seed of the training; NULL for a model that wasn't trained here."),
        _PROMPT_ID,
        Column("response", "VARCHAR", "The model's greedy response, stripped."),
        Column("correct", "BOOLEAN", "As in evaluations."),
    ),
)
_SCORED = ("task", "metric", "filter", "value", "stderr", "n")
COMPARISON_TASKS = Table(
    "comparison_tasks",
    "What lm-evaluation-harness measured on `evaluation.tasks` for every target of the comparison.",
    (
        Column("arm", "VARCHAR", "As in comparison; none of the source."),
        Column("seed", "INTEGER", "Seed of the training; NULL for target_base."),
        *(column for column in TASK_SCORES.columns if column.name in _SCORED),
    ),
)
STEPS = Table(
    "steps",
    "What each materialization cost.",
    (
        Column("run_id", "VARCHAR", "Dagster run."),
        Column("batch_id", "VARCHAR", "The `tuneshift run` call, backfill or single run it belongs to."),
        Column("asset", "VARCHAR", "Asset name."),
        Column("round", "VARCHAR", "Round, or NULL."),
        Column("finished_at", "TIMESTAMP", "When it finished (UTC)."),
        Column("seconds", "DOUBLE", "Wall time of the step."),
        Column("model_seconds", "DOUBLE", "Part of it spent loading, running or training models."),
        Column("model_calls", "INTEGER", "Prompts that a model answered, scored or continued."),
        Column("cache_hits", "INTEGER", "Prompts whose result came from the cache."),
        Column("tokens_generated", "BIGINT", "Tokens that models generated."),
        Column("models", "VARCHAR", "Models that ran, where `tuneshift plan` takes the step's speed from here."),
        Column("engine", "VARCHAR", "What ran them: engine.type and how much at once."),
        Column(
            "peak_bytes", "BIGINT", "Peak memory of the process during the step; where there are GPUs, of all of them."
        ),
    ),
)
CACHE_REFERENCES = Table(
    "cache_references",
    "Which entries of the cache each materialization used: what `tuneshift cache gc` keeps.",
    (
        Column("asset", "VARCHAR", "Asset name."),
        Column("round", "VARCHAR", "Round, or empty."),
        Column("key", "VARCHAR", "Key in a table of the cache."),
    ),
)

RUNS = Table(
    "runs",
    "Every `tuneshift run`, also one that found nothing to do.",
    (
        Column("batch_id", "VARCHAR", "Names the run's rows in `steps`."),
        Column("finished_at", "TIMESTAMP", "When it finished (UTC)."),
        Column("seconds", "DOUBLE", "Wall time, without starting the process."),
    ),
    ("batch_id",),
)

TRANSFER_TABLES = (
    SEED_SET, ROUND_SEEDS, PROPOSALS, SYNTHETIC_PROMPTS, REJECTED_PROMPTS, SCORED_PAIRS, FILTERED_DATASET,
    REJECTED_PAIRS, THRESHOLD_REPORT, DIVERSITY_MAP, ROUND_SIMILARITY, DISTILLED_MODELS, TRAINING_EXAMPLES,
    EVALUATIONS, ACCURACY, RETENTION, TASK_SCORES, COMPARISON, COMPARISON_ANSWERS, COMPARISON_TASKS, STEPS, RUNS,
    CACHE_REFERENCES,
)  # fmt: skip

# Recursion is over generator calls, not prompts: prompts of one call share their ancestors, so there are
# some hundred times fewer of them. USING KEY keeps the nearest way to each call and ends when no new call
# is met, also where a round that was grown anew is seeded by prompts that it led to (a cycle).
LINEAGE = View(
    "lineage",
    "Where a prompt came from: step by step back through generator calls and their seeds to the seed set.",
    (
        Column("root_prompt_id", "VARCHAR", "The prompt whose origin this is: generated, or of the seed set."),
        Column("depth", "INTEGER", "Generator calls between the step and the root, the step's own included."),
        Column(
            "kind",
            "VARCHAR",
            "prompt (generated), call (of the generator), seed (of the seed set) or gone (a seed that no table"
            " holds any more, because its round was grown anew).",
        ),
        Column("id", "VARCHAR", "prompt_id or, of a call, proposal_id."),
        Column(
            "led_to", "VARCHAR", "The step that this one led to: a seed's call, a call's prompt; NULL for the root."
        ),
        Column("round", "VARCHAR", "Round of the prompt or call; NULL for the seed set."),
        Column("text", "VARCHAR", "The prompt, or all that the call wrote."),
    ),
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
ROUND_SUMMARY = View(
    "round_summary",
    "What each round did and brought.",
    (
        _ROUND,
        Column("generator_calls", "BIGINT", "Generator calls; 0 when the dataset had reached its target size."),
        Column("prompts", "BIGINT", "New prompts."),
        Column("rejected_prompts", "BIGINT", "List items dropped before scoring."),
        Column("scored", "BIGINT", "Pairs scored."),
        Column("kept", "BIGINT", "Pairs that the filter keeps."),
        Column("kept_share", "DOUBLE", "kept / scored; NULL when nothing was scored."),
        Column("distinct_responses", "BIGINT", "Distinct responses among the kept pairs, outer spaces aside."),
        Column("new_responses", "BIGINT", "Those of them that no earlier round kept."),
        Column("mean_ppl_fine_tuned", "DOUBLE", "Geometric mean of PPL_f(y_f) over the scored pairs."),
        Column("mean_ppl_base", "DOUBLE", "Geometric mean of PPL_b(y_b) over the scored pairs."),
        Column(
            "distinct_bigrams",
            "DOUBLE",
            "Different bigrams over all bigrams of the new prompts, in lower case without punctuation marks.",
        ),
        Column("repetition", "DOUBLE", "Share of a new prompt's word 4-grams that repeat in it, mean over prompts."),
        Column(
            "similarity",
            "DOUBLE",
            "Mean cosine similarity of all pairs of new prompts; NULL before diversity_map has compared them.",
        ),
    ),
    # `steps` knows the rounds that ran and had nothing to do. A geometric mean, because a few confused
    # answers have perplexities of thousands; it is exp of the mean loss.
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
        SELECT round, string_split(trim(regexp_replace(regexp_replace(lower(prompt), '[''’]', '', 'g'),
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
    (
        _ROUND,
        Column("stage", "VARCHAR", "prompt (a list item, dropped before scoring) or pair (dropped by the filter)."),
        Column("reason", "VARCHAR", "Why: see rejected_prompts and rejected_pairs."),
        Column("prompt_id", "VARCHAR", "The pair's prompt; NULL for a list item, which never became a prompt."),
        Column("proposal_id", "VARCHAR", "The generator call that wrote it."),
        Column("prompt", "VARCHAR", "The prompt or list item."),
        Column("fine_tuned_response", "VARCHAR", "y_f of a pair."),
        Column("base_response", "VARCHAR", "y_b of a pair."),
        Column("ppl_fine_tuned", "DOUBLE", "PPL_f(y_f) of a pair."),
        Column("ppl_base", "DOUBLE", "PPL_b(y_b) of a pair."),
        Column("ppl_base_cross", "DOUBLE", "PPL_b(y_f) of a pair."),
    ),
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
        "prompt_id": (("round_seeds", "prompt"),),
        "prompt": (("round_seeds", "prompt"),),
        "proposal_id": (("round_seeds", "call"), ("round_seeds", "prompt_id"), ("round_seeds", "prompt")),
        "position": (("round_seeds", "prompt"),),
    },
    SCORED_PAIRS.name: {
        column.name: (("synthetic_prompts", column.name if column.name in ("round", "prompt_id") else "prompt"),)
        for column in SCORED_PAIRS.columns
    },
    FILTERED_DATASET.name: {
        **{c: (("scored_pairs", c),) for c in ("round", "prompt_id", "prompt", "ppl_fine_tuned", "ppl_base")},
        "response": (("scored_pairs", "fine_tuned_response"),),
        # The rule decides which two of them.
        "margin": tuple(
            ("scored_pairs", c) for c in ("ppl_fine_tuned", "ppl_base", "ppl_base_cross", "ppl_base_alone")
        ),
    },
}

CACHE = "cache"
CACHED_RESPONSES = Table(
    "responses",
    "Every response a model gave, by content: shared by transfers, rounds and runs.",
    (
        Column("key", "VARCHAR", "SHA-256 of model fingerprint, prompt token ids and decoding settings."),
        Column("text", "VARCHAR", "The response."),
        Column("token_ids", "INTEGER[]", "Generated token ids, the end token included when produced."),
        Column("finish_reason", "VARCHAR", "stop or length."),
        Column("sum_logprob", "DOUBLE", "Sum of the tokens' log-probabilities in nats."),
        Column("eos_logprob", "DOUBLE", "The end token's part of it; NULL if truncated."),
    ),
    ("key",),
    indexed=False,
)
CACHED_SCORES = Table(
    "scores",
    "Log-likelihoods of given responses under a model, by content.",
    (
        Column("key", "VARCHAR", "SHA-256 of model fingerprint, prompt token ids and response token ids."),
        Column("sum_logprob", "DOUBLE", "log p(y | x) in nats, summed over tokens."),
    ),
    ("key",),
    indexed=False,
)
CACHED_TOKEN_SCORES = Table(
    "token_scores",
    "Log-probabilities of each token of given responses under a model, by content; only `distill.token_mask` asks.",
    (
        Column("key", "VARCHAR", "SHA-256 of model fingerprint, prompt token ids and response token ids."),
        Column("logprobs", "DOUBLE[]", "log p(y_t | x, y_<t) in nats, one for each token."),
    ),
    ("key",),
    indexed=False,
)
CACHE_TABLES = (CACHED_RESPONSES, CACHED_SCORES, CACHED_TOKEN_SCORES)
