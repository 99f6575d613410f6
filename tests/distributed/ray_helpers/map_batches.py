"""Runs the documentation's example of Ray Data on tiny-dit: Parquet in, Parquet out.

python map_batches.py FOLDER        leaves FOLDER/images (of two ranks) and FOLDER/direct.parquet (of this process)
"""

import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import ray

from xfuser.ray import ImageGenerator

ROWS = 12


def main() -> None:
    folder = Path(sys.argv[1])
    rows = [{"id": f"s3://bucket/{index}", "class_label": index % 10, "note": "kept"} for index in range(ROWS)]
    (folder / "prompts").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "prompts" / "prompts.parquet")
    ray.init(num_cpus=3, include_dashboard=False)  # two ranks, and one processor for what reads and writes
    settings = {"pipeline": "tiny-dit", "cache": {"adacorr_budget": 0.5}, "num_inference_steps": 6, "threads": 1}
    prompts = ray.data.read_parquet(str(folder / "prompts"))

    one, batch = ImageGenerator(**settings), prompts.take_batch(ROWS)
    settings["calibration"] = one.learn({name: values[:4] for name, values in batch.items()})
    made = one(batch)
    pyarrow.parquet.write_table(
        pyarrow.table({name: values.tolist() for name, values in made.items()}), folder / "direct.parquet"
    )
    settings["parallel"] = {"ulysses_degree": 2}
    images = prompts.map_batches(ImageGenerator, fn_constructor_kwargs=settings, batch_size=4, concurrency=1)
    images.write_parquet(str(folder / "images"))
    ray.shutdown()


if __name__ == "__main__":
    main()
