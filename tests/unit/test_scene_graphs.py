"""Scene graphs: what they may say, the pipeline that draws them, and the command line that takes them from files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from benchmark import cache_execute
from benchmark.common import captions_of, sampling_of
from benchmark.measure import conditions_of
from xfuser import cli
from xfuser.model_executor.adapters import small
from xfuser.model_executor.cache import apply_cache_on_pipeline
from xfuser.model_executor.cache.adacorrection.trajectory import attach_trajectory
from xfuser.model_executor.pipelines import MODEL_TYPES, load_pipeline
from xfuser.model_executor.pipelines.choosing import resolve_model
from xfuser.model_executor.pipelines.scene_graph import SceneGraphPipeline
from xfuser.model_executor.pipelines.scene_graph_encoder import SceneGraphEncoder
from xfuser.model_executor.pipelines.scene_graphs import Vocabulary, read_graph_files
from xfuser.ray.batch.requests import Rules, check_row

VOCABULARY = Vocabulary(("apple", "box", "cat"), ("left of", "inside"), 3, 2)
GRAPH = {"objects": ["apple", "box"], "relations": [[0, "inside", 1]]}
OTHER = {"objects": ["apple", "box"], "relations": [[0, "left of", 1]]}


@pytest.fixture(scope="module")
def pipeline() -> SceneGraphPipeline:
    with small.seeded(0):
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=24,
            attention_head_dim=4,
        )
        encoder = SceneGraphEncoder(VOCABULARY.objects, VOCABULARY.predicates, 3, 2, width=8, num_layers=2)
        scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
        built = SceneGraphPipeline(small.small_autoencoder(), encoder.eval(), unet.eval(), scheduler)
        small.strengthen(built.unet)
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="module")
def folder(pipeline: SceneGraphPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(written)
    return written


def images(pipeline: SceneGraphPipeline, graphs: Any, steps: int = 3, **settings: Any) -> np.ndarray:
    count = 1 if isinstance(graphs, dict | str) else len(graphs)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipeline(graphs, num_inference_steps=steps, generator=generators, output_type="np", **settings).images


# -- what a graph may say ----------------------------------------------------------------------------------------------


def test_a_graph_may_be_json_or_what_json_says() -> None:
    assert VOCABULARY.check(json.dumps(GRAPH)) == VOCABULARY.check(GRAPH) == GRAPH
    assert VOCABULARY.check({"objects": ["cat"], "relations": []})["objects"] == ["cat"]


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        ("{", "expected JSON, as"),
        ([], "expected the keys objects and relations"),
        ({"objects": ["apple"]}, "expected the keys objects and relations"),
        ({"objects": "apple", "relations": []}, "a list of 1 to 3 names"),
        ({"objects": [], "relations": []}, "a list of 1 to 3 names"),
        ({"objects": ["aple"], "relations": []}, "'aple' is not known; did you mean apple?"),
        ({"objects": [7], "relations": []}, "known are apple, box, cat"),
        ({"objects": ["apple", "apple"], "relations": []}, "'apple' is named twice"),
        (GRAPH | {"relations": [[0, "under", 1]]}, "known are left of, inside"),
        (GRAPH | {"relations": [[0, "inside"]]}, "expected [subject, predicate, object]"),
        (GRAPH | {"relations": [[0, "inside", 2]]}, "2 is no object's index; there are 0 to 1"),
        (GRAPH | {"relations": [[True, "inside", 0]]}, "True is no object's index"),
        (GRAPH | {"relations": [[1, "inside", 1]]}, "are the same"),
        (GRAPH | {"relations": [[0, "inside", 1]] * 3}, "at most 2"),
    ],
)
def test_what_is_wrong_with_a_graph_is_one_line(graph: Any, said: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        VOCABULARY.check(graph)
    assert said in str(error.value)


def test_a_file_holds_one_graph_or_several(tmp_path: Path) -> None:
    one, two, none = (tmp_path / name for name in ("one.json", "two.json", "none.json"))
    one.write_text(json.dumps(GRAPH))
    two.write_text(json.dumps([OTHER, GRAPH]))
    none.write_text("[]")
    assert [json.loads(text) for text in read_graph_files([one, two])] == [GRAPH, OTHER, GRAPH]
    for path, said in ((none, "holds no graph"), (tmp_path / "absent.json", "cannot be read")):
        with pytest.raises(ValueError, match=said):
            read_graph_files([path])


# -- the encoder and the pipeline --------------------------------------------------------------------------------------


def test_tokens_tell_relations_apart_and_no_graph_has_none(pipeline: SceneGraphPipeline) -> None:
    inside, left, none = pipeline.encode_graphs([GRAPH, OTHER, None])
    assert inside.shape == (2 + 3 + 1, 24)
    assert not torch.allclose(inside, left, atol=1e-3)
    assert not none.any() and not inside[1].any() and inside[0].any() and inside[-1].any()


def test_the_order_of_objects_and_relations_does_not_count(pipeline: SceneGraphPipeline) -> None:
    graph = {"objects": ["apple", "box", "cat"], "relations": [[0, "inside", 1], [2, "left of", 0]]}
    turned = {"objects": ["cat", "box", "apple"], "relations": [[0, "left of", 2], [2, "inside", 1]]}
    one, other = pipeline.encode_graphs([graph, turned])
    assert torch.allclose(one[:2], other[:2].flip(0), atol=1e-5)
    assert torch.allclose(one[-1], other[-1], atol=1e-5)


def test_an_image_depends_on_its_graph_and_its_noise_alone(pipeline: SceneGraphPipeline) -> None:
    both = images(pipeline, [GRAPH, json.dumps(OTHER)])
    assert both.shape == (2, 32, 32, 3) and np.isfinite(both).all()
    assert np.allclose(images(pipeline, GRAPH)[0], both[0], atol=1e-4)
    assert not np.allclose(images(pipeline, OTHER)[0], both[0], atol=1e-3)
    assert not np.allclose(images(pipeline, GRAPH, guidance_scale=1.0)[0], both[0], atol=1e-3)


def test_what_callers_may_change_is_taken(pipeline: SceneGraphPipeline) -> None:
    seen = []

    def end(called: SceneGraphPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((called is pipeline, step, sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = ("latents", "graph_embeds")
    settings = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": asked}
    latents = pipeline(GRAPH, 2, latents=noise, output_type="latent", return_dict=False, **settings)[0]
    assert seen == [(True, step, sorted(asked)) for step in range(2)] and not latents.any()
    drawn = pipeline(GRAPH, 2, latents=noise, output_type="np").images
    assert np.allclose(drawn, images(pipeline, GRAPH, steps=2), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scene_graphs": []}, "scene_graphs: there is none"),
        ({"generator": [torch.Generator()] * 2}, "generator: 2 given for 1 images"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"expected \(1, 4, 8, 8\)"),
        ({"callback_on_step_end_tensor_inputs": ("noise",)}, "'noise' is not known"),
    ],
)
def test_what_does_not_fit_is_refused(pipeline: SceneGraphPipeline, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pipeline(**({"scene_graphs": GRAPH, "num_inference_steps": 1} | settings))


def test_a_folder_is_read_as_it_was_written(pipeline: SceneGraphPipeline, folder: Path) -> None:
    loaded = load_pipeline("tiny-sgdiff", str(folder))
    assert isinstance(loaded.pipeline, SceneGraphPipeline)
    assert loaded.pipeline.graph_encoder.vocabulary == VOCABULARY
    drawn = loaded.generate([GRAPH, json.dumps(OTHER)], [0, 1], num_inference_steps=3)
    assert np.array_equal(drawn, images(pipeline, [GRAPH, OTHER]))


# -- caches ------------------------------------------------------------------------------------------------------------


def test_the_block_cache_attaches_to_its_unet(pipeline: SceneGraphPipeline) -> None:
    uncached = images(pipeline, [GRAPH, OTHER], steps=6)
    for threshold, share in ((0.0, 0.0), (1e9, 0.5)):
        engine = apply_cache_on_pipeline(pipeline, "Tea", rel_l1_thresh=threshold)
        try:
            cached = images(pipeline, [GRAPH, OTHER], steps=6)
            assert engine.summary()["hit_rate"] >= share
            assert np.array_equal(cached, uncached) == (threshold == 0)
        finally:
            engine.remove()


def test_the_trajectory_attaches_to_it(pipeline: SceneGraphPipeline, tmp_path: Path) -> None:
    uncached = images(pipeline, [GRAPH, OTHER], steps=12)
    engine = attach_trajectory(pipeline, adacorr_budget=0.5, store=tmp_path)
    try:
        learned = images(pipeline, [GRAPH, OTHER], steps=12)
        replayed = images(pipeline, [GRAPH, OTHER], steps=12)
        share = engine.summary()["evaluated_share"]
    finally:
        engine.remove()
    assert np.array_equal(learned, uncached)
    assert 0 < share <= 0.5 and not np.array_equal(replayed, uncached)


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_draws_the_graphs_of_a_file(folder: Path, tmp_path: Path) -> None:
    graphs = tmp_path / "graphs.json"
    graphs.write_text(json.dumps([GRAPH, OTHER]))
    output = tmp_path / "images"
    given = ["generate", "--model", str(folder), "--scene_graph", str(graphs), "--num_inference_steps", "2"]
    cli.main([*given, "--output_dir", str(output), "--save_raw"])
    assert json.loads((output / "statistics.json").read_text())["request"]["conditions"][1] == json.dumps(OTHER)
    wanted = load_pipeline("tiny-sgdiff", str(folder)).generate([GRAPH, OTHER], [42, 43], 2)
    assert np.allclose(np.load(output / "images.npy"), wanted, atol=1e-6)


def refused(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    with pytest.raises(SystemExit):
        cli.main(["generate", *given])
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_does_not_go_with_scene_graphs_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, wrong = ["--model", str(folder)], tmp_path / "wrong.json"
    wrong.write_text(json.dumps([GRAPH, GRAPH | {"objects": ["apple", "boxx"]}]))
    assert "--scene_graph is missing" in refused(capsys, *model)
    said = refused(capsys, *model, "--scene_graph", str(wrong))
    assert "graph 1: object 'boxx' is not known; did you mean box?" in said
    graph = ["--prompt", json.dumps(GRAPH)]
    assert "leave one of them out" in refused(capsys, *model, *graph, "--scene_graph", str(wrong))
    assert "--height does not go with" in refused(capsys, *model, *graph, "--height", "64")
    assert "--class_label does not go with" in refused(capsys, *model, *graph, "--class_label", "bag")
    said = refused(capsys, "--model_type", "flux", "--prompt", "a fox", "--scene_graph", str(wrong))
    assert "--scene_graph does not go with --model_type flux; leave it out, or name tiny-sgdiff" in said


# -- what else takes prompts -------------------------------------------------------------------------------------------


def test_a_line_of_a_job_names_a_graph_as_its_prompt(folder: Path) -> None:
    rules = Rules.of("tiny-sgdiff", str(folder), 2)
    assert "scene_graphs" not in rules.known
    line = {"id": "a", "prompt": json.dumps(GRAPH)}
    assert check_row(line, rules, 0).condition == json.dumps(GRAPH)
    for name, value, said in (("height", 64, "draws 32 x 32 only"), ("negative_prompt", "fog", "leave it out")):
        with pytest.raises(ValueError, match=said):
            check_row(line | {name: value}, rules, 0)


def test_benchmarks_draw_the_models_own_graphs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "evaluation").mkdir()
    (model / "evaluation" / "scene_graphs.json").write_text(json.dumps([GRAPH, OTHER]))
    kind = dataclasses.replace(MODEL_TYPES["tiny-sgdiff"], default=lambda: model)
    monkeypatch.setitem(MODEL_TYPES, "tiny-sgdiff", kind)
    own = [json.dumps(GRAPH), json.dumps(OTHER)]
    assert captions_of("tiny-sgdiff") == own
    args = cache_execute.parser().parse_args(["--model", "tiny-sgdiff", "--num_images", "2"])
    resolve_model(args)
    sampling = sampling_of(args)
    assert sampling.prompts == tuple(own) and sampling.guidance_scale == 6.0
    loaded = load_pipeline("tiny-sgdiff")
    assert loaded.generate(conditions_of(loaded, sampling, 0, 2), [0, 1], 1).shape == (2, 32, 32, 3)
    args.height = 64
    with pytest.raises(ValueError, match="--height.*draws one size only"):
        sampling_of(args)
