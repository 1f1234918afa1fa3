"""A LoRA that is damped where a layer's inputs of general text are loud."""

from dataclasses import replace

import pytest
import torch
from torch.nn.utils import parametrize
from transformers import GPT2Config, GPT2LMHeadModel

from tests.training.tiny import SETTINGS, TEXTS, examples, tiny_gemma, tiny_model
from tuneshift_dag.training import whitening
from tuneshift_dag.training.loop import _autocast, train
from tuneshift_dag.training.lora import add_lora
from tuneshift_dag.training.whitening import Whitened, bake, whiten


def loud_inputs(width: int = 48, tokens: int = 4_000) -> torch.Tensor:
    """Each direction of a random basis half as loud as the one before, down to the quiet rest."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    return torch.randn(tokens, width) * torch.logspace(0, -3, width).sqrt() @ basis.T


def test_a_step_counts_the_same_in_every_direction_of_general_text() -> None:
    inputs = loud_inputs()
    p = Whitened(inputs)(torch.eye(48)).detach()
    assert float(p.norm()) == pytest.approx(48**0.5), "a random A stays as large"
    whitened = inputs @ p.T
    moment = whitened.T @ whitened / len(inputs)
    floor = whitening._FLOOR * inputs.square().mean() * p @ p.T
    torch.testing.assert_close(moment + floor, (moment + floor)[0, 0] * torch.eye(48), rtol=1e-3, atol=1e-3)


def test_very_wide_inputs_are_damped_one_by_one(monkeypatch) -> None:
    monkeypatch.setattr(whitening, "_WIDEST", 47)
    inputs = torch.randn(4_000, 48) * torch.arange(1, 49).sqrt()
    p = Whitened(inputs)(torch.eye(48)).detach()
    assert torch.equal(p, p.diagonal().diag())
    energy = inputs.square().mean(0) + whitening._FLOOR * inputs.square().mean()
    torch.testing.assert_close(p.diagonal() * energy.sqrt(), (p[0, 0] * energy[0].sqrt()).expand(48))


@pytest.mark.parametrize("build", [tiny_model, tiny_gemma])
def test_what_is_saved_is_an_ordinary_lora(build) -> None:
    model = add_lora(build(), SETTINGS)
    names = list(dict(model.named_parameters()))
    train(model, examples(16), replace(SETTINGS, retain=1.0), texts=TEXTS)
    assert list(dict(model.named_parameters())) == names
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_baking_changes_no_answer_and_queries_keys_and_values_share_what_they_are_damped_by() -> None:
    model = add_lora(tiny_model(), SETTINGS)
    torch.nn.init.normal_(model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.lora_B.default").weight)
    whiten(model, TEXTS, lambda: _autocast(model))
    found = {
        name: module.parametrizations.weight[0]
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight")
    }
    assert len(found) == 2 * 7 and len(set(map(id, found.values()))) == 2 * 4
    ids = torch.tensor([TEXTS[3]])
    before = model(input_ids=ids).logits
    bake(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_a_base_with_dropout_gives_the_same_each_time_and_leaves_the_random_numbers_alone() -> None:
    def weight(drawn: int) -> torch.Tensor:
        base = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.5))
        base.load_state_dict(weights)
        model = add_lora(base.requires_grad_(False).train(), SETTINGS)
        torch.rand(drawn)
        state = torch.get_rng_state()
        whiten(model, TEXTS, lambda: _autocast(model))
        assert torch.equal(torch.get_rng_state(), state)
        return model.get_submodule("base_model.model.transformer.h.1.mlp.c_fc.lora_A.default").weight

    weights = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)).state_dict()
    assert torch.equal(weight(0), weight(3))


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_a_layer_whose_inputs_say_nothing_stays_as_it_is(value: float) -> None:
    model = add_lora(tiny_model(), SETTINGS)
    model.get_submodule("base_model.model.model.layers.0.post_attention_layernorm").weight.fill_(value)
    whiten(model, TEXTS, lambda: _autocast(model))
    layer = model.get_submodule("base_model.model.model.layers.0")
    assert not parametrize.is_parametrized(layer.mlp.up_proj.lora_A["default"])
    assert parametrize.is_parametrized(layer.self_attn.q_proj.lora_A["default"])


def test_without_retain_it_isn_t_there() -> None:
    plain, held = add_lora(tiny_model(), SETTINGS), add_lora(tiny_model(), SETTINGS)
    train(plain, examples(16), SETTINGS, texts=TEXTS)
    train(held, examples(16), SETTINGS)
    for one, other in zip(plain.parameters(), held.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_update_changes_general_text_less() -> None:
    """Steps of one size, on other text than that which says where it is loud."""

    def changed(damped: bool) -> float:
        model = add_lora(tiny_model(), SETTINGS)
        if damped:
            whiten(model, TEXTS[:6], lambda: _autocast(model))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        ids = torch.tensor([TEXTS[7]])
        with torch.no_grad():
            after = model(input_ids=ids).logits
            with model.disable_adapter():
                return float((after - model(input_ids=ids).logits).norm())

    assert changed(damped=True) < 0.8 * changed(damped=False)
