"""Every table and column, declared once: the DDL, Dagster's schemas and the docs come from here."""

from dataclasses import dataclass

import polars as pl

SCHEMA_VERSION = 1


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

    def ddl(self, schema: str) -> str:
        columns = [f'"{c.name}" {c.type}' for c in self.columns]
        if self.key:
            columns.append(f"PRIMARY KEY ({', '.join(self.key)})")
        return f'CREATE TABLE IF NOT EXISTS "{schema}".{self.name} ({", ".join(columns)})'

    def empty(self) -> pl.DataFrame:
        return pl.DataFrame(schema={c.name: _POLARS[c.type] for c in self.columns})

    def frame(self, rows: list[dict[str, object]]) -> pl.DataFrame:
        """Rows as a frame with exactly this table's columns, also for no rows."""
        return pl.DataFrame(rows, schema=self.empty().schema, orient="row")


_POLARS: dict[str, pl.DataType | type[pl.DataType]] = {
    "VARCHAR": pl.String,
    "INTEGER": pl.Int32,
    "BIGINT": pl.Int64,
    "DOUBLE": pl.Float64,
    "BOOLEAN": pl.Boolean,
    "INTEGER[]": pl.List(pl.Int32),
    "VARCHAR[]": pl.List(pl.String),
    "TIMESTAMP": pl.Datetime("us"),
}

_ROUND = Column("round", "VARCHAR", "Round (Dagster partition key), for example round_01.")
_PROMPT_ID = Column("prompt_id", "VARCHAR", "First 16 hex digits of the SHA-256 of the normalized prompt.")
_PROMPT = Column("prompt", "VARCHAR", "The prompt, without the template.")

SEED_SET = Table(
    "seed_set",
    "The example prompts that the user wrote.",
    (_PROMPT_ID, _PROMPT),
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
    ),
    ("round", "prompt_id"),
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
        Column("margin", "DOUBLE", "By how much the pair passes the rule."),
    ),
    ("round", "prompt_id"),
)
REJECTED_PAIRS = Table(
    "rejected_pairs",
    "Scored pairs that the filter drops, each with its reason.",
    (_ROUND, _PROMPT_ID, Column("reason", "VARCHAR", "Why the filter drops the pair.")),
    ("round", "prompt_id"),
)
DISTILLED_MODELS = Table(
    "distilled_models",
    "Trained target adapters; an adapter is identified by its dataset, base model and settings.",
    (
        Column("model_id", "VARCHAR", "Hash of dataset version, target and distillation settings."),
        Column("dataset_version", "VARCHAR", "Hash of the training pairs."),
        Column("pairs", "INTEGER", "Training pairs, the validation slice included."),
        Column("settings", "VARCHAR", "Distillation settings, as JSON."),
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
    "Exact match of each model's response on the held-out file, prompt by prompt.",
    (
        Column("model", "VARCHAR", "source_base, source_fine_tuned, target_base or target_distilled."),
        _PROMPT_ID,
        _PROMPT,
        Column("expected", "VARCHAR", "The held-out response."),
        Column("response", "VARCHAR", "The model's greedy response, stripped."),
        Column("correct", "BOOLEAN", "Whether they are equal."),
    ),
    ("model", "prompt_id"),
)
ACCURACY = Table(
    "accuracy",
    "Held-out accuracy by model with a 95 % bootstrap interval.",
    (
        Column("model", "VARCHAR", "source_base, source_fine_tuned, target_base or target_distilled."),
        Column("value", "DOUBLE", "Share of held-out prompts answered exactly."),
        Column("low", "DOUBLE", "Lower end of the 95 % interval."),
        Column("high", "DOUBLE", "Upper end of the 95 % interval."),
        Column("n", "INTEGER", "Held-out prompts."),
    ),
    ("model",),
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
    ),
)

TRANSFER_TABLES = (
    SEED_SET, ROUND_SEEDS, PROPOSALS, SYNTHETIC_PROMPTS, REJECTED_PROMPTS, SCORED_PAIRS, FILTERED_DATASET,
    REJECTED_PAIRS, DISTILLED_MODELS, TRAINING_EXAMPLES, EVALUATIONS, ACCURACY, STEPS,
)  # fmt: skip

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
)
CACHED_SCORES = Table(
    "scores",
    "Log-likelihoods of given responses under a model, by content.",
    (
        Column("key", "VARCHAR", "SHA-256 of model fingerprint, prompt token ids and response token ids."),
        Column("sum_logprob", "DOUBLE", "log p(y | x) in nats, summed over tokens."),
    ),
    ("key",),
)
CACHE_TABLES = (CACHED_RESPONSES, CACHED_SCORES)
