"""The import path that xDiT's scripts know `RayDiffusionPipeline` by."""
