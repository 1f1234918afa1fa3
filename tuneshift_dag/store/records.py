"""The record of what was made from what, and what is out of date by it.

It stands in the database beside the rows that it speaks of, and is written in their transaction: a deleted, restored
or copied file never disagrees with itself. `tuneshift run` and the automation both ask `Records.causes`, and nothing
else; Dagster's UI goes by its own event log (docs/concepts.md says where the two may differ).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from tuneshift_dag.config import Transfer, round_key, round_number
from tuneshift_dag.config.versions import Rounds, code_version, inputs_of
from tuneshift_dag.store import Spool, Store, in_chunks, insert, now
from tuneshift_dag.store.tables import ATTEMPTS, MATERIALIZATIONS

ROUND_ASSETS = ("synthetic_prompts", "scored_pairs", "filtered_dataset")
"""What a round materializes, in this order."""
_MADE = ("seed_set", *ROUND_ASSETS, "distilled_model", "evaluation")


def place(asset: str, round_: str | None = None) -> str:
    """How an asset, or a round of one, is named in the record."""
    return f"{asset}/{round_}" if round_ else asset


def seeds_reporter(number: int) -> tuple[str, str | None]:
    """The asset, and its round, that reports the seeds of round ``number``."""
    return ("seed_set", None) if number == 1 else ("filtered_dataset", round_key(number - 1))


class Records:
    """The record of one transfer at one moment: read it again after every change."""

    def __init__(self, store: Store, transfer: Transfer) -> None:
        self.store = store
        self.transfer = transfer
        columns = "asset, round, code_version, inputs, version, a.run_id IS NOT NULL AS attempted"
        query = f"SELECT {columns} FROM materializations FULL JOIN attempts a USING (asset, round)"
        noted = store.read(query, schema=transfer.name).rows(named=True)
        self._made = {place(row["asset"], row["round"]): row for row in noted if row["version"] is not None}
        self.attempts = {place(row["asset"], row["round"]) for row in noted if row["attempted"]}
        self.ahead: list[tuple[str, str | None]] = []
        """(asset, round) of what `to_do` takes as made, each with another result than before."""

    def causes(self, asset: str, round_: str | None = None) -> list[str]:
        """Why an asset, or a round of one, must be made (again); [] when it needn't.

        ``missing``: it never was. ``code``: its settings, files, weights or code changed. ``input PLACE``: what it was
        made from has another version, or is gone. ``attempt``: the last one failed or was killed, or is going on.
        """
        if (asset, round_) in self.ahead:
            return []
        here = place(asset, round_)
        made = self._made.get(here)
        if made is None or (asset == "distilled_model" and not self.adapter_is_there()):
            return ["missing"]
        causes = ["code"] if made["code_version"] != code_version(self.transfer, asset) else []
        then, present = json.loads(made["inputs"]), self.inputs(asset, round_)
        causes += [f"input {name}" for name in sorted({*then, *present}) if then.get(name) != present.get(name)]
        return [*causes, "attempt"] if here in self.attempts else causes

    def adapter_is_there(self) -> bool:
        """Whether the weights of the distilled model, if there is one, are still on the disk."""
        (found,) = self.store.read("SELECT path FROM distilled_models WHERE current", schema=self.transfer.name)
        return all((self.store.absolute(path) / "adapter_model.safetensors").is_file() for path in found)

    def changed(self) -> list[str]:
        """The assets whose settings, files, weights or code have changed since one of their rounds was made. Those that
        were made of the first rounds alone (`tuneshift run --rounds`) haven't changed."""
        kinds = [asset for asset in _MADE if asset != "evaluation" or self.transfer.evaluates]
        made = {asset: {row["code_version"] for row in self._made.values() if row["asset"] == asset} for asset in kinds}
        for rounds in range(self.transfer.config.rounds, 0, -1):
            made = {asset: versions for asset, versions in made.items() if versions}
            for asset, versions in made.items():
                versions.discard(code_version(self.transfer.with_rounds(rounds), asset))
        return [asset for asset, versions in made.items() if versions]

    def is_of_another_model(self, asset: str) -> bool:
        """Whether what was made last was made from another distilled model than there is now."""
        made = self._made.get(asset)
        then = json.loads(made["inputs"]).get("distilled_model") if made else None
        return then not in (None, self.version("distilled_model"))

    def inputs(self, asset: str, round_: str | None = None) -> dict[str, str]:
        """The present version of everything that an asset is made from, by `place`; empty where nothing was made."""
        keys = self.transfer.round_keys
        rounds: dict[Rounds, Sequence[str | None]] = {
            "same": [round_],
            "earlier": [key for key in keys if key < (round_ or "")],
            "all": keys,
            "none": [None],
        }
        found = {
            place(name, one): self.version(name, one)
            for name, of in inputs_of(self.transfer, asset)
            for one in rounds[of]
        }
        for loop in self.transfer.loops.values() if asset == "comparison" else ():
            grown = Records(self.store, loop)
            found |= {place(loop.name, one): grown.version("filtered_dataset", one) for one in keys}
        return found

    def version(self, asset: str, round_: str | None = None) -> str:
        """Empty when nothing was made."""
        maker = (asset, round_)
        if asset == "round_seeds" and round_:  # drawn by another step: see `config.versions.INPUTS`
            maker = seeds_reporter(round_number(round_))
        if maker in self.ahead:
            return "another"
        made = self._made.get(place(asset, round_))
        return str(made["version"]) if made else ""

    def grown(self, round_: str) -> bool:
        """Whether a round has prompts: one after that which reached ``target_pairs`` has none, and nothing to keep."""
        counted = "SELECT count(*) FROM synthetic_prompts WHERE round = ?"
        return bool(self.store.read(counted, [round_], self.transfer.name).item())

    def missing_rounds(self, asset: str) -> list[str]:
        return [round_ for round_ in self.transfer.round_keys if place(asset, round_) not in self._made]


