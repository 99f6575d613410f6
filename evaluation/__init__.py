"""Judge images and report runs: what benchmarks, training scripts and tests use, and the package itself does not."""
