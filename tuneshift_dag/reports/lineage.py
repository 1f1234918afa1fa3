"""Where a prompt came from and what it led to: the trees of ``tuneshift lineage``, each at the cost of its own tree.
(The view ``lineage`` has all of them.)"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.method.prompting import prompt_id as id_of_text
from tuneshift_dag.store import Store


@dataclass
class Prompt:
    """A prompt, and the generator calls that wrote it (`up`) or that were shown it as a seed (`down`)."""

    prompt_id: str
    prompt: str | None
    """None when no table holds it any more: its round was grown anew after it had seeded a call."""
    round: str | None
    """None for the seed set, and for a prompt that is gone."""
    fate: Literal["seed", "kept", "dropped", "unjudged", "unscored", "gone"]
    reason: str | None
    """Why the filter dropped it."""
    response: str | None
    """The fine-tuned model's response, when the pair is kept."""
    trained_on: bool
    """Whether the current distilled model was trained on it."""
    repeated: bool = False
    """Its calls stand under another node of the tree with the same id."""
    calls: list["Call"] = field(default_factory=list)


@dataclass
class Call:
    """A generator call, and its seeds (`up`) or the prompts that it wrote (`down`)."""

    proposal_id: str
    round: str
    number: int
    """Place among the round's calls, from 0."""
    written: int
    """New prompts that it brought."""
    dropped: int
    """List items of it that were dropped before scoring."""
    repeated: bool = False
    prompts: list[Prompt] = field(default_factory=list)


def up(store: Store, transfer: Transfer, prompt_id: str) -> Prompt:
    """The prompt with the call that wrote it, that call's seeds, the calls that wrote these, and so on."""
    return _grow(store, transfer.name, find(store, transfer, prompt_id), _CALLS_THAT_WROTE, _SEEDS_SHOWN)


def down(store: Store, transfer: Transfer, prompt_id: str) -> Prompt:
    """The prompt with every call that it seeded, the prompts that these wrote, and so on."""
    return _grow(store, transfer.name, find(store, transfer, prompt_id), _CALLS_SEEDED, _PROMPTS_WRITTEN)


def find(store: Store, transfer: Transfer, given: str) -> str:
    """The id of the prompt that is meant by its id, the beginning of exactly one id, or its text."""
    given = given.strip()
    names = {"given": given, "text_id": id_of_text(given)}
    found: list[str] = store.read(_IDS, names, transfer.name)["prompt_id"].to_list() if given else []
    if exact := [known for known in found if known in names.values()]:
        return exact[0]
    if len(found) > 1:
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise TuneshiftError(f"{given!r} begins {len(found)} prompt ids of {transfer.name} ({some}). Give more digits.")
    if not found:
        raise TuneshiftError(
            f"{transfer.name} has no prompt {given!r}. Ids are the column prompt_id of seed_set, synthetic_prompts and"
            f" filtered_dataset in {store.path}; the whole text of a prompt does as well."
        )
    return found[0]


def _grow(store: Store, schema: str, root_id: str, calls_of: str, prompts_of: str) -> Prompt:
    """The tree under a prompt. An id is expanded where it is met first, nearest to the root: so the tree is as large as
    the graph and not as the number of ways through it, and a cycle ends."""
    root = Prompt(**store.read(_PROMPTS, {"ids": [root_id]}, schema).row(0, named=True))
    prompts, calls = {root_id: root}, dict[str, Call]()
    again: list[Prompt] = []
    level = [root_id]
    while level:
        met = []
        for origin, details in _follow(store, schema, calls_of, _CALLS, level):
            call = Call(**details, repeated=details["proposal_id"] in calls)
            prompts[origin].calls.append(call)
            if not call.repeated:
                calls[call.proposal_id] = call
                met.append(call.proposal_id)
        level = []
        for origin, details in _follow(store, schema, prompts_of, _PROMPTS, met):
            prompt = Prompt(**details)
            calls[origin].prompts.append(prompt)
            if prompt.prompt_id in prompts:
                again.append(prompt)
            else:
                prompts[prompt.prompt_id] = prompt
                level.append(prompt.prompt_id)
    for prompt in again:
        # A second mention of a prompt without calls leaves nothing out.
        prompt.repeated = bool(prompts[prompt.prompt_id].calls)
    return root


