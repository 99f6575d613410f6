"""`xdit batch` as a script: images from files of prompts, on worker groups that Ray starts.

python scripts/batch_generate.py --prompts prompts.jsonl --output_dir job --groups 2 --target_speedup 3
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["batch", *sys.argv[1:]])
