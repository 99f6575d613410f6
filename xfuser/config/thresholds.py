"""The default ``rel_l1_thresh`` of every base method that has one, by model. Needs no torch: the help shows them."""

from __future__ import annotations

# The model that comes with the package: small and well trained, so that it moves less from step to step.
TINY_DIT = {"Fast": 0.016, "Tea": 0.06, "Fb": 0.05}
DIT = {"Fast": 0.05, "Tea": 0.1, "Fb": 0.08}
FLUX = {"Fast": 0.05, "Tea": 0.4, "Fb": 0.08}
# At these the toys of the two skip about half of their block evaluations in 20 steps with Tea and Fb; no real weights
# were at hand to choose them by.
PIXART = {"Fast": 0.05, "Tea": 0.05, "Fb": 0.017}
SD3 = {"Fast": 0.05, "Tea": 0.04, "Fb": 0.07}

# What tells the shipped models from others of their pipelines, in their transformers' configurations.
TINY_DIT_CONFIGURATION = {
    "num_layers": 12,
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "sample_size": 8,
    "patch_size": 1,
}
TINY_FLUX_CONFIGURATION = {
    "num_layers": 6,
    "num_single_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 28,
    "in_channels": 16,
}
