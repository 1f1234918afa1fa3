"""Every table and column, declared once: the DDL, Dagster's schemas and the docs come from here."""

import re
from dataclasses import dataclass

import polars as pl

SCHEMA_VERSION = 5


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
_WITHOUT_INDEX = ("scored_pairs", "responses", "scores")
"""Large tables with a key: whoever writes them keeps it unique. (filtered_dataset and rejected_pairs have no key: a
million rows are rewritten four times as fast without its index.)"""


def _column(line: str) -> Column:
    name, type_, description = re.fullmatch(r"(\w+) ([A-Z]+(?:\[\])?): (.+)", line).groups()  # type: ignore[union-attr]
    return Column(name, type_, description)


def _table(text: str) -> Table:
    """From ``name (key): description``, where the key may lack, and a line for each column or some of `_SHARED`."""
    head, *lines = (line.strip() for line in text.strip().splitlines())
    name, key, description = re.fullmatch(r"(\w+)(?: \((.+?)\))?: (.+)", head).groups()  # type: ignore[union-attr]
    columns: list[Column] = []
    for line in lines:
        columns += [_column(line)] if ":" in line else [_SHARED[shared] for shared in line.split(", ")]
    return Table(name, description, tuple(columns), tuple(key.split(", ")) if key else (), name not in _WITHOUT_INDEX)


def _tables(text: str) -> tuple[Table, ...]:
    """From the texts of several tables, columns indented; the constants' names stand in the same order."""
    return tuple(_table(table) for table in re.split(r"\n(?=\w)", text.strip()))


_SHARED = {
    line.split(" ", 1)[0]: _column(line)
    for line in (
        "round VARCHAR: Round (Dagster partition key), for example round_01.",
        "prompt_id VARCHAR: First 16 hex digits of the SHA-256 of the normalized prompt.",
        "prompt VARCHAR: The prompt, without the template.",
        "asset VARCHAR: Asset name.",
        "run_id VARCHAR: Dagster run.",
        "added_at TIMESTAMP: When it was added (UTC); NULL in rows of older versions.",
        "task VARCHAR: Task, or group of tasks.",
        "metric VARCHAR: Such as exact_match or acc.",
        "filter VARCHAR: How the answer was taken from the response, such as strict-match; none.",
        "value DOUBLE: The score.",
        "stderr DOUBLE: Its standard error, as the harness gives it; NULL where it gives none.",
        "n INTEGER: Examples.",
    )
}

