"""What families do not go with is refused in one line, and the docs list what they go with; two denoisers in turn."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import ALWAYS, Toy, attached
from written_tables import assert_written

from xfuser.config import ParallelConfig
from xfuser.model_executor.adapters import FAMILIES, Family, denoisers_of, spec_of
from xfuser.model_executor.cache import apply_cache_on_pipeline
from xfuser.model_executor.parallel.apply import check_family

SKIPPING = {"use_cache": "Tea", "rel_l1_thresh": ALWAYS}
BY_TOKEN = {"use_cache": "Fb", "enable_adacorrection": True, "adacorr_mode": "gate", "granularity": "token"}
TABLE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


# -- what a family does not go with ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_what_cannot_be_is_refused_in_one_line(family: Family) -> None:
    refused = {
        "pipefusion": (ParallelConfig(pipefusion_parallel_degree=2), family.spec.contiguous),
        "ulysses": (ParallelConfig(ulysses_degree=2), family.spec.same_tokens),
        "ring": (ParallelConfig(ring_degree=2), family.spec.same_tokens),
        "cfg": (ParallelConfig(use_cfg_parallel=True), True),
    }
    for parallel, allowed in refused.values():
        if allowed:
            check_family(family.spec, parallel)
            continue
        with pytest.raises(ValueError, match=f"^--.*{family.spec.transformer_class}.*; use ") as caught:
            check_family(family.spec, parallel)
        assert "\n" not in str(caught.value)


def test_tokens_of_a_unet_are_not_chosen() -> None:
    toy = Toy.build("unet")
    for settings in ({"use_cache": "Fast", "motion_threshold": 0.3}, BY_TOKEN):
        with pytest.raises(ValueError, match="UNet2DConditionModel"):
            apply_cache_on_pipeline(toy.pipeline, **settings)
        assert "forward" not in vars(toy.transformer)


def test_two_denoisers_have_no_calibration_of_blocks() -> None:
    toy = Toy.build("wan-2.2")
    with pytest.raises(ValueError, match="has 2; leave it out"):
        apply_cache_on_pipeline(toy.pipeline, "Tea", calibration="first")
    with attached(toy.pipeline, "pipeline", **SKIPPING) as engine:
        with pytest.raises(ValueError, match="has 2; leave it out"):
            engine.record()


def test_two_denoisers_share_one_engine() -> None:
    """The first step of each is evaluated, for it remembers nothing; all others are skipped; one plan tells of both."""
    toy = Toy.build("wan-2.2")
    calls = [0, 0]
    for index, denoiser in enumerate(denoisers_of(toy.pipeline)):
        block = spec_of(denoiser).blocks(denoiser)[0]
        block.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    toy.images(8)
    first, second = calls
    assert first > 1 and second > 1 and first + second == 8
    with attached(toy.pipeline, "pipeline", **SKIPPING) as engine:
        toy.images(8)
        (plan,) = engine.summary()["plan"].values()
    # TeaCache also computes the last step.
    assert [row[0] for row in plan] == [1, *[0] * (first - 1), 1, *[0] * (second - 2), 1]


# -- the docs ----------------------------------------------------------------------------------------------------------


def table() -> str:
    """The families and what each goes with, from the specs."""
    lines = [
        "| family | pipelines (diffusers) | guidance | Ulysses, ring | PipeFusion | some tokens only | remembered |",
        "|---|---|---|---|---|---|---|",
    ]
    calls = {"batch": "in one batch", "calls": "in two calls"}
    for family in FAMILIES:
        spec, yes = family.spec, {True: "yes", False: "refused"}
        kinds = dict.fromkeys(small.pipeline for small in family.small.values())
        own = (each for each in family.types.values() if each.module == "diffusers")
        kinds |= dict.fromkeys(name for each in own for name in each.pipelines)
        cells = [family.title, ", ".join(f"`{name}`" for name in kinds), calls[spec.guidance]]
        cells += [yes[spec.same_tokens], yes[spec.contiguous], yes[spec.same_tokens]]
        cells.append("as a stack where that will do" if spec.contiguous else "one by one")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_docs_list_the_families() -> None:
    assert_written(TABLE, BEGIN, table(), END)
