"""The whole method, small, on the packaged models and through Dagster's instance."""

import json
import shutil
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import edit
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.home import database_file
from tuneshift_dag.models.references import resolve_model
from tuneshift_dag.reports import report
from tuneshift_dag.reports.export import export
from tuneshift_dag.runner import Runner
from tuneshift_dag.store import Store

PACKAGED = Path(__file__).parents[1] / "transfers" / "banking_intents"


@pytest.mark.e2e
def test_a_small_transfer_of_the_packaged_models(tmp_path: Path) -> None:
    folder = tmp_path / "transfers" / "banking_intents"
    shutil.copytree(PACKAGED, folder)
    heldout = (folder / "heldout.jsonl").read_text().splitlines()
    (folder / "heldout.jsonl").write_text("\n".join(heldout[::32]) + "\n")
    edit(
        folder,
        {
            "generator.calls_per_round": 12,
            "distill.epochs": 1,
            "distill.retain": {"texts": 12},
            "evaluation.max_new_tokens": 12,
            "models.workers": 1,  # the other core has tests of its own to run
            "rounds": 2,
            "diversity_map": False,
        },
    )
    (tmp_path / "dagster").mkdir()
    instance = dg.DagsterInstance.local_temp(str(tmp_path / "dagster"))
    store = Store(database_file())

    Runner(load_transfer(folder), instance).run()
    first = report(store, load_transfer(folder))
    assert first["rounds"] == 2
    assert first["pairs_scored"] == first["prompts"] >= 8
    assert first["model_calls"] >= 4 * first["pairs_scored"]
    assert first["accuracy"]["source_fine_tuned"]["value"] > 0.5
    assert first["accuracy"]["source_base"]["value"] == 0
    intents = {json.loads(line)["response"] for line in heldout}
    kept = store.read("SELECT trim(response) AS r FROM filtered_dataset", schema="banking_intents")["r"]
    assert len(set(kept) & intents) >= len(set(kept)) / 2, "kept responses are the fine-tuned model's, not the base's"

    assert Runner(load_transfer(folder), instance).run().materialized == []
    assert report(store, load_transfer(folder))["model_calls"] == 0

    check_export(store, folder, tmp_path / "out")


def check_export(store: Store, folder: Path, out: Path) -> None:
    """The exported adapter works on the plain target with nothing of ours; the merged model alone gives the same."""
    transfer = load_transfer(folder)
    export(store, transfer, out, merged=True)
    files = resolve_model(transfer.config.target.base, folder, "target.base")
    base = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, out / "adapter")
    ids = AutoTokenizer.from_pretrained(files.path)("Customer query: hello\nIntent:", return_tensors="pt").input_ids
    with torch.inference_mode():
        tuned = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)(ids).logits
    assert (tuned - plain).abs().max() > 0
    # To what bfloat16, in which the sum of both weights is saved, rounds.
    assert (merged - tuned).abs().mean() < 0.1 * (tuned - plain).abs().mean()
    assert "convert_hf_to_gguf.py" in (out / "merged" / "README.md").read_text()
    rows = pl.read_parquet(out / "dataset.parquet")
    chats = [json.loads(line) for line in (out / "dataset.jsonl").read_text().splitlines()]
    assert len(rows) == len(chats) == report(store, transfer)["model"]["pairs"]
    card = (out / "adapter" / "README.md").read_text()
    assert f"`both`, threshold {transfer.config.filter.threshold:g}" in card
    assert transfer.seeds[0] in card