(
    SEED_SET, ROUND_SEEDS, PROPOSALS, SYNTHETIC_PROMPTS, REJECTED_PROMPTS, SCORED_PAIRS, FILTERED_DATASET,
    REJECTED_PAIRS, THRESHOLD_REPORT, DIVERSITY_MAP, ROUND_SIMILARITY, REHEARSAL_SET, DISTILLED_MODELS,
    TRAINING_EXAMPLES, EVALUATIONS, ACCURACY, RETENTION, RETENTION_BY_KIND, FRONTIER, TASK_SCORES, COMPARISON,
    COMPARISON_ANSWERS, COMPARISON_TASKS, STEPS, RUNS, CACHE_REFERENCES, MATERIALIZATIONS, ATTEMPTS, MODELS,
) = TRANSFER_TABLES = _tables("""
seed_set (prompt_id): The example prompts that the user wrote.
    prompt_id, prompt
    response VARCHAR: The fine-tuned model's greedy response.
round_seeds (round, call, slot): Which prompts seed each generator call of a round: the loop's feedback edge.
    round
    call INTEGER: Generator call of the round, from 0.
    slot INTEGER: Place of the seed in the call, from 0.
    prompt_id, prompt
    response VARCHAR: The fine-tuned model's response to it.
proposals (round, call): Generator calls of a round.
    round
    proposal_id VARCHAR: Hash of generator, instruction, seeds and sampling settings.
    call INTEGER: Generator call of the round, from 0.
    seed_ids VARCHAR[]: prompt_id of the seeds shown, in order.
    text VARCHAR: What the generator wrote.
synthetic_prompts (round, prompt_id): New prompts written by the generator.
    round, prompt_id, prompt
    proposal_id VARCHAR: The generator call that wrote the prompt.
    position INTEGER: Place in that call's list, from 0.
rejected_prompts: List items that the generator wrote and that were dropped before scoring.
    round
    proposal_id VARCHAR: The generator call that wrote the item.
    position INTEGER: Place in that call's list, from 0.
    prompt
    reason VARCHAR: empty, overlong, duplicate, near_duplicate, seed or held_out.
scored_pairs (round, prompt_id): Both source models' responses to each prompt, log-likelihoods and perplexities.
    round, prompt_id, prompt
    fine_tuned_response VARCHAR: y_f: the fine-tuned model's response.
    base_response VARCHAR: y_b: the base model's response.
    fine_tuned_tokens INTEGER: |y_f| in tokens, the end token included when produced.
    base_tokens INTEGER: |y_b| in tokens, the end token included when produced.
    fine_tuned_finish VARCHAR: stop (end token) or length (truncated).
    base_finish VARCHAR: stop (end token) or length (truncated).
    fine_tuned_own_logprob DOUBLE: log p_f(y_f | x) in nats, summed over tokens.
    base_own_logprob DOUBLE: log p_b(y_b | x).
    base_cross_logprob DOUBLE: log p_b(y_f | x): the base on the fine-tuned response.
    fine_tuned_cross_logprob DOUBLE: log p_f(y_b | x): the fine-tuned model on the base response.
    fine_tuned_eos_logprob DOUBLE: End token's part of fine_tuned_own_logprob; NULL if truncated.
    base_eos_logprob DOUBLE: End token's part of base_own_logprob; NULL if truncated.
    ppl_fine_tuned DOUBLE: PPL_f(y_f); NULL for an empty response.
    ppl_base DOUBLE: PPL_b(y_b).
    ppl_base_cross DOUBLE: PPL_b(y_f).
    ppl_fine_tuned_cross DOUBLE: PPL_f(y_b).
    seed_similarity DOUBLE: Highest cosine similarity of the prompt to a seed (MiniLM); NULL when no rule asks for it.
filtered_dataset: Pairs that the filter keeps: the distillation dataset.
    round, prompt_id, prompt
    response VARCHAR: The fine-tuned response, as generated (leading space included).
    ppl_fine_tuned DOUBLE: PPL_f(y_f).
    ppl_base DOUBLE: PPL_b(y_b).
    margin DOUBLE: By how much the pair passes the rule; of top_excess the mean token excess in nats; NULL for a draw.
rejected_pairs: Scored pairs that the filter drops, each with its reason.
    round, prompt_id
    reason VARCHAR: Why the filter drops the pair.
threshold_report (rule, threshold): How many pairs each rule would keep at each threshold of a grid.
    rule VARCHAR: Filter rule.
    threshold DOUBLE: `filter.threshold`: for rules that rank or draw, how much is kept; of unfiltered 1.
    pairs_kept BIGINT: Scored pairs that pass.
    kept_share DOUBLE: Their share of all scored pairs.
    distinct_responses BIGINT: Different responses among them, outer spaces aside.
    mean_margin DOUBLE: Mean of `filtered_dataset.margin`; NULL when there is none.
    by_round VARCHAR: Pairs kept in each round, as JSON.
    current BOOLEAN: Whether these are the rule and threshold of transfer.yaml.
diversity_map (prompt_id): Seeds and prompts as points: near each other when they mean nearly the same.
    prompt_id
    x DOUBLE: Place on the map; only distances within one map mean anything.
    y DOUBLE: Place on the map.
round_similarity (round): How alike the prompts of a round are, by meaning.
    round
    prompts INTEGER: Prompts that were compared, all or a sample of them.
    similarity DOUBLE: Mean cosine similarity of all their pairs (MiniLM); NULL for one prompt.
rehearsal_set: What the target writes by itself: a sample of what it knows, to hold it to while it is trained.
    kind VARCHAR: start (from its start token alone) or chat (its answer to a question of its own).
    prompt VARCHAR: That question; empty for start.
    response VARCHAR: What it wrote.
    token_ids INTEGER[]: The prompt, or what starts a text, and the response as token ids.
    prompt_tokens INTEGER: How many of them are the prompt's.
distilled_models (model_id): Trained target adapters, each identified by its dataset, base model and settings.
    model_id VARCHAR: Hash of dataset version, target and distillation settings.
    dataset_version VARCHAR: Hash of the training pairs.
    pairs INTEGER: Training pairs, the validation slice included.
    target VARCHAR: The target base model; NULL in rows of older versions.
    target_weights VARCHAR: Fingerprint of its files; NULL in rows of older versions.
    settings VARCHAR: Distillation settings, as JSON.
    filter VARCHAR: The filter that kept its pairs when distilled_model last pointed at it.
    curve VARCHAR: Losses by step and epoch, as JSON.
    seconds DOUBLE: Training time.
    path VARCHAR: Folder of the PEFT adapter, relative to the database file's.
    created_at TIMESTAMP: When it was trained (UTC).
    current BOOLEAN: Whether distilled_model points at it.
training_examples (model_id, prompt_id): Which pairs each model was trained on.
    model_id VARCHAR: The model.
    prompt_id, round
evaluations (model, prompt_id): Each model's response to each held-out prompt, and whether it is right.
    model VARCHAR: source_base, source_fine_tuned, target_base or target_distilled.
    prompt_id, prompt
    expected VARCHAR: The held-out response.
    response VARCHAR: The model's greedy response, stripped.
    correct BOOLEAN: Whether they are equal; with the metric numeric, their numbers after ####.
    correct_flexible BOOLEAN: Whether the response's last number is right; NULL for exact_match.
accuracy (model): Held-out accuracy by model with a 95 % interval (Wilson).
    model VARCHAR: source_base, source_fine_tuned, target_base or target_distilled.
    value DOUBLE: Share of held-out prompts answered right (`evaluations.correct`).
    low DOUBLE: Lower end of the 95 % interval.
    high DOUBLE: Upper end of the 95 % interval.
    n INTEGER: Held-out prompts.
    flexible DOUBLE: Share by `evaluations.correct_flexible`; NULL for exact_match.
    flexible_low DOUBLE: Lower end of its 95 % interval.
    flexible_high DOUBLE: Upper end.
retention (model): How well the target predicts general text, before and after: what it forgot.
    model VARCHAR: target_base or target_distilled.
    perplexity DOUBLE: Per token of the packaged text.
    bits_per_byte DOUBLE: The same per byte, which compares models with different tokenizers.
    tokens INTEGER: Tokens of the text.
    bytes INTEGER: Its bytes (UTF-8).
retention_by_kind (model, kind): The same for each kind of text.
    model VARCHAR: target_base or target_distilled.
    kind VARCHAR: Such as prose, code or german; own_answers: of a chat target, its former answers to its own questions.
    perplexity DOUBLE: Per token.
    bits_per_byte DOUBLE: The same per byte.
    tokens INTEGER: Tokens of the texts.
    bytes INTEGER: Their bytes (UTF-8).
frontier (scale): Skill against general text, for parts of the adapter's update.
    scale DOUBLE: Factor of the update; 1 is as it was trained.
    value DOUBLE: Held-out accuracy; NULL without a held-out file.
    low DOUBLE: Lower end of its 95 % interval.
    high DOUBLE: Upper end.
    perplexity DOUBLE: Of a sample of the general text.
    ratio DOUBLE: The same as a multiple of the base's.
    chosen BOOLEAN: Whether it is the scale of target_distilled, and of what is exported (`distill.keep`).
task_scores (key, task, metric, filter): What lm-evaluation-harness measured, for the target before and after.
    key VARCHAR: SHA-256 of model fingerprint, task, examples, settings, limit, harness version.
    model VARCHAR: target_base or target_distilled.
    task
    task_version VARCHAR: Version that the task's file gives.
    metric, filter, value, stderr, n
    example_limit INTEGER: `evaluation.task_limit`, or NULL.
    current BOOLEAN: Whether the last evaluation used it.
comparison (arm): Rival filters: held-out accuracy of models trained on equally many pairs of each.
    arm VARCHAR: A filter, random, unfiltered or oracle; or target_base, source_fine_tuned.
    runs INTEGER: Trainings, each with its own seed and draw of pairs; 1 for a model.
    candidates INTEGER: Pairs that the arm could draw from; with `compare.loop` in the run with the fewest.
    pairs INTEGER: Training pairs of each run.
    shared_with_random DOUBLE: Share of its pairs that random trained on too, mean over runs.
    distinct_responses DOUBLE: Different responses among its pairs, mean over runs.
    distinct_bigrams DOUBLE: Different bigrams over all bigrams of its prompts, mean over runs.
    repetition DOUBLE: Share of a prompt's word 4-grams that repeat in it, mean over its prompts.
    similarity DOUBLE: Mean cosine similarity of its prompts, mean over runs; NULL without the encoder.
    general_text DOUBLE: Perplexity of general text as a multiple of target_base's, mean over runs; NULL for the source.
    by_run DOUBLE[]: Accuracy of each run.
    value DOUBLE: Accuracy, mean over runs.
    low DOUBLE: Lower end of its 95 % interval, for new runs and new prompts.
    high DOUBLE: Upper end.
    vs_random DOUBLE: Accuracy minus that of random, paired by run and prompt.
    vs_random_low DOUBLE: Lower end of its interval, 95 % corrected over the arms (Holm).
    vs_random_high DOUBLE: Upper end.
    vs_unfiltered DOUBLE: Accuracy minus that of unfiltered, paired by run and prompt.
    vs_unfiltered_low DOUBLE: Lower end of its interval, corrected too.
    vs_unfiltered_high DOUBLE: Upper end.
comparison_answers: What every model of the comparison answered to every held-out prompt.
    arm VARCHAR: As in comparison.
    seed INTEGER: Seed of the training; NULL for a model that wasn't trained here.
    prompt_id
    response VARCHAR: The model's greedy response, stripped.
    correct BOOLEAN: As in evaluations.
comparison_tasks: What lm-evaluation-harness measured for every target of the comparison.
    arm VARCHAR: As in comparison; none of the source.
    seed INTEGER: Seed of the training; NULL for target_base.
    task, metric, filter, value, stderr, n
steps: What each materialization cost.
    run_id
    batch_id VARCHAR: The `tuneshift run` call, backfill or single run it belongs to.
    asset
    round VARCHAR: Round, or NULL.
    finished_at TIMESTAMP: When it finished (UTC).
    seconds DOUBLE: Wall time of the step.
    model_seconds DOUBLE: Part of it spent loading, running or training models.
    model_calls INTEGER: Prompts that a model answered, scored or continued.
    cache_hits INTEGER: Prompts whose result came from the cache.
    tokens_generated BIGINT: Tokens that models generated.
    models VARCHAR: Models that ran, where `tuneshift plan` takes the step's speed from here.
    engine VARCHAR: What ran them: engine.type and how much at once.
    peak_bytes BIGINT: Peak memory of the process during the step; of all GPUs where there are any.
runs (batch_id): Every `tuneshift run`, also one that found nothing to do.
    batch_id VARCHAR: Names the run's rows in `steps`.
    finished_at TIMESTAMP: When it finished (UTC).
    seconds DOUBLE: Wall time, without starting the process.
cache_references: Which cached results and adapters each materialization used: what `tuneshift cache gc` keeps.
    asset
    round VARCHAR: Round, or empty.
    key VARCHAR: Key in a table of the cache, or `model:` and the id of a trained adapter.
materializations (asset, round): What each (asset, round) was last made from: what `tuneshift run` decides by.
    asset
    round VARCHAR: Round, or empty.
    code_version VARCHAR: Its code version then: a hash of the settings and files that it depends on.
    inputs VARCHAR: JSON object of what it read: "asset" or "asset/round", and the version of that.
    version VARCHAR: Version of what it wrote.
    run_id
    finished_at TIMESTAMP: When it finished (UTC).
attempts (asset, round): Materializations that have begun and not succeeded (yet).
    asset
    round VARCHAR: Round, or empty.
    run_id
    started_at TIMESTAMP: When it began (UTC): cached results since then stay (`tuneshift cache gc`).
models (role): What each model reference of transfer.yaml stood for when it was last resolved.
    role VARCHAR: source.base, source.adapter or source.fine_tuned, generator.model or target.base.
    reference VARCHAR: As in transfer.yaml.
    fingerprint VARCHAR: Of the files: weights, tokenizer and settings.
    commit VARCHAR: Commit of a hub model; NULL for another one.
    resolved_at TIMESTAMP: When (UTC).
""")  # fmt: skip

CACHE = "cache"
CACHED_RESPONSES, CACHED_SCORES = CACHE_TABLES = _tables("""
responses (key): Every response a model gave, by content: shared by transfers, rounds and runs.
    key VARCHAR: SHA-256 of model fingerprint, prompt token ids and decoding settings.
    text VARCHAR: The response.
    token_ids INTEGER[]: Generated token ids, the end token included when produced.
    finish_reason VARCHAR: stop or length.
    sum_logprob DOUBLE: Sum of the tokens' log-probabilities in nats.
    eos_logprob DOUBLE: The end token's part of it; NULL if truncated.
    added_at
scores (key): Log-likelihoods of given responses under a model, by content.
    key VARCHAR: SHA-256 of model fingerprint, prompt token ids and response token ids.
    sum_logprob DOUBLE: log p(y | x) in nats, summed over tokens.
    added_at
""")

MAIN_TABLES = _tables("""
transfers (name): Which folder the schema of each transfer belongs to.
    name VARCHAR: Name of the transfer and of its schema.
    folder VARCHAR: Its folder; relative to the database file's where both are in one project.
""")
