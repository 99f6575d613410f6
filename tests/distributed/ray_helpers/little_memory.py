"""Has the second rank of a group run out of memory, in every process that Ray starts for a command.

`install` is Ray's ``worker_process_setup_hook``. How many images fit depends on the steps: `FIT`.
"""

from typing import Any

FIT = {6: 2, 8: 1}


def install() -> None:
    import torch

    from xfuser.ray.rank import Rank

    begin, generate = Rank.__init__, Rank.generate

    def remembering(rank: Any, settings: Any, place: int = 0, url: str | None = None) -> None:
        begin(rank, settings, place, url)
        rank.tested_place = place

    def limited(rank: Any, requests: Any) -> Any:
        if rank.tested_place == 1 and len(requests) > FIT[requests[0]["num_inference_steps"]]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")  # the first rank waits
        return generate(rank, requests)

    Rank.__init__, Rank.generate = remembering, limited
