"""The arithmetic of a plan, against the packaged transfer's recorded run and against itself."""

import math
from dataclasses import replace

import pytest

from tuneshift_dag.method.scaling import (
    GPUS,
    Answers,
    Fractions,
    Hardware,
    ModelSize,
    Training,
    Workload,
    estimate,
)

# From the config.json of SmolLM2-135M-Instruct and Gemma 3 270M.
SMOLLM2 = ModelSize.from_config(
    {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
     "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True}
)  # fmt: skip
GEMMA = ModelSize.from_config(
    {"num_hidden_layers": 18, "hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4,
     "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "tie_word_embeddings": True}
)  # fmt: skip
# The packaged transfer's run of 2026-11-24 on two CPU cores: seconds, and mean lengths in tokens.
RECORDED_SECONDS = {"synthetic_prompts": 158.9, "scored_pairs": 163.6, "distilled_model": 307.9, "evaluation": 48.9}


def side(response: float, longest: float, scored: float) -> Answers:
    return Answers(SMOLLM2, True, 295, 64, 24.6, response, longest, 0, scored)


HELD_OUT = replace(side(15.7, 24, 0), rows=231)
DEMO = Workload(
    rounds=6,
    proposals=Answers(GEMMA, True, 320, 64, prompt=36.2, response=22.4, longest=64, shared=202.4),
    pairs=[side(23.8, 24, 7.6), side(7.6, 18, 23.8)],
    training=Training(GEMMA, False, 4695, 16, 16, tokens=32.2, response=7.6, longest=105),
    evaluation=[HELD_OUT] * 2 + [replace(HELD_OUT, model=GEMMA, split=False)] * 2,
    resident={step: 500e6 for step in ("synthetic_prompts", "scored_pairs", "evaluation")},
)
# transfers/meeting_slots, whose models are the other way round: the longest lengths that its transfer.yaml allows, and
# the counts and seconds of its README.
MEETING_SECONDS = {"synthetic_prompts": 64.5, "scored_pairs": 48.0, "distilled_model": 80.4, "evaluation": 28.4}
ASKED = Answers(GEMMA, True, 593 // 2, 64, prompt=18.5, response=8, longest=8)
MEETING = Workload(
    rounds=2,
    proposals=Answers(GEMMA, True, 64, 64, prompt=78.75, response=200, longest=200, shared=18.5),
    pairs=[replace(ASKED, scored=8)] * 2,
    training=Training(SMOLLM2, False, 2212, 16, 16, tokens=26.5, response=8, longest=86.75),
    evaluation=[replace(ASKED, rows=240)] * 2 + [replace(ASKED, rows=240, model=SMOLLM2, split=False)] * 2,
    resident=DEMO.resident,
)
H100 = GPUS["h100"]


class TestModelSize:
    def test_parameters_of_known_models(self) -> None:
        assert SMOLLM2.parameters == pytest.approx(134.5e6, rel=0.001)
        assert GEMMA.parameters == pytest.approx(268.1e6, rel=0.001)
        # What PEFT's print_trainable_parameters says of rank 16 on every linear layer.
        assert GEMMA.lora_parameters(16) == 3_796_992
        assert SMOLLM2.lora_parameters(16) == 4_884_480

    def test_weights_in_four_bits(self) -> None:
        assert GEMMA.weight_bytes(False) == 2 * GEMMA.parameters
        # The body shrinks to about a quarter; embeddings and head stay in 16 bits.
        assert GEMMA.weight_bytes(True) == pytest.approx(GEMMA.body * 0.516 + 2 * GEMMA.head, rel=0.001)

    @pytest.mark.parametrize("parameters", [135e6, 1e9, 8e9, 70e9])
    def test_a_size_alone_gives_a_shape_of_that_many_parameters(self, parameters: float) -> None:
        assert ModelSize.of(parameters).parameters == pytest.approx(parameters, rel=0.08)

    def test_eight_billion_look_like_llama(self) -> None:
        size = ModelSize.of(8e9)
        assert (size.hidden, size.layers) == (pytest.approx(4096, rel=0.05), pytest.approx(32, abs=2))

    def test_refuses_a_mixture_of_experts(self) -> None:
        with pytest.raises(ValueError, match="num_local_experts is 8: a mixture of experts"):
            ModelSize.from_config({"num_local_experts": 8})

    def test_a_missing_key_is_named(self) -> None:
        with pytest.raises(KeyError, match="num_attention_heads"):
            ModelSize.from_config({"model_type": "llama"})


class TestAgreement:
    def test_with_the_recorded_run_of_the_packaged_transfer(self) -> None:
        """The roofline knows nothing of that run but its lengths; `training`'s fraction alone was taken from it."""
        seconds = estimate(DEMO, GPUS["cpu"], 1).seconds
        for step, recorded in RECORDED_SECONDS.items():
            assert recorded / 1.75 < seconds[step] < recorded * 1.75, step
        total = sum(RECORDED_SECONDS.values())
        assert total / 1.25 < sum(seconds.values()) < total * 1.25
        assert seconds["distilled_model"] == pytest.approx(RECORDED_SECONDS["distilled_model"], rel=0.02)

    def test_with_the_run_of_a_transfer_that_no_fraction_was_taken_from(self) -> None:
        seconds = estimate(MEETING, GPUS["cpu"], 1).seconds
        for step, recorded in MEETING_SECONDS.items():
            assert recorded / 1.75 < seconds[step] < recorded * 1.75, step
        total = sum(MEETING_SECONDS.values())
        assert total / 1.25 < sum(seconds.values()) < total * 1.25

    def test_recorded_speeds_give_the_recorded_run_back(self) -> None:
        rows = {"synthetic_prompts": 6 * 320, "scored_pairs": 6 * 295, "distilled_model": 4695, "evaluation": 4 * 231}
        speeds = {step: RECORDED_SECONDS[step] / rows[step] for step in rows}
        assert estimate(DEMO, GPUS["cpu"], 1, recorded=speeds).seconds == pytest.approx(RECORDED_SECONDS)
        doubled = estimate(replace(DEMO, rounds=12), GPUS["cpu"], 1, recorded=speeds).seconds
        assert doubled["synthetic_prompts"] == pytest.approx(2 * RECORDED_SECONDS["synthetic_prompts"])
        assert doubled["evaluation"] == pytest.approx(RECORDED_SECONDS["evaluation"])


class TestScaling:
    @pytest.mark.parametrize("recorded", [{}, {"synthetic_prompts": 0.08, "scored_pairs": 0.09, "evaluation": 0.05}])
    @pytest.mark.parametrize("name", GPUS)
    def test_more_gpus_are_never_slower_and_never_pass_the_sequential_floor(
        self, name: str, recorded: dict[str, float]
    ) -> None:
        estimates = [estimate(DEMO, GPUS[name], count, recorded=recorded) for count in (1, 2, 3, 8, 64, 1000)]
        totals = [one.total_seconds for one in estimates]
        assert totals == sorted(totals, reverse=True)
        assert totals[0] > totals[-1]
        floor = estimates[0].sequential
        for one in estimates:
            assert one.sequential == floor
            assert all(one.seconds[step] >= floor[step] * (1 - 1e-9) for step in floor)
        assert totals[-1] == pytest.approx(sum(floor.values()))

    def test_rounds_wait_for_each_other(self) -> None:
        once = estimate(replace(DEMO, rounds=1), H100, 64).sequential
        six = estimate(DEMO, H100, 64).sequential
        assert six["synthetic_prompts"] == pytest.approx(6 * once["synthetic_prompts"])
        assert six["distilled_model"] == once["distilled_model"]

    def test_training_is_not_divided(self) -> None:
        one, many = (estimate(DEMO, H100, count).seconds["distilled_model"] for count in (1, 64))
        assert one == many > 0

    def test_gpu_hours_count_every_gpu_for_the_whole_time(self) -> None:
        eight = estimate(DEMO, H100, 8)
        assert eight.gpu_hours == pytest.approx(8 * eight.total_seconds / 3600)

    def test_recorded_speeds_divide_whole_batches_only(self) -> None:
        """320 calls in batches of 64 are five batches: a sixth GPU has nothing to do."""
        speeds = {"synthetic_prompts": 0.1}

        def seconds(gpus: int) -> float:
            return estimate(DEMO, H100, gpus, recorded=speeds).seconds["synthetic_prompts"]

        assert seconds(1) == pytest.approx(6 * 320 * 0.1)
        assert seconds(5) == seconds(64) == pytest.approx(6 * 64 * 0.1)

    def test_a_step_takes_at_least_the_time_to_start_its_kernels(self) -> None:
        eager = estimate(DEMO, H100, 64)
        served = estimate(replace(DEMO, proposals=replace(DEMO.proposals, eager=False)), H100, 64)
        assert served.seconds["synthetic_prompts"] < eager.seconds["synthetic_prompts"]
        least = 6 * (1 + DEMO.proposals.longest) * GEMMA.layers * H100.launch
        assert eager.seconds["synthetic_prompts"] == pytest.approx(least)

    def test_checkpointing_runs_the_layers_once_more(self) -> None:
        plain, fractions = DEMO.training, Fractions()
        again = replace(plain, checkpointing=True)
        more = 4695 * 32.2 * 2 * (GEMMA.body + 3_796_992) / GPUS["cpu"].flops / fractions.training
        cpu = GPUS["cpu"]
        assert again.seconds(cpu, fractions) - plain.seconds(cpu, fractions) == pytest.approx(more)
        assert again.seconds(H100, fractions) == pytest.approx(1.5 * plain.seconds(H100, fractions))  # starting kernels

    def test_a_larger_fraction_of_the_limit_is_faster(self) -> None:
        gpu = replace(H100, launch=0)
        half, all_ = (estimate(DEMO, gpu, 1, Fractions(f, f, f)).total_seconds for f in (0.5, 1.0))
        assert half == pytest.approx(2 * all_)


class TestBottleneck:
    def test_of_the_packaged_transfer_on_a_cpu_is_the_training(self) -> None:
        assert estimate(DEMO, GPUS["cpu"], 1).bottleneck == "distilled_model, which isn't divided"

    def test_names_what_bounds_the_longest_step(self) -> None:
        untrained = replace(DEMO, training=replace(DEMO.training, examples=1))
        served = replace(untrained, proposals=replace(DEMO.proposals, eager=False, rows=100_000))
        assert estimate(served, H100, 1).bottleneck == "synthetic_prompts, decoding"
        assert estimate(untrained, H100, 1).bottleneck == "scored_pairs, starting kernels"
        assert estimate(untrained, H100, 64).bottleneck == "scored_pairs, as rounds wait for each other"
        reading = replace(served, proposals=replace(served.proposals, prompt=5000, response=1, longest=1))
        assert estimate(reading, H100, 1).bottleneck == "synthetic_prompts, reading prompts"


class TestMemory:
    def test_of_answering_is_libraries_weights_and_rows(self) -> None:
        found = estimate(DEMO, H100, 1).memory["synthetic_prompts"]
        proposals = DEMO.proposals
        tokens = 3 * (proposals.prompt + proposals.shared) + proposals.longest
        row = tokens * 18 * 2 * 256 * 2 + 3 * 2 * 262144
        assert found == pytest.approx(0.8e9 + 500e6 + 64 * row)

    def test_of_training_is_libraries_weights_adapter_and_batch(self) -> None:
        training = DEMO.training
        batch = 16 * (105 * 18 * 16 * (640 + 2048) + 7.6 * 262144 * 10)
        assert training.memory == pytest.approx(0.8e9 + 2 * GEMMA.parameters + 16 * 3_796_992 + batch)
        assert replace(training, quantized=True).memory < training.memory
        assert replace(training, batch=1).memory < training.memory

    def test_of_training_with_checkpointing_holds_one_layer_and_the_inputs_of_all(self) -> None:
        training = replace(DEMO.training, checkpointing=True)
        batch = 16 * (105 * (16 * (640 + 2048) + 18 * 2 * 640) + 7.6 * 262144 * 10)
        assert training.memory == pytest.approx(0.8e9 + 2 * GEMMA.parameters + 16 * 3_796_992 + batch)
        assert DEMO.training.memory - replace(DEMO.training, moments_8bit=True).memory == 6 * 3_796_992

    def test_a_batch_shrinks_to_the_memory_as_the_engine_does_it(self) -> None:
        small = Hardware("small", 1e12, 1e11, 700e6)
        roomy, tight = (estimate(DEMO, gpu, 1) for gpu in (H100, small))
        assert roomy.batch["synthetic_prompts"] == 64
        assert tight.batch["synthetic_prompts"] == int(0.5 * 200e6 / DEMO.proposals.row_bytes) < 64
        none = estimate(DEMO, replace(small, memory=1e6), 1)
        assert none.batch["synthetic_prompts"] == 1
        assert math.isfinite(none.total_seconds)
