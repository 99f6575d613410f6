"""`xdit generate` as a script: alone, or in every process of a torchrun.

python scripts/generate.py --model tiny-dit --class_label 0 1 --use_cache Tea
python scripts/generate.py --ulysses_degree 2 --class_label 0 1      starts both processes itself
torchrun --nproc_per_node=2 scripts/generate.py --ulysses_degree 2 --class_label 0 1
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]], Path(__file__).resolve())
