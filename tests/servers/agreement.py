"""How far a server's figures are from those of the local engine in bfloat16, with the same weights."""

from typing import Any

from tuneshift_dag.method import Decoding, Pair, Scorer, perplexity

# In nats per token, for a model of 135M parameters. Rounding differs: bfloat16 here and there, and llama.cpp
# multiplies 4-bit weights by 8-bit activations. The mean over pairs is far smaller.
MEAN_TOLERANCE = 0.05
TOLERANCE = 0.25
KEEP_AGREEMENT = 0.95


def collect(batches: Any) -> list[Any]:
    found = dict(item for batch in batches for item in batch)
    return [found[i] for i in range(len(found))]


def agreement(
    server: Scorer, local: Scorer, prompts: list[str], decoding: Decoding, threshold: float
) -> dict[str, Any]:
    """Compare own and cross log-probabilities, and what rule `both` keeps.

    The local engine scores the very responses of the server, so a near-tie that the two break differently
    doesn't blur the comparison; the keep decisions are each engine's own, from start to end.
    """
    ids = [local.encode(prompt) for prompt in prompts]
    assert ids == [server.encode(prompt) for prompt in prompts]
    theirs: list[Pair] = collect(server.pairs(ids, [{} for _ in ids], decoding))
    ours: list[Pair] = collect(local.pairs(ids, [{} for _ in ids], decoding))
    crossed = collect(local.pairs(ids, [{"base": p.base, "fine_tuned": p.fine_tuned} for p in theirs], decoding))
    own = collect(local.pairs(ids, [{"base": p.fine_tuned, "fine_tuned": p.base} for p in theirs], decoding))
    apart: dict[str, list[float]] = {"own": [], "cross": []}
    for they, cross, swapped in zip(theirs, crossed, own, strict=True):
        f, b = they.fine_tuned, they.base
        apart["own"].append(abs(f.sum_logprob - swapped.fine_tuned_on_base) / len(f.token_ids))
        apart["own"].append(abs(b.sum_logprob - swapped.base_on_fine_tuned) / len(b.token_ids))
        if they.base_on_fine_tuned is not None and they.fine_tuned_on_base is not None:
            apart["cross"].append(abs(they.base_on_fine_tuned - cross.base_on_fine_tuned) / len(f.token_ids))
            apart["cross"].append(abs(they.fine_tuned_on_base - cross.fine_tuned_on_base) / len(b.token_ids))
    kept = [(_keeps(they, threshold), _keeps(we, threshold)) for they, we in zip(theirs, ours, strict=True)]
    return {
        "pairs": len(kept),
        "kept_by_server": sum(they for they, _ in kept),
        "kept_by_local": sum(we for _, we in kept),
        "keep_agreement": sum(they == we for they, we in kept) / len(kept),
        "same_fine_tuned_response": _share(theirs, ours, "fine_tuned"),
        "same_base_response": _share(theirs, ours, "base"),
        **{
            f"{name}_nats_per_token": {"mean": sum(values) / len(values), "largest": max(values)}
            for name, values in apart.items()
            if values
        },
    }


def _share(theirs: list[Pair], ours: list[Pair], side: str) -> float:
    pairs = zip(theirs, ours, strict=True)
    return sum(getattr(a, side).token_ids == getattr(b, side).token_ids for a, b in pairs) / len(theirs)


def _keeps(pair: Pair, threshold: float) -> bool:
    """Rule `both` of `tuneshift_dag.method.filters`."""
    f, b = pair.fine_tuned, pair.base
    sure, unsure = (perplexity(r.sum_logprob, len(r.token_ids)) for r in (f, b))
    if not f.text.strip() or f.finish_reason == "length" or sure is None or unsure is None:
        return False
    return sure < threshold < unsure
