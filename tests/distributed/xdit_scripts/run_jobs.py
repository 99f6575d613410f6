"""Runs scripts one after another in this process, as ``python SCRIPT ARGUMENTS`` would in the folder that is named.

A process takes seconds to import what they need. Leaves in each folder what the cache of the script's pipeline did.
"""

import json
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        os.chdir(job["folder"])
        sys.argv[:] = [job["script"], *job["arguments"]]
        pipe = runpy.run_path(job["script"], run_name="__main__").get("pipe")
        if pipe is not None:
            summary = pipe.parallel.summary()  # also after the processes have parted
            Path(f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps({"hit_rate": summary["hit_rate"]}))


if __name__ == "__main__":
    main()
