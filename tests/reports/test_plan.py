"""`tuneshift plan`: the memory that a run needs, the speeds that were recorded, what it prints. No model is loaded."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import Run
from tests.fake_engine import FakeEngine
from tests.fakes import FakeModels
from tuneshift_dag import TuneshiftError
from tuneshift_dag.cli import rendering
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.config.schema import Distill
from tuneshift_dag.home import database_file
from tuneshift_dag.reports import plan as plans
from tuneshift_dag.reports.plan import ModelSize
from tuneshift_dag.store import Store
from tuneshift_dag.store.records import ROUND_ASSETS, to_do
from tuneshift_dag.store.tables import DISTILLED_MODELS, STEPS

Edit = Callable[[str, Any], None]
# Small, and of a size that is known exactly.
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": True,
}  # fmt: skip
# The layers of Llama 3.1 8B, which has 32 of them: 218 million parameters each.
LARGE = {
    "model_type": "llama",
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM2 = ModelSize.from_config(
    {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
     "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True}
)  # fmt: skip
GEMMA = ModelSize.from_config(
    {"text_config": {
        "num_hidden_layers": 18, "hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144}}
)  # fmt: skip
# The packaged transfer's run: (asset, round, seconds, model calls) of `steps`, and of `distilled_models` its training.
STEPS_RECORDED = [
    ("synthetic_prompts", "round_01", 42.8, 320),
    ("synthetic_prompts", "round_02", 23.5, 320),
    ("scored_pairs", "round_01", 36.8, 1040),
    ("scored_pairs", "round_02", 26.0, 1240),
    ("rehearsal_set", None, 30.0, 384),
    ("evaluation", None, 48.9, 924),
]
AFTER_ROUNDS = ["distilled_model", "evaluation"]
TRAINED = {"pairs": 1648, "seconds": 307.9, "epochs": 3, "validation_fraction": 0.05}


@pytest.fixture
def sized(transfer_folder: Path) -> Path:
    """A transfer whose model has a config.json that says how large it is."""
    (transfer_folder / "models" / "tiny-base" / "config.json").write_text(json.dumps(CONFIG))
    return transfer_folder


@pytest.fixture
def huge(sized: Path) -> Path:
    """Its model of 1,400 billion parameters fits no machine."""
    config = {**CONFIG, "num_hidden_layers": 400, "hidden_size": 16384, "intermediate_size": 65536}
    (sized / "models" / "tiny-base" / "config.json").write_text(json.dumps(config))
    return sized


@pytest.fixture
def enlarge(sized: Path, edit_config: Edit) -> Callable[..., None]:
    """Give one model of the transfer a folder of its own, with so many of the `LARGE` layers."""

    def give(key: str, layers: int) -> None:
        folder = sized / "models" / f"{key}-{layers}" / "tiny-base"
        shutil.copytree(sized / "models" / "tiny-base", folder, dirs_exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**LARGE, "num_hidden_layers": layers}))
        edit_config(key, str(folder.relative_to(sized)))

    return give


@pytest.fixture
def recorded(sized: Path) -> Store:
    """The database of a run: only what it cost."""
    store = Store(database_file())
    write_steps(store, "first", STEPS_RECORDED, minute=0)
    settings = {key: TRAINED[key] for key in ("epochs", "validation_fraction")}
    model = {column.name: None for column in DISTILLED_MODELS.columns} | {
        "model_id": "m", "pairs": TRAINED["pairs"], "seconds": TRAINED["seconds"], "settings": json.dumps(settings),
        "created_at": datetime(2026, 11, 24, 8, 7),
    }  # fmt: skip
    store.append_all("banking", [(DISTILLED_MODELS, DISTILLED_MODELS.frame([model]))])
    return store


def write_steps(
    store: Store, batch: str, steps: list[tuple[Any, ...]], minute: int, cache_hits: int = 0, **ran: Any
) -> None:
    """``ran``: models, engine and tokens_generated of each step; NULL, as older versions recorded them, without."""
    unknown = dict.fromkeys(("models", "engine", "tokens_generated"))
    rows = [
        {
            "run_id": batch, "batch_id": batch, "asset": asset, "round": round_, "seconds": seconds,
            "finished_at": datetime(2026, 11, 24, 8, minute), "model_seconds": seconds, "model_calls": calls,
            "cache_hits": cache_hits, "peak_bytes": 2_000_000_000, **unknown, **ran,
        }
        for asset, round_, seconds, calls in steps
    ]  # fmt: skip
    store.append_all("banking", [(STEPS, STEPS.frame(rows))])


def make(folder: Path, store: Store) -> dict[str, Any]:
    return plans.plan(store, load_transfer(folder))


def chosen(folder: Path, store: Store) -> dict[str, plans.Speed]:
    transfer = load_transfer(folder)
    return plans.chosen_speeds(plans.recorded_speeds(store, transfer), transfer)


def needs(folder: Path, total: float, usable: float | None = None) -> tuple[dict[str, float], list[str]]:
    """Memory and warnings on a machine with so many bytes."""
    transfer = load_transfer(folder)
    return plans.memory(transfer, plans.work(Store(database_file()), transfer), total, usable or total)


class TestModelsAndEngines:
    def test_of_a_step_that_runs_no_model_are_none(self, transfer_folder: Path) -> None:
        transfer = load_transfer(transfer_folder)
        assert plans.runs_on(transfer, "filtered_dataset") == (None, None)

    def test_are_those_of_transfer_yaml(self, transfer_folder: Path, edit_config: Edit) -> None:
        edit_config("target.base", "other/target")
        edit_config("generator.model", "other/generator")

        def ran(asset: str) -> tuple[str | None, str | None]:
            return plans.runs_on(load_transfer(transfer_folder), asset)

        assert ran("synthetic_prompts") == ("other/generator", "local")
        assert ran("scored_pairs") == ("models/tiny-base", "local")
        assert ran("distilled_model") == ("other/target", "local")
        assert ran("evaluation") == ("models/tiny-base, other/target", "local")
        edit_config("engine", {"type": "ray", "ray": {"actors": 3}})
        assert ran("synthetic_prompts") == ("other/generator", "ray, 3 actors × 1 CPU")
        assert ran("distilled_model") == ("other/target", "local")
        server = {"base_url": "http://a/v1", "concurrency": 8}
        served = {"type": "openai", "server": server, "base": {"model": "b"}, "fine_tuned": {"model": "f"}}
        edit_config("engine", served)
        assert ran("scored_pairs") == ("b", "openai, 8 requests at once, http://a/v1")
        assert ran("synthetic_prompts") == ("other/generator", "local")
        edit_config("engine", {"type": "vllm", "vllm": {"concurrency": 8, "tensor_parallel_size": 2}})
        assert ran("scored_pairs") == ("models/tiny-base", "vllm, 8 requests at once, each model on 2 GPUs")
        edit_config("engine", served)
        edit_config("generator.server", {"base_url": "http://g/v1"})
        assert ran("synthetic_prompts") == ("other/generator", "openai, 32 requests at once, http://g/v1")


class TestRecordedSpeeds:
    def test_are_seconds_per_call_pair_example_and_answer(self, sized: Path, recorded: Store) -> None:
        speeds = chosen(sized, recorded)
        assert speeds["synthetic_prompts"].seconds_per_row == pytest.approx((42.8 + 23.5) / 640)
        # A pair is four model calls: two responses, two cross scores.
        assert speeds["scored_pairs"].seconds_per_row == pytest.approx((36.8 + 26.0) / ((1040 + 1240) / 4))
        assert speeds["evaluation"].seconds_per_row == pytest.approx(48.9 / 924)
        assert speeds["distilled_model"].seconds_per_row == pytest.approx(307.9 / (1566 * 3))

    def test_are_of_the_last_run_that_computed_everything(self, sized: Path, recorded: Store) -> None:
        write_steps(recorded, "second", [("evaluation", None, 10.0, 100)], minute=1)
        write_steps(recorded, "half from the cache", [("evaluation", None, 99.0, 1)], minute=2, cache_hits=923)
        write_steps(recorded, "all from the cache", [("evaluation", None, 0.1, 0)], minute=3)
        speed = chosen(sized, recorded)["evaluation"]
        assert (speed.seconds_per_row, speed.recorded_at) == (0.1, "2026-11-24 08:01")

    def test_are_of_the_transfers_engine_and_models(self, sized: Path, recorded: Store, edit_config: Edit) -> None:
        """A server answers four times as fast, and the last run was on a cluster."""
        base = load_transfer(sized).config.source.base
        address = "http://a/v1"
        ran = {
            "local": ("local", base, 40.0),
            "openai": (f"openai, 32 requests at once, {address}", "served", 10.0),
            "ray": ("ray, 2 actors × 1 CPU", base, 20.0),
        }
        for minute, (batch, (engine, models, seconds)) in enumerate(ran.items(), start=1):
            step = [("scored_pairs", "round_01", seconds, 400)]
            write_steps(recorded, batch, step, minute, engine=engine, models=models)
        settings: dict[str, dict[str, Any]] = {
            "local": {},
            "openai": {
                "type": "openai", "server": {"base_url": address},
                "base": {"model": "served"}, "fine_tuned": {"model": "adapted"},
            },
            "ray": {"type": "ray"},
        }  # fmt: skip
        for type_, engine in settings.items():
            edit_config("engine", engine)
            made = make(sized, recorded)
            step = made["steps"]["scored_pairs"]
            assert (step["speed"]["engine"], step["speed"]["models"]) == ran[type_][:2]
            assert step["seconds"] == pytest.approx(step["rows"] * ran[type_][2] / 100)
            assert not [line for line in made["warnings"] if "recorded speed" in line]
        engines = [speed["engine"] for speed in made["recorded_speeds"] if speed["step"] == "scored_pairs"]
        assert engines == [ran["ray"][0], ran["openai"][0], "local", None], "all of them, the last first"

    def test_of_another_engine_are_told(self, sized: Path, recorded: Store, edit_config: Edit) -> None:
        """That of an older version, whose engine isn't known, goes before that of another engine."""
        step = [("scored_pairs", "round_01", 20.0, 400)]
        write_steps(recorded, "cluster", step, 1, engine="ray, 2 actors × 1 CPU", models="other/base")
        assert chosen(sized, recorded)["scored_pairs"].engine is None
        with recorded.transaction("banking") as connection:
            connection.execute("DELETE FROM steps WHERE asset = 'scored_pairs' AND engine IS NULL")
        base = load_transfer(sized).config.source.base
        assert make(sized, recorded)["warnings"] == [
            f"scored_pairs has no recorded speed of {base} (local): this one is of other/base"
            " (ray, 2 actors × 1 CPU). `tuneshift run banking` records its own."
        ]

    def test_of_a_training_are_the_targets(self, sized: Path, recorded: Store, edit_config: Edit) -> None:
        with recorded.transaction("banking") as connection:
            connection.execute("UPDATE distilled_models SET target = 'other/target'")
        warnings = make(sized, recorded)["warnings"]
        assert any(line.startswith("distilled_model has no recorded speed of ") for line in warnings)
        edit_config("target.base", "other/target")
        assert not any("recorded speed" in line for line in make(sized, recorded)["warnings"])

    def test_plan_the_transfer_as_it_is_now(self, sized: Path, recorded: Store, edit_config: Edit) -> None:
        """3 calls a round, 2 rounds; then ten times as many calls."""
        first = make(sized, recorded)["steps"]["synthetic_prompts"]["seconds"]
        assert first == pytest.approx(2 * 3 * (42.8 + 23.5) / 640)
        edit_config("generator.calls_per_round", 30)
        made = make(sized, recorded)
        assert made["steps"]["synthetic_prompts"]["seconds"] == pytest.approx(10 * first)
        assert made["total_seconds"] == pytest.approx(sum(step["seconds"] for step in made["steps"].values()))

    def test_of_a_part_of_a_run_are_those_of_its_steps(self, sized: Path, recorded: Store) -> None:
        transfer = load_transfer(sized)
        whole = make(sized, recorded)["steps"]
        steps = [("synthetic_prompts", "round_02"), ("filtered_dataset", "round_02"), ("evaluation", None)]
        seconds = plans.work(recorded, transfer).seconds(chosen(sized, recorded), steps)
        half = whole["synthetic_prompts"]["seconds"] / 2
        assert seconds == {
            "synthetic_prompts": pytest.approx(half), "evaluation": pytest.approx(whole["evaluation"]["seconds"]),
        }  # fmt: skip

    def test_of_some_steps_only_leave_the_total_open(self, sized: Path) -> None:
        store = Store(database_file())
        write_steps(store, "first", STEPS_RECORDED[:2], minute=0)
        made = make(sized, store)
        assert made["steps"]["synthetic_prompts"]["seconds"] > 0
        assert (made["steps"]["evaluation"]["seconds"], made["total_seconds"]) == (None, None)
        assert made["warnings"] == [
            "No speed of scored_pairs, rehearsal_set, distilled_model, evaluation is recorded yet: `tuneshift run"
            " banking` records it."
        ]

    def test_without_any_the_memory_is_still_told(self, sized: Path) -> None:
        made = make(sized, Store(database_file()))
        assert made["total_seconds"] is None and made["counts"] == "the most that transfer.yaml allows"
        assert all(
            step["memory_bytes"] > 8e8 and step["recorded_peak_bytes"] is None for step in made["steps"].values()
        )


