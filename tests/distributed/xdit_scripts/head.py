"""A script of the shape of xDiT's examples of today: it asks for a version of diffusers before it does anything."""

import importlib.util
import os
from pathlib import Path

from xfuser.config.diffusers import get_minimum_diffusers_version, has_valid_diffusers_version

for family in ("flux", "pixart", None):
    if not has_valid_diffusers_version(family):
        raise ImportError(f"install diffusers>={get_minimum_diffusers_version(family)}")

from xfuser.core.distributed import (  # noqa: E402, F401 (a block that most examples begin with)
    get_classifier_free_guidance_world_size,
    get_pipeline_parallel_world_size,
    get_runtime_state,
    get_tensor_model_parallel_world_size,
    is_dp_last_group,
)

# What follows the version has not changed since 0.4.4.
BEFORE = Path(__file__).with_name("release_0_4_4.py")


def main():
    described = importlib.util.spec_from_file_location("release_0_4_4", BEFORE)
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    os.makedirs("results", exist_ok=True)
    return module.main()


if __name__ == "__main__":
    pipe = main()
