"""Which model each part of a transfer gets. No model is loaded."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.resources import EngineResource


@pytest.mark.parametrize(("own", "expected"), [(None, "nf4"), ("none", "none")])
def test_a_generator_has_a_quantization_of_its_own(
    transfer_folder: Path,
    edit_config: Callable[[str, Any], None],
    monkeypatch: pytest.MonkeyPatch,
    own: str | None,
    expected: str,
) -> None:
    """Though it is the source's base here: with another quantization one model is loaded twice."""
    monkeypatch.setattr(LocalEngine, "ends", {0})
    monkeypatch.setattr(LocalEngine, "tokenizer", SimpleNamespace(eos_token_id=0))
    edit_config("generator.quantization", own)
    transfer, engines = load_transfer(transfer_folder), EngineResource()
    source, generator = engines.source(transfer), engines.generator(transfer)
    engines.release()
    assert isinstance(source, LocalEngine) and isinstance(generator, LocalEngine)
    assert source.base == generator.base
    assert (source.quantization, generator.quantization) == ("nf4", expected)
    assert (source.fingerprint("base") == generator.fingerprint("base")) == (own is None), "their cached responses"


def test_every_model_keeps_keys_and_values_as_set(
    transfer_folder: Path, edit_config: Callable[[str, Any], None]
) -> None:
    edit_config("models.kv_cache_dtype", "int8")
    transfer, engines = load_transfer(transfer_folder), EngineResource()
    made = [engines.source(transfer), engines.generator(transfer)]
    engines.release()
    assert [engine.kv_cache_dtype for engine in made if isinstance(engine, LocalEngine)] == ["int8", "int8"]