class TestToDo:
    def test_of_a_new_transfer_is_everything(self, sized: Path) -> None:
        transfer = load_transfer(sized)
        rounds = [(asset, round_) for round_ in transfer.round_keys for asset in ROUND_ASSETS]
        last = [(name, None) for name in ("threshold_report", "rehearsal_set", "distilled_model", "evaluation")]
        assert to_do(Store(database_file()), transfer, False) == [("seed_set", None), *rounds, *last]

    def test_of_a_finished_one_is_nothing_and_after_a_change_what_follows(self, ran: Any, edit_config: Edit) -> None:
        assert to_do(ran.store, ran.transfer, False) == []
        edit_config("filter.threshold", 1.4)
        steps = to_do(ran.store, ran.transfer, False)
        assert [asset for asset, _ in steps] == ["filtered_dataset"] * 2 + ["threshold_report", *AFTER_ROUNDS]

    @pytest.mark.parametrize(
        ("key", "value", "regrow", "rounds"),
        [
            ("generator.temperature", 0.5, False, {"round_01": 3, "round_02": 3}),
            ("filter.threshold", 1.4, True, {"round_01": 1, "round_02": 3}),
        ],
    )
    def test_is_the_most_that_the_run_then_does(
        self, ran: Any, edit_config: Edit, key: str, value: Any, regrow: bool, rounds: dict[str, int]
    ) -> None:
        edit_config(key, value)
        steps = to_do(ran.store, ran.transfer, regrow)
        assert Counter(round_ for _, round_ in steps if round_) == rounds
        assert steps[-2:] == [("distilled_model", None), ("evaluation", None)]
        made = ran.run(regrow).materialized
        # The seed set is made anew, and when it comes out as it was, prompts stay.
        assert [step for step in steps if step in made] == made, "in this order, and nothing else"


