"""``rehearsal_set``: texts that the target writes by itself, to hold it to what it knows while it is trained."""

from collections import Counter

import dagster as dg

from tuneshift_dag.assets.common import Context, definition, example_rows, step
from tuneshift_dag.config import Transfer
from tuneshift_dag.method.rehearsal import rehearsal_texts
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import REHEARSAL_SET


def build_rehearsal_set(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(**definition(transfer, "rehearsal_set", REHEARSAL_SET, "pytorch", models=True))
    def rehearsal_set(context: Context, store: StoreResource, engines: EngineResource) -> dg.MaterializeResult:
        """Texts sampled from the target's start token alone; of a target that is asked in its chat format also its
        answers to questions of its own.

        They are a sample of what the target knows, with no data from outside. In every training step it is held to what
        it predicted in a few of them (`distill.retain`).
        """
        with step(context, store.store(), transfer, "rehearsal_set") as current:
            config = transfer.config
            texts = rehearsal_texts(
                engines.target(transfer),
                current.cache,
                config.distill.retain.texts,
                config.target_format,
                config.seed,
                current.cost,
                current.progress("texts sampled"),
            )
            rows = REHEARSAL_SET.frame([vars(text) for text in texts])
            current.write([(REHEARSAL_SET, rows)], content_version(rows))
        figures = {
            "kinds": dict(Counter(text.kind for text in texts)),
            "tokens": sum(len(text.token_ids) - text.prompt_tokens for text in texts),
            "examples": example_rows(rows, ["kind", "prompt", "response"]),
        }
        return current.result(len(rows), figures)

    return rehearsal_set
