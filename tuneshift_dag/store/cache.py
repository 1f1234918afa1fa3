"""Content-addressed results of model calls, kept in the store.

A key names everything that can change a result: the model's fingerprint, the rendered prompt's token
ids and the decoding settings (for a score: the response's token ids). Batch size isn't part of it: in
bfloat16 the batch around a prompt can flip a near-tie, and whichever result came first is kept.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from tuneshift_dag.method.engine import Decoding, Response
from tuneshift_dag.store.database import Store
from tuneshift_dag.store.tables import CACHE, CACHED_RESPONSES, CACHED_SCORES, CACHED_TOKEN_SCORES


class ResponseCache:
    """Responses and scores by key. Each `put` is one transaction."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def response_key(self, fingerprint: str, prompt_ids: Sequence[int], decoding: Decoding) -> str:
        return _hash(fingerprint, _ids(prompt_ids), decoding.key())

    def score_key(self, fingerprint: str, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        return _hash(fingerprint, _ids(prompt_ids), _ids(response_ids))

    def responses(self, keys: Sequence[str]) -> dict[str, Response]:
        rows = self._read(CACHED_RESPONSES.name, keys)
        return {
            row["key"]: Response(
                row["text"], row["token_ids"], row["finish_reason"], row["sum_logprob"], row["eos_logprob"]
            )
            for row in rows
        }

    def scores(self, keys: Sequence[str]) -> dict[str, float]:
        return {row["key"]: row["sum_logprob"] for row in self._read(CACHED_SCORES.name, keys)}

    def put(self, responses: dict[str, Response], scores: dict[str, float]) -> None:
        rows = CACHED_RESPONSES.frame([{"key": key, **vars(r)} for key, r in responses.items()])
        values = CACHED_SCORES.frame([{"key": k, "sum_logprob": v} for k, v in scores.items()])
        self.store.append_all(CACHE, [(CACHED_RESPONSES, rows), (CACHED_SCORES, values)])

    def token_scores(self, keys: Sequence[str]) -> dict[str, list[float]]:
        return {row["key"]: row["logprobs"] for row in self._read(CACHED_TOKEN_SCORES.name, keys)}

    def put_token_scores(self, scores: dict[str, list[float]]) -> None:
        rows = CACHED_TOKEN_SCORES.frame([{"key": k, "logprobs": v} for k, v in scores.items()])
        self.store.append_all(CACHE, [(CACHED_TOKEN_SCORES, rows)])

    def _read(self, table: str, keys: Sequence[str]) -> list[dict[str, Any]]:
        if not keys:
            return []
        query = f"SELECT * FROM {CACHE}.{table} WHERE key IN (SELECT unnest(?))"
        return self.store.read(query, [list(keys)], little_memory=True).to_dicts()


def _ids(ids: Sequence[int]) -> str:
    return ",".join(map(str, ids))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