class TestSizes:
    def test_of_known_models(self) -> None:
        # 134.5 and 268.1 million parameters in 16 bits.
        assert SMOLLM2.weight_bytes(False) == pytest.approx(2 * 134.5e6, rel=0.001)
        assert GEMMA.weight_bytes(False) == pytest.approx(2 * 268.1e6, rel=0.001)

    def test_in_four_bits_leave_embeddings_and_head_in_sixteen(self) -> None:
        ends = 2 * 262144 * 640
        assert GEMMA.weight_bytes(True) == pytest.approx(
            (GEMMA.weight_bytes(False) - ends) / 2 * 0.516 + ends, rel=0.001
        )
        untied = replace(GEMMA, tied=False)
        assert untied.weight_bytes(True) - GEMMA.weight_bytes(True) == ends

    def test_of_a_row_are_keys_values_and_logits_as_the_engine_counts_them(self) -> None:
        assert GEMMA.row_bytes(100, 20, kv_bytes=2) == (3 * 100 + 20) * 18 * 2 * 256 * 2 + 3 * 2 * 262144

    def test_of_a_training_are_libraries_weights_adapter_and_batch(self) -> None:
        batch = 16 * (105 * 18 * 16 * (640 + 2048) + 7.6 * 262144 * 10)
        # What PEFT's print_trainable_parameters says of rank 16 on every linear layer: 3,796,992 and 4,884,480.
        plain = GEMMA.training_bytes(Distill(), 105, 7.6)
        assert plain == pytest.approx(0.8e9 + GEMMA.weight_bytes(False) + 16 * 3_796_992 + batch)
        wide = Distill(rank=32)
        assert SMOLLM2.training_bytes(wide, 9, 3) - SMOLLM2.training_bytes(Distill(), 9, 3) == 16 * 4_884_480
        few = Distill(optimizer="paged_adamw_8bit")
        assert plain - GEMMA.training_bytes(few, 105, 7.6) == pytest.approx(6 * 3_796_992)
        batch = 16 * (105 * (16 * (640 + 2048) + 18 * 2 * 640) + 7.6 * 262144 * 10)
        less = Distill(gradient_checkpointing=True, quantization="nf4")
        expected = 0.8e9 + GEMMA.weight_bytes(True) + 16 * 3_796_992 + batch
        assert GEMMA.training_bytes(less, 105, 7.6) == pytest.approx(expected)

    def test_of_a_mixture_of_experts_are_refused_and_a_missing_key_is_named(self) -> None:
        with pytest.raises(ValueError, match="num_local_experts is 8: a mixture of experts"):
            ModelSize.from_config({"num_local_experts": 8})
        with pytest.raises(KeyError, match="num_attention_heads"):
            ModelSize.from_config({"model_type": "llama"})

    def test_an_uncached_hub_model_has_none(self, sized: Path, edit_config: Edit) -> None:
        edit_config("target.base", "someone/never-downloaded")
        with pytest.raises(TuneshiftError) as error:
            plans.model_sizes(load_transfer(sized))
        told = (
            f"{sized / 'transfer.yaml'}: target.base: 'someone/never-downloaded' isn't on this machine yet"
            " (`hf download someone/never-downloaded` gets it), so the memory that a run needs isn't known."
        )
        assert str(error.value) == told
        made = make(sized, Store(database_file()))
        assert made["warnings"][0] == told
        assert {step["memory_bytes"] for step in made["steps"].values()} == {None}

    def test_what_runs_elsewhere_needs_none(self, sized: Path, edit_config: Edit) -> None:
        edit_config("generator.server", {"base_url": "https://api.example/v1"})
        edit_config("generator.model", "gpt-4o")
        assert set(plans.model_sizes(load_transfer(sized))) == {"source", "target"}

    def test_a_config_without_the_widths_is_named(self, transfer_folder: Path) -> None:
        with pytest.raises(TuneshiftError, match=r"source.base: .*config.json has no 'num_attention_heads', so"):
            plans.model_sizes(load_transfer(transfer_folder))