@dataclass(frozen=True)
class Due:
    """What must be materialized next: assets of one round, in order, or assets without rounds."""

    assets: tuple[str, ...]
    round: str | None = None


def next_step(records: Records, regrow: bool) -> Due | None:
    """The first step, in round order, that is missing or out of date; None when all is up to date.

    Rounds that are out of date only because other prompts seed them now keep theirs, unless ``regrow``.
    """
    transfer = records.transfer
    if records.causes("seed_set"):
        return Due(("seed_set",))
    for round_ in transfer.round_keys:
        for number, asset in enumerate(ROUND_ASSETS):
            causes = records.causes(asset, round_)
            # The seeds, or the earlier rounds' prompts that it must not repeat.
            only_seeds = all(cause.startswith(("input round_seeds/", "input synthetic_prompts/")) for cause in causes)
            keeps = asset == "synthetic_prompts" and not regrow and only_seeds
            if causes and not (keeps and records.grown(round_)):
                return Due(ROUND_ASSETS[number:], round_)
    # The report comes before the training: it is cheap, and says what to do when too little was kept.
    after = [
        "threshold_report",
        *(["rehearsal_set"] if transfer.rehearses else []),
        "distilled_model",
    ]
    after += ["evaluation"] if transfer.evaluates else []
    after += ["diversity_map"] if transfer.config.diversity_map else []
    stale = [asset for asset in after if records.causes(asset)]
    if "distilled_model" in stale:  # a new model needs it anyway
        stale = [asset for asset in after if asset in stale or asset == "evaluation"]
    return Due(tuple(stale)) if stale else None


def to_do(store: Store, transfer: Transfer, regrow: bool) -> list[tuple[str, str | None]]:
    """(asset, round) of the most that `tuneshift run` would make now: a step may turn out to change nothing."""
    records = Records(store, transfer)
    while due := next_step(records, regrow):
        records.ahead += [(asset, due.round) for asset in (due.assets if due.round else due.assets[:1])]
    return records.ahead


def begin(store: Store, transfer: Transfer, asset: str, round_: str | None, run_id: str) -> None:
    """Note that a materialization has begun: until `end` it is taken up again by whoever asks for causes."""
    # The note of an earlier attempt that never ended stays: what was computed since then is not to be collected.
    row = {"asset": asset, "round": round_ or "", "run_id": run_id, "started_at": now()}
    store.append_all(transfer.name, [(ATTEMPTS, ATTEMPTS.frame([row]))])


def end(store: Store, transfer: Transfer, asset: str, round_: str | None) -> None:
    store.replace(transfer.name, ATTEMPTS, ATTEMPTS.empty(), asset=asset, round=round_ or "")


def note(
    connection: Any,
    asset: str,
    round_: str | None,
    version: str,
    run_id: str,
    code: str = "",
    inputs: Mapping[str, str] | None = None,
) -> None:
    """Write what was made, within the transaction of its rows; ``inputs`` are those before anything was read."""
    row = {
        "asset": asset,
        "round": round_ or "",
        "code_version": code,
        "inputs": json.dumps(dict(inputs or {}), sort_keys=True),
        "version": version,
        "run_id": run_id,
        "finished_at": now(),
    }
    connection.execute("DELETE FROM materializations WHERE asset = ? AND round = ?", [asset, round_ or ""])
    insert(connection, MATERIALIZATIONS, MATERIALIZATIONS.frame([row]))


def content_version(*frames: pl.DataFrame | Spool) -> str:
    """Hash of the rows, whatever their order: the same content is the same data version. (A spool's chunks are in the
    order of their rows.)"""
    digest = hashlib.sha256()
    for chunk in (chunk for frame in frames for chunk in in_chunks(frame)):
        for row in sorted(json.dumps(list(row)) for row in chunk.iter_rows()):
            digest.update(row.encode() + b"\n")
    return digest.hexdigest()[:16]
