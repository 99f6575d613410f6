"""Batch generation: prompts from files, worker groups on Ray, images and a manifest that lose nothing."""