class TestMemory:
    def test_of_answering_is_libraries_weights_and_a_batch(self, sized: Path) -> None:
        size = plans.model_sizes(load_transfer(sized))["source"]
        found, lines = needs(sized, 64e9)
        template, prompt = len("Query: \nIntent:") / 4, sum(map(len, load_transfer(sized).seeds)) / 2 / 4
        row = size.row_bytes(template + prompt, 64, 2)
        assert found["scored_pairs"] == pytest.approx(0.8e9 + 2 * size.weight_bytes(True) + 32 * row)
        assert found["evaluation"] == pytest.approx(
            0.8e9 + 3 * size.weight_bytes(True) + size.row_bytes(template + prompt, 32, 2)
        )
        assert lines == []

    def test_too_little_is_told_with_the_repair(self, sized: Path, edit_config: Edit, enlarge: Any) -> None:
        edit_config("models.quantization", "none")
        for key in ("source.base", "target.base"):
            enlarge(key, 120)
        _, warnings = needs(sized, 24e9, 21.6e9)
        assert [line.split()[0] for line in warnings] == [*plans.STEPS[:2], *AFTER_ROUNDS]
        assert all(": set models.quantization: nf4, or use more memory." in line for line in warnings if "eval" in line)
        assert warnings[2].startswith("distilled_model needs about ")
        assert "and of this machine's memory a run can plan with 21.6 GB: " in warnings[2]

    def test_a_large_generator_in_full_is_to_be_quantized(self, sized: Path, edit_config: Edit, enlarge: Any) -> None:
        """34B parameters are 68 GB in bfloat16, and in 4 bits they fit."""
        enlarge("generator.model", 150)
        edit_config("generator.quantization", "none")
        _, warnings = needs(sized, 24e9, 21.6e9)
        assert [line.split()[0] for line in warnings] == ["synthetic_prompts", "scored_pairs"]
        assert all(": set generator.quantization: nf4, or use more memory." in line for line in warnings)
        edit_config("generator.quantization", "nf4")
        assert needs(sized, 24e9, 21.6e9)[1] == []

    def test_keys_and_values_in_8_bits_make_room_for_more_rows(
        self, sized: Path, edit_config: Edit, enlarge: Any
    ) -> None:
        enlarge("generator.model", 120)
        edit_config("models.batch_size", 512)
        edit_config("generator.calls_per_round", 512)
        rows = {}
        for dtype in ("auto", "int8"):
            edit_config("models.kv_cache_dtype", dtype)
            (line,) = (w for w in needs(sized, 24e9)[1] if w.startswith("synthetic_prompts has memory for batches of "))
            rows[dtype] = int(line.split()[6].rstrip(","))
            assert line.endswith("makes room for more.") == (dtype == "auto")
        assert 1.7 * rows["auto"] < rows["int8"] <= 2 * rows["auto"] + 1

    @pytest.mark.parametrize(
        ("layers", "repair"),
        [
            (24, "set distill.batch_size: 4,"),
            (40, "set distill.gradient_checkpointing: true and distill.batch_size: "),
            (60, "set distill.quantization: nf4 and distill.batch_size: 4,"),
            (130, "set distill.quantization: nf4 and distill.gradient_checkpointing: true and distill.batch_size: "),
            (400, "choose a smaller target,"),
        ],
    )
    def test_the_repair_of_a_training_is_the_smallest_that_fits(
        self, sized: Path, enlarge: Any, layers: int, repair: str
    ) -> None:
        enlarge("target.base", layers)
        (line,) = (warning for warning in needs(sized, 24e9, 21.6e9)[1] if "distilled" in warning)
        assert repair in line

    def test_a_run_that_fits_this_machine_has_no_warning(self, sized: Path) -> None:
        assert plans.run_warnings(load_transfer(sized)) == []

    def test_a_run_that_does_not_fit_this_machine(self, huge: Path) -> None:
        warnings = plans.run_warnings(load_transfer(huge))
        assert [line.split()[0] for line in warnings] == [step for step in plans.STEPS if step != "rehearsal_set"]

    def test_models_on_a_server_or_on_other_nodes_need_no_memory_here(self, huge: Path, edit_config: Edit) -> None:
        server = {"base_url": "http://127.0.0.1:8000/v1"}
        served = {"type": "openai", "server": server, "base": {"model": "a"}, "fine_tuned": {"model": "b"}}
        for engine, steps in (
            (served, ["synthetic_prompts", *AFTER_ROUNDS]),
            ({"type": "vllm"}, ["synthetic_prompts", *AFTER_ROUNDS]),
            ({"type": "ray", "ray": {"address": "10.0.0.5:6379"}}, AFTER_ROUNDS),
        ):
            edit_config("engine", engine)
            assert [line.split()[0] for line in plans.run_warnings(load_transfer(huge))] == steps

    def test_unknown_sizes_give_no_warning(self, transfer_folder: Path) -> None:
        assert plans.run_warnings(load_transfer(transfer_folder)) == []