def _follow(store: Store, schema: str, edges: str, nodes: str, ids: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, what its target says besides its edges) of every edge from the given ids."""
    met = store.read(edges, {"ids": ids}, schema).rows() if ids else []
    if met:
        found = store.read(nodes, {"ids": sorted({target for _, target in met})}, schema)
        details = dict(zip(found.to_series(), found.iter_rows(named=True), strict=True))
        yield from ((origin, details[target]) for origin, target in met)


_IDS = """
    SELECT prompt_id FROM (
        SELECT prompt_id FROM seed_set UNION SELECT prompt_id FROM synthetic_prompts
        UNION SELECT prompt_id FROM training_examples UNION SELECT unnest(seed_ids) FROM proposals
    ) WHERE starts_with(prompt_id, $given) OR prompt_id = $text_id ORDER BY prompt_id
"""
_CALLS_THAT_WROTE = """
    SELECT prompt_id, proposal_id FROM synthetic_prompts JOIN proposals USING (proposal_id)
    WHERE prompt_id IN (SELECT unnest($ids)) ORDER BY proposals.round, call
"""
_SEEDS_SHOWN = """
    SELECT proposal_id, prompt_id FROM (
        SELECT round, call, proposal_id, unnest(seed_ids) AS prompt_id, generate_subscripts(seed_ids, 1) AS place
        FROM proposals WHERE proposal_id IN (SELECT unnest($ids))
    ) ORDER BY round, call, place
"""
_CALLS_SEEDED = """
    SELECT prompt_id, proposal_id FROM (SELECT *, unnest(seed_ids) AS prompt_id FROM proposals)
    WHERE prompt_id IN (SELECT unnest($ids)) ORDER BY round, call
"""
_PROMPTS_WRITTEN = """
    SELECT proposal_id, prompt_id FROM synthetic_prompts WHERE proposal_id IN (SELECT unnest($ids)) ORDER BY position
"""
_CALLS = """
    SELECT proposal_id, round, call AS number,
        (SELECT count(*) FROM synthetic_prompts p WHERE p.proposal_id = c.proposal_id) AS written,
        (SELECT count(*) FROM rejected_prompts r WHERE r.proposal_id = c.proposal_id) AS dropped
    FROM proposals c WHERE proposal_id IN (SELECT unnest($ids))
"""
_PROMPTS = """
    SELECT i.prompt_id, coalesce(s.prompt, p.prompt) AS prompt, CASE WHEN s.prompt_id IS NULL THEN p.round END AS round,
        CASE
            WHEN s.prompt_id IS NOT NULL THEN 'seed'
            WHEN p.prompt_id IS NULL THEN 'gone'
            WHEN f.prompt_id IS NOT NULL THEN 'kept'
            WHEN r.prompt_id IS NOT NULL THEN 'dropped'
            WHEN pairs.prompt_id IS NOT NULL THEN 'unjudged'
            ELSE 'unscored'
        END AS fate,
        r.reason, f.response,
        i.prompt_id IN (
            SELECT prompt_id FROM training_examples JOIN distilled_models USING (model_id) WHERE current
        ) AS trained_on
    FROM (SELECT unnest($ids) AS prompt_id) i
    LEFT JOIN seed_set s ON s.prompt_id = i.prompt_id
    LEFT JOIN synthetic_prompts p ON p.prompt_id = i.prompt_id
    LEFT JOIN scored_pairs pairs ON pairs.prompt_id = p.prompt_id AND pairs.round = p.round
    LEFT JOIN filtered_dataset f ON f.prompt_id = p.prompt_id AND f.round = p.round
    LEFT JOIN rejected_pairs r ON r.prompt_id = p.prompt_id AND r.round = p.round
"""
