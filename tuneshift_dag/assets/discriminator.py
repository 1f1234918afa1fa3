"""The discriminator of ``filter.discriminator``, for ``scored_pairs``: trained once, and asked about every prompt.

It is known by the hash of its seeds, generated prompts, settings and base, and its scores by the hash of its files.
"""

from pathlib import Path

import dagster as dg

from tuneshift_dag.assets.common import Step, prompt_chunks
from tuneshift_dag.home import output_dir
from tuneshift_dag.method import discriminator, scoring
from tuneshift_dag.resources.dagster_resources import EngineResource
from tuneshift_dag.store.cache import ResponseCache
from tuneshift_dag.store.database import Store
from tuneshift_dag.config.transfer import Transfer, round_key

# Whose prompts it learns to call generated: see `tuneshift_dag.method.discriminator`.
TAUGHT_BY = round_key(1)


def ask_discriminator(
    current: Step,
    database: Store,
    cache: ResponseCache,
    engines: EngineResource,
    transfer: Transfer,
    round_: str,
    total: int,
) -> Path:
    """The folder of the discriminator, whose scores of a round's prompts are in the cache afterwards.

    Its base is the source's, and memory holds one copy of that: what is loaded is released before and after it.
    """
    adapter = _trained(current, database, engines, transfer)
    engines.release()
    engine = engines.discriminator(transfer, adapter)
    progress = scoring.chunk_progress(current.progress("prompts scored by the discriminator"), 2 * total)
    with engine.session():
        for prompts in prompt_chunks(database, transfer, round_, engine.chunk_size):
            discriminator.scores(engine, cache, list(prompts["prompt"]), current.cost, progress(2 * len(prompts)))
            current.spool_keys()
    engines.release()
    return adapter


def _trained(current: Step, database: Store, engines: EngineResource, transfer: Transfer) -> Path:
    settings = transfer.config.filter.discriminator
    assert settings is not None
    # Ids are hashes, so this is a draw: the same one each time, and a few other prompts displace few of them.
    generated = database.read(
        "SELECT prompt FROM synthetic_prompts WHERE round = ? ORDER BY prompt_id LIMIT ?",
        [TAUGHT_BY, settings.steps * discriminator.EACH_A_STEP],
        transfer.name,
    )["prompt"]
    if generated.is_empty():
        raise dg.Failure(
            f"synthetic_prompts has no {TAUGHT_BY}, from which filter.discriminator learns what generated prompts are"
            " like: materialize that round first.",
            allow_retries=False,
        )
    batches = discriminator.training_batches(transfer.seeds, list(generated), settings.steps)
    name = discriminator.identity(engines.source(transfer).fingerprint("base"), batches, transfer.config.seed)
    folder = output_dir(transfer.name) / "discriminators" / name
    log = current.context.log
    if (folder / "adapter_model.safetensors").is_file():
        log.info(f"discriminator {name} is already trained")
        return folder

    def on_step(number: int, steps: int, loss: float) -> None:
        if number % max(1, steps // 5) == 0 or number == steps:
            log.info(f"training the discriminator: step {number}/{steps}, loss {loss:.3f} nats per token")

    with current.cost.model_time():
        engines.train_discriminator(transfer, batches, folder, on_step)
    return folder
