"""`tuneshift plan`: where its inputs come from, what it prints, and how it fails. No model is loaded."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.fakes import FakeEngine, FakeModels
from tuneshift_dag.config.transfer import load_transfer
from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.home import database_file
from tuneshift_dag.reports import plan as plans
from tuneshift_dag.store.database import Store
from tuneshift_dag.store.tables import DISTILLED_MODELS, STEPS

Edit = Callable[[str, Any], None]
# Small, and of a size that is known exactly.
CONFIG = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": True,
}  # fmt: skip
# The packaged transfer's run: (asset, round, seconds, model calls) of `steps`, and of `distilled_models` its training.
STEPS_RECORDED = [
    ("synthetic_prompts", "round_01", 42.8, 320),
    ("synthetic_prompts", "round_02", 23.5, 320),
    ("scored_pairs", "round_01", 36.8, 1040),
    ("scored_pairs", "round_02", 26.0, 1240),
    ("evaluation", None, 48.9, 924),
]
AFTER_ROUNDS = ["evaluation", "distilled_model"]
ANSWERING = ["synthetic_prompts", "scored_pairs", "evaluation"]
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


def make(folder: Path, store: Store, **options: Any) -> dict[str, Any]:
    return plans.plan(store, load_transfer(folder), **options)


def chosen(folder: Path, store: Store) -> dict[str, plans.Speed]:
    transfer = load_transfer(folder)
    return plans.chosen_speeds(plans.recorded_speeds(store, transfer), transfer)


class TestRecordedSpeeds:
    def test_are_seconds_per_call_pair_example_and_answer(self, sized: Path, recorded: Store) -> None:
        speeds = chosen(sized, recorded)
        assert speeds["synthetic_prompts"].seconds_per_row == pytest.approx((42.8 + 23.5) / 640)
        # A pair is four model calls: two responses, two cross scores.
        assert speeds["scored_pairs"].seconds_per_row == pytest.approx((36.8 + 26.0) / ((1040 + 1240) / 4))
        assert speeds["scored_pairs"].rows == 570
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
            write_steps(recorded, batch, step, minute, engine=engine, models=models, tokens_generated=800)
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
            speed = made["speeds"]["scored_pairs"]
            assert (speed["engine"], speed["models"]) == ran[type_][:2]
            assert speed["tokens_per_second"] == 800 / ran[type_][2]
            assert made["plans"][0]["seconds"]["scored_pairs"] == pytest.approx(
                made["pairs_scored"] * ran[type_][2] / 100
            )
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
        assert make(sized, recorded)["warnings"][0] == (
            f"scored_pairs has no recorded speed of {base} (local): this one is of other/base"
            " (ray, 2 actors × 1 CPU). `tuneshift run banking` records its own."
        )

    def test_of_a_training_are_the_targets(self, sized: Path, recorded: Store, edit_config: Edit) -> None:
        with recorded.transaction("banking") as connection:
            connection.execute("UPDATE distilled_models SET target = 'other/target'")
        warnings = make(sized, recorded)["warnings"]
        assert any(line.startswith("distilled_model has no recorded speed of ") for line in warnings)
        edit_config("target.base", "other/target")
        assert not any("recorded speed" in line for line in make(sized, recorded, given={"target": 1e6})["warnings"])

    def test_plan_the_transfer_as_it_is_now(self, sized: Path, recorded: Store, edit_config: Edit) -> None:
        """3 calls a round, 2 rounds; then ten times as many calls."""
        first = make(sized, recorded)["plans"][0]["seconds"]["synthetic_prompts"]
        assert first == pytest.approx(2 * 3 * (42.8 + 23.5) / 640)
        edit_config("generator.calls_per_round", 30)
        assert make(sized, recorded)["plans"][0]["seconds"]["synthetic_prompts"] == pytest.approx(10 * first)

    def test_count_samples_as_more_calls_of_each_pair(self, sized: Path, recorded: Store, edit_config: Edit) -> None:
        known, roofline = make(sized, recorded), make(sized, recorded, gpu="h100")
        edit_config("response.samples", 8)
        sampled = make(sized, recorded)
        speeds = [each["speeds"]["scored_pairs"] for each in (known, sampled)]
        assert speeds[1]["seconds_per_row"] == pytest.approx(3 * speeds[0]["seconds_per_row"]), "12 calls, not 4"
        seconds = [each["plans"][0]["seconds"] for each in (roofline, make(sized, recorded, gpu="h100"))]
        assert seconds[1]["scored_pairs"] > 2 * seconds[0]["scored_pairs"]
        assert seconds[1]["evaluation"] == seconds[0]["evaluation"]

    def test_count_the_targets_scores(self, sized: Path, recorded: Store, edit_config: Edit) -> None:
        known, roofline = make(sized, recorded), make(sized, recorded, gpu="h100")["plans"][0]
        edit_config("filter", {"target": "avoid_easy", "target_share": 0.25})
        speeds = [each["speeds"]["scored_pairs"] for each in (known, make(sized, recorded))]
        assert speeds[1]["seconds_per_row"] == pytest.approx(5 / 4 * speeds[0]["seconds_per_row"])
        scoring = make(sized, recorded, gpu="h100")["plans"][0]
        assert scoring["seconds"]["scored_pairs"] > roofline["seconds"]["scored_pairs"]
        assert scoring["memory_bytes"]["scored_pairs"] > roofline["memory_bytes"]["scored_pairs"]

    def test_count_the_discriminators_scores(self, sized: Path, recorded: Store, edit_config: Edit) -> None:
        known, roofline = make(sized, recorded), make(sized, recorded, gpu="h100")["plans"][0]
        edit_config("filter.discriminator", {})
        speeds = [each["speeds"]["scored_pairs"] for each in (known, make(sized, recorded))]
        assert speeds[1]["seconds_per_row"] == pytest.approx(6 / 4 * speeds[0]["seconds_per_row"])
        scoring = make(sized, recorded, gpu="h100")["plans"][0]
        assert scoring["seconds"]["scored_pairs"] > roofline["seconds"]["scored_pairs"]

    def test_of_some_steps_only_is_an_error_that_names_the_others(self, sized: Path) -> None:
        store = Store(database_file())
        write_steps(store, "first", STEPS_RECORDED[:2], minute=0)
        with pytest.raises(TuneshiftError) as error:
            make(sized, store)
        assert "holds no speed of scored_pairs, distilled_model, evaluation of banking: `tuneshift run banking`" in str(
            error.value
        )
        assert "--gpu h100" in str(error.value)


class TestSizes:
    def test_come_from_config_json(self, sized: Path) -> None:
        sizes = plans.model_sizes(load_transfer(sized), {})
        per_layer = 2 * 64 * (64 + 32) + 3 * 64 * 256
        assert sizes["source"] == sizes["target"] == sizes["generator"]
        assert sizes["source"].parameters == 2 * per_layer + 1000 * 64

    def test_given_ones_go_first_and_hold_for_the_same_model(self, sized: Path) -> None:
        sizes = plans.model_sizes(load_transfer(sized), {"target": 8e9})
        assert sizes["source"] == sizes["target"]
        assert sizes["target"].parameters == pytest.approx(8e9, rel=0.01)

    def test_an_uncached_hub_model_needs_an_option(self, sized: Path, edit_config: Edit) -> None:
        edit_config("target.base", "someone/never-downloaded")
        with pytest.raises(TuneshiftError) as error:
            plans.model_sizes(load_transfer(sized), {})
        assert str(error.value) == (
            f"{sized / 'transfer.yaml'}: target.base: 'someone/never-downloaded' isn't on this machine yet, so its size"
            " isn't known: give its size with --target-parameters 8B, or get it with"
            " `hf download someone/never-downloaded`."
        )
        assert plans.model_sizes(load_transfer(sized), {"target": 1e9})["target"].parameters > 9e8

    def test_a_generator_on_a_server_needs_an_option(self, sized: Path, edit_config: Edit) -> None:
        edit_config("generator.server", {"base_url": "https://api.example/v1"})
        edit_config("generator.model", "gpt-4o")
        with pytest.raises(
            TuneshiftError, match=r"generator.model: 'gpt-4o' is on a server, .* --generator-parameters"
        ):
            plans.model_sizes(load_transfer(sized), {})

    def test_a_config_without_the_widths_is_named(self, transfer_folder: Path) -> None:
        with pytest.raises(TuneshiftError, match=r"source.base: .*config.json has no 'num_attention_heads', so"):
            plans.model_sizes(load_transfer(transfer_folder), {})

    @pytest.mark.parametrize("text", ["eight", "", "8", "-1B", "8Q"])
    def test_a_number_that_is_none(self, text: str) -> None:
        with pytest.raises(TuneshiftError, match=f"--target-parameters: '{text}' is no number of parameters"):
            plans.parameters(text, "--target-parameters")

    def test_numbers(self) -> None:
        assert [plans.parameters(t, "-") for t in ("8B", "270m", "1.5b", "134515008")] == [8e9, 270e6, 1.5e9, 134515008]


class TestWarnings:
    def test_what_does_not_fit_is_told_with_its_repair(self, sized: Path, edit_config: Edit) -> None:
        edit_config("models.quantization", "none")
        given = {"source": 34e9}
        warnings = make(sized, Store(database_file()), gpu="l4", given=given)["warnings"]
        assert [line.split()[0] for line in warnings] == [*ANSWERING, "distilled_model", "A"]
        assert all(": set models.quantization: nf4, or use more memory." in line for line in warnings[:3])
        assert warnings[3].startswith("distilled_model needs about ")
        assert "and l4 has 24.0 GB, of which it can plan with 21.6 GB: " in warnings[3]

    def test_a_large_generator_in_full_is_to_be_quantized(self, sized: Path, edit_config: Edit) -> None:
        """34B parameters are 68 GB in bfloat16, and in 4 bits they fit."""
        edit_config("generator.quantization", "none")
        sizes = {"generator": 34e9, "source": 1e6, "target": 1e6}
        warnings = make(sized, Store(database_file()), gpu="l4", given=sizes)["warnings"]
        assert [line.split()[0] for line in warnings] == ["synthetic_prompts", "scored_pairs", "A"]
        assert all(": set generator.quantization: nf4, or use more memory." in line for line in warnings[:2])
        edit_config("generator.quantization", "nf4")
        assert len(make(sized, Store(database_file()), gpu="l4", given=sizes)["warnings"]) == 1

    def test_keys_and_values_in_8_bits_make_room_for_more_rows(self, sized: Path, edit_config: Edit) -> None:
        """In 4 bits 28B parameters leave 8 GB of 24 free."""
        edit_config("models.batch_size", 512)
        edit_config("generator.calls_per_round", 512)
        small, rows = {"source": 1e6, "target": 1e6}, {}
        for dtype in ("auto", "int8"):
            edit_config("models.kv_cache_dtype", dtype)
            warnings = make(sized, Store(database_file()), gpu="l4", given={**small, "generator": 28e9})["warnings"]
            (line,) = (w for w in warnings if w.startswith("synthetic_prompts has memory for batches of "))
            rows[dtype] = int(line.split()[6])
            assert line.endswith("makes room for more.") == (dtype == "auto")
        assert 1.7 * rows["auto"] < rows["int8"] <= 2 * rows["auto"] + 1

    @pytest.mark.parametrize(
        ("size", "repair"),
        [
            (7e9, "set distill.batch_size: 4,"),
            (9.5e9, "set distill.gradient_checkpointing: true and distill.batch_size: "),
            (13e9, "set distill.quantization: nf4 and distill.batch_size: 4,"),
            (30e9, "set distill.quantization: nf4 and distill.gradient_checkpointing: true and distill.batch_size: "),
            (70e9, "choose a smaller target,"),
        ],
    )
    def test_the_repair_of_a_training_fits(self, sized: Path, size: float, repair: str) -> None:
        work = plans.workload(
            load_transfer(sized),
            plans.model_sizes(load_transfer(sized), {"target": size}),
            plans.lengths(Store(database_file()), load_transfer(sized)),
            here=False,
        )
        (line,) = (w for w in plans.memory_warnings(load_transfer(sized), work, plans.GPUS["l4"]) if "distilled" in w)
        assert repair in line

    def test_idle_gpus(self, sized: Path) -> None:
        warnings = make(sized, Store(database_file()), gpu="h100")["warnings"]
        assert warnings == [
            "A round has 3 generator calls, so 61 of 64 GPUs are idle while it generates: raise"
            " generator.calls_per_round and lower rounds."
        ]

    def test_a_run_that_fits_this_machine_has_none(self, sized: Path) -> None:
        assert plans.run_warnings(load_transfer(sized)) == []

    def test_a_run_that_does_not_fit_this_machine(self, huge: Path) -> None:
        warnings = plans.run_warnings(load_transfer(huge))
        assert [line.split()[0] for line in warnings] == ["synthetic_prompts", "scored_pairs", *AFTER_ROUNDS]
        assert all(" and this machine has " in line for line in warnings)

    def test_models_on_a_server_need_no_memory_here(self, huge: Path, edit_config: Edit) -> None:
        server = {"base_url": "http://127.0.0.1:8000/v1"}
        edit_config(
            "engine", {"type": "openai", "server": server, "base": {"model": "a"}, "fine_tuned": {"model": "b"}}
        )
        warnings = plans.run_warnings(load_transfer(huge))
        assert [line.split()[0] for line in warnings] == ["synthetic_prompts", *AFTER_ROUNDS]

    def test_models_on_other_nodes_need_no_memory_here(self, huge: Path, edit_config: Edit) -> None:
        edit_config("engine", {"type": "ray", "ray": {"address": "10.0.0.5:6379"}})
        warnings = plans.run_warnings(load_transfer(huge))
        assert [line.split()[0] for line in warnings] == AFTER_ROUNDS

    def test_unknown_sizes_give_none(self, transfer_folder: Path) -> None:
        assert plans.run_warnings(load_transfer(transfer_folder)) == []


class TestCommand:
    def test_prints_one_json_object(self, tuneshift: Run, recorded: Store) -> None:
        status, out, err = tuneshift("plan", "banking", "--json", "--price", "3")
        assert (status, err) == (0, "")
        made = json.loads(out)
        assert [one["gpus"] for one in made["plans"]] == [1, 8, 64]
        for one in made["plans"]:
            assert one["cost"] == pytest.approx(3 * one["gpu_hours"])
            assert one["total_seconds"] == pytest.approx(sum(one["seconds"].values()))
            assert one["total_seconds"] >= one["sequential_seconds"]
            assert one["memory_bytes"].keys() == one["seconds"].keys()
        assert made["recorded_peak_bytes"]["evaluation"] == 2_000_000_000

    def test_shows_the_speeds_that_it_used(self, tuneshift: Run, recorded: Store, sized: Path) -> None:
        base = load_transfer(sized).config.source.base
        step = [("scored_pairs", "round_01", 40.0, 400)]
        write_steps(recorded, "local", step, 1, engine="local", models=base, tokens_generated=90_000)
        status, out, _ = tuneshift("plan", "banking")
        assert status == 0
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
        assert ["scored_pairs", "2.5", "2,250", Path(base).name, "local", "2026-11-24"] in rows
        assert any(row[:5] == ["evaluation", "18.9", "-", "-", "-"] for row in rows)

    def test_for_people(self, tuneshift: Run, sized: Path) -> None:
        status, out, _ = tuneshift("plan", "banking", "--gpu", "a100", "--gpus", "2")
        assert status == 0
        assert "Roofline of a100: an estimate" in out and "2 GPUs" in out and "Bottleneck of 2: " in out
        # Without --price there is no sum of money.
        assert "cost" not in out

    def test_an_unknown_gpu_is_one_message(self, tuneshift: Run, sized: Path) -> None:
        status, out, err = tuneshift("plan", "banking", "--gpu", "tpu")
        assert (status, out) == (1, "")
        assert err == "error: --gpu: 'tpu' is not known; use one of h200, h100, a100, l40s, a10, l4, cpu.\n"

    def test_doctor_and_run_warn(self, tuneshift: Run, models: FakeModels, huge: Path) -> None:
        status, out, _ = tuneshift("doctor", "--no-models")
        assert status == 1
        assert "fix  banking memory: synthetic_prompts needs about" in out
        # Only a warning, since it is an estimate: the run goes on, here until its generator fails.
        models.generator = FakeEngine("generator", fail_after=0)
        _, _, err = tuneshift("run", "banking")
        assert err.startswith("warning: synthetic_prompts needs about")
        assert err.index("warning:") < err.index("seed_set")
