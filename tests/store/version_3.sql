-- A file of schema version 3 (tuneshift_dag 0.1.0), with one transfer: what its code wrote, shortened.
CREATE TABLE main.tuneshift_schema (version INTEGER);
INSERT INTO main.tuneshift_schema VALUES (3);
CREATE SCHEMA cache;
CREATE SCHEMA banking;
CREATE TABLE cache.responses (key VARCHAR, text VARCHAR, token_ids INTEGER[], finish_reason VARCHAR, sum_logprob
    DOUBLE, eos_logprob DOUBLE);
CREATE TABLE cache.scores (key VARCHAR, sum_logprob DOUBLE);
CREATE TABLE cache.token_scores (key VARCHAR, logprobs DOUBLE[]);
CREATE TABLE banking.seed_set (prompt_id VARCHAR, prompt VARCHAR, response VARCHAR, PRIMARY KEY (prompt_id));
CREATE TABLE banking.round_seeds (round VARCHAR, call INTEGER, slot INTEGER, prompt_id VARCHAR, prompt VARCHAR,
    response VARCHAR, PRIMARY KEY (round, call, slot));
CREATE TABLE banking.proposals (round VARCHAR, proposal_id VARCHAR, call INTEGER, seed_ids VARCHAR[], text VARCHAR,
    PRIMARY KEY (round, call));
CREATE TABLE banking.synthetic_prompts (round VARCHAR, prompt_id VARCHAR, prompt VARCHAR, proposal_id VARCHAR,
    position INTEGER, PRIMARY KEY (round, prompt_id));
CREATE TABLE banking.rejected_prompts (round VARCHAR, proposal_id VARCHAR, position INTEGER, prompt VARCHAR, reason
    VARCHAR);
CREATE TABLE banking.scored_pairs (round VARCHAR, prompt_id VARCHAR, prompt VARCHAR, fine_tuned_response VARCHAR,
    base_response VARCHAR, fine_tuned_tokens INTEGER, base_tokens INTEGER, fine_tuned_finish VARCHAR, base_finish
    VARCHAR, fine_tuned_own_logprob DOUBLE, base_own_logprob DOUBLE, base_cross_logprob DOUBLE, fine_tuned_cross_logprob
    DOUBLE, fine_tuned_eos_logprob DOUBLE, base_eos_logprob DOUBLE, ppl_fine_tuned DOUBLE, ppl_base DOUBLE,
    ppl_base_cross DOUBLE, ppl_fine_tuned_cross DOUBLE, base_alone_logprob DOUBLE, ppl_base_alone DOUBLE, agreement
    DOUBLE, ppl_target DOUBLE, discriminator_score DOUBLE);
CREATE TABLE banking.filtered_dataset (round VARCHAR, prompt_id VARCHAR, prompt VARCHAR, response VARCHAR,
    ppl_fine_tuned DOUBLE, ppl_base DOUBLE, margin DOUBLE);
CREATE TABLE banking.rejected_pairs (round VARCHAR, prompt_id VARCHAR, reason VARCHAR);
CREATE TABLE banking.threshold_report (rule VARCHAR, threshold DOUBLE, pairs_kept BIGINT, kept_share DOUBLE,
    distinct_responses BIGINT, mean_margin DOUBLE, by_round VARCHAR, current BOOLEAN, PRIMARY KEY (rule, threshold));
CREATE TABLE banking.diversity_map (prompt_id VARCHAR, x DOUBLE, y DOUBLE, PRIMARY KEY (prompt_id));
CREATE TABLE banking.round_similarity (round VARCHAR, prompts INTEGER, similarity DOUBLE, PRIMARY KEY (round));
CREATE TABLE banking.distilled_models (model_id VARCHAR, dataset_version VARCHAR, pairs INTEGER, target VARCHAR,
    target_weights VARCHAR, settings VARCHAR, filter VARCHAR, curve VARCHAR, seconds DOUBLE, path VARCHAR, created_at
    TIMESTAMP, current BOOLEAN, PRIMARY KEY (model_id));
CREATE TABLE banking.training_examples (model_id VARCHAR, prompt_id VARCHAR, round VARCHAR, PRIMARY KEY (model_id,
    prompt_id));
CREATE TABLE banking.evaluations (model VARCHAR, prompt_id VARCHAR, prompt VARCHAR, expected VARCHAR, response
    VARCHAR, correct BOOLEAN, correct_flexible BOOLEAN, PRIMARY KEY (model, prompt_id));
