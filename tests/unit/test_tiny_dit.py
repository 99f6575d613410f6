"""The model that ships with the package: complete, small, and able to draw what it is asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evaluation.metrics import FeatureNetwork, read_reference
from xfuser.model_executor.cache import apply_cache_on_pipeline
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline
from xfuser.model_executor.pipelines.loading import shipped_tiny_dit

LARGEST = 25 * 2**20


@pytest.fixture(scope="module")
def tiny() -> LoadedPipeline:
    return load_pipeline("tiny-dit")


def test_the_folder_is_complete_small_and_safe() -> None:
    folder = shipped_tiny_dit()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    assert len(index["id2label"]) == 10


def test_the_transformer_is_a_real_size(tiny: LoadedPipeline) -> None:
    transformer = tiny.pipeline.transformer
    assert len(transformer.transformer_blocks) >= 12
    assert transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings == 1001


def test_the_classifier_and_the_reference_belong_together() -> None:
    reference = read_reference(shipped_tiny_dit() / "evaluation" / "reference.safetensors")
    assert float(reference.metadata["test_accuracy"]) >= 0.92
    assert reference.mean.shape == (64,)


def test_it_draws_the_class_it_is_asked_for(tiny: LoadedPipeline) -> None:
    labels = [index % 10 for index in range(30)]
    images = tiny.generate(labels, list(range(30)), num_inference_steps=20)
    network = FeatureNetwork.load(shipped_tiny_dit() / "evaluation" / "classifier.safetensors")
    seen = network.classify(torch.from_numpy(images).permute(0, 3, 1, 2)).argmax(1)
    assert (seen == torch.tensor(labels)).double().mean() >= 0.8


def test_half_the_blocks_draw_nearly_the_same(tiny: LoadedPipeline) -> None:
    labels, seeds = [0, 1, 8, 9], [5, 6, 7, 8]
    plain = tiny.generate(labels, seeds, num_inference_steps=30)
    engine = apply_cache_on_pipeline(tiny.pipeline, "Tea", enable_adacorrection=True, adacorr_budget=0.5)
    try:
        cached = tiny.generate(labels, seeds, num_inference_steps=30)
        summary = engine.summary()
    finally:
        engine.remove()
    assert summary["hit_rate"] == pytest.approx(0.5, abs=0.02)
    error = np.mean((cached - plain) ** 2)
    assert 0 < error < 10**-3.5