class TestCommand:
    def test_prints_one_json_object(self, tuneshift: Run, recorded: Store) -> None:
        status, out, err = tuneshift("plan", "banking", "--json")
        assert (status, err) == (0, "")
        made = json.loads(out)
        assert list(made["steps"]) == list(plans.STEPS)
        assert made["steps"]["evaluation"]["recorded_peak_bytes"] == 2_000_000_000
        assert made["memory_bytes"] > made["usable_bytes"] > 0

    def test_shows_the_speeds_that_it_used(
        self, tuneshift: Run, recorded: Store, sized: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = load_transfer(sized).config.source.base
        step = [("scored_pairs", "round_01", 40.0, 400)]
        write_steps(recorded, "local", step, 1, engine="local", models=base)
        monkeypatch.setattr(rendering, "out", Console(width=200))
        status, out, _ = tuneshift("plan", "banking")
        assert status == 0
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
        (found,) = (row for row in rows if row and row[0] == "scored_pairs")
        assert found[2:] == ["2.0 GB", "48.0", "2.5", f"{Path(base).name} (local), 2026-11-24"]
        (found,) = (row for row in rows if row and row[0] == "evaluation")
        assert found[4:] == ["18.9", "unknown (unknown), 2026-11-24"]

    def test_without_a_recorded_speed_says_so(self, tuneshift: Run, sized: Path) -> None:
        status, out, _ = tuneshift("plan", "banking")
        assert status == 0
        assert "GB" in out and "warning: No speed of synthetic_prompts, " in out

    def test_doctor_and_run_warn(self, tuneshift: Run, models: FakeModels, huge: Path) -> None:
        status, out, _ = tuneshift("doctor", "--no-models")
        assert status == 1
        assert "fix  banking memory: synthetic_prompts needs about" in out
        # Only a warning, since it is an estimate: the run goes on, here until its generator fails.
        models.generator = FakeEngine("generator", fail_after=0)
        _, _, err = tuneshift("run", "banking")
        assert err.startswith("warning: synthetic_prompts needs about")
        assert err.index("warning:") < err.index("seed_set")