CREATE TABLE banking.accuracy (model VARCHAR, value DOUBLE, low DOUBLE, high DOUBLE, n INTEGER, flexible DOUBLE,
    flexible_low DOUBLE, flexible_high DOUBLE, PRIMARY KEY (model));
CREATE TABLE banking.retention (model VARCHAR, perplexity DOUBLE, bits_per_byte DOUBLE, tokens INTEGER, bytes
    INTEGER, PRIMARY KEY (model));
CREATE TABLE banking.task_scores (key VARCHAR, model VARCHAR, task VARCHAR, task_version VARCHAR, metric VARCHAR,
    filter VARCHAR, value DOUBLE, stderr DOUBLE, n INTEGER, example_limit INTEGER, current BOOLEAN, PRIMARY KEY (key,
    task, metric, filter));
CREATE TABLE banking.comparison (arm VARCHAR, runs INTEGER, candidates INTEGER, pairs INTEGER, shared_with_random
    DOUBLE, distinct_responses DOUBLE, distinct_bigrams DOUBLE, repetition DOUBLE, similarity DOUBLE, by_run DOUBLE[],
    value DOUBLE, low DOUBLE, high DOUBLE, vs_random DOUBLE, vs_random_low DOUBLE, vs_random_high DOUBLE, vs_unfiltered
    DOUBLE, vs_unfiltered_low DOUBLE, vs_unfiltered_high DOUBLE, PRIMARY KEY (arm));
CREATE TABLE banking.comparison_answers (arm VARCHAR, seed INTEGER, prompt_id VARCHAR, response VARCHAR, correct
    BOOLEAN);
CREATE TABLE banking.comparison_tasks (arm VARCHAR, seed INTEGER, task VARCHAR, metric VARCHAR, filter VARCHAR,
    value DOUBLE, stderr DOUBLE, n INTEGER);
CREATE TABLE banking.steps (run_id VARCHAR, batch_id VARCHAR, asset VARCHAR, round VARCHAR, finished_at TIMESTAMP,
    seconds DOUBLE, model_seconds DOUBLE, model_calls INTEGER, cache_hits INTEGER, tokens_generated BIGINT, models
    VARCHAR, engine VARCHAR, peak_bytes BIGINT);
CREATE TABLE banking.runs (batch_id VARCHAR, finished_at TIMESTAMP, seconds DOUBLE, PRIMARY KEY (batch_id));
CREATE TABLE banking.cache_references (asset VARCHAR, round VARCHAR, key VARCHAR);
-- Made by mistake, and always empty.
CREATE TABLE cache.steps AS FROM banking.steps;
CREATE TABLE cache.scored_pairs AS FROM banking.scored_pairs;
CREATE TABLE cache.cache_references AS FROM banking.cache_references;
CREATE TABLE cache.rejected_pairs (round VARCHAR, prompt_id VARCHAR, reason VARCHAR);
CREATE VIEW cache.rejections AS SELECT round, reason FROM cache.rejected_pairs;
CREATE VIEW banking.rejections AS SELECT round, reason FROM banking.rejected_pairs;
COMMENT ON VIEW banking.rejections IS 'Everything that was dropped, one row each, with its reason. [00000000]';

INSERT INTO cache.responses VALUES ('kept', 'late_transfer', [1, 2], 'stop', -0.5, -0.1);
INSERT INTO cache.scores VALUES ('kept score', -1.5);
INSERT INTO cache.token_scores VALUES ('masked', [-1.0, -0.5]);
INSERT INTO banking.seed_set VALUES ('5eed', 'Where is my card?', ' card_arrival');
INSERT INTO banking.scored_pairs BY NAME SELECT 'round_01' AS round, 'a1' AS prompt_id, 'Is my transfer late?' AS prompt,
    ' late_transfer' AS fine_tuned_response, 1.1 AS ppl_fine_tuned, 2.5 AS ppl_base, 3.5 AS ppl_base_alone, 1.0 AS
    agreement, 0.7 AS discriminator_score;
INSERT INTO banking.rejected_pairs VALUES ('round_01', 'b2', 'below_threshold');
INSERT INTO banking.distilled_models BY NAME
    SELECT 'm1' AS model_id, '/somewhere/.tuneshift/output/banking/models/m1' AS path, true AS current
    UNION ALL SELECT 'm2', '/elsewhere/m2', false;
INSERT INTO banking.cache_references VALUES ('scored_pairs', 'round_01', 'kept'),
    ('scored_pairs', 'round_01', 'kept score'), ('scored_pairs', 'round_01', 'masked');
