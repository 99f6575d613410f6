"""What the ranks that share an image tell each other so that all of them go on, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from xfuser.core.distributed.shutdown import USAGE, is_lost, one_line

Result = TypeVar("Result")
_DONE, _REFUSED, _FAILED = "done", "refused", "failed"


class Agreement:
    """One decision where several ranks decide. With one process, every decision is its own.

    A rank that refuses alone leaves the others waiting for it in their next collective, so whatever may be refused by
    one rank only (a file that one host lacks, weights that differ) is tried on all of them and settled here.

    Args:
        group: A gloo group of the ranks that share an image; ``None`` is one process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def gather(self, value: Any) -> list[Any]:
        """Collect a picklable value of every rank, in rank order. Collective."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, value: Any) -> Any:
        """Take the first rank's picklable value on all of them. Collective."""
        if self.group is None:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=dist.get_global_rank(self.group, 0), group=self.group)
        return told[0]

    def attempt(self, make: Callable[[], Result]) -> Result:
        """Do something that may be refused, and go on on all ranks or on none. Collective.

        Raises:
            Exception: What this rank's own attempt has raised.
            ValueError: Another rank has refused, and the line says which and why.
            RuntimeError: Another rank has failed otherwise.
        """
        return self._settled(make, lambda _: None)[0]

    def shared(self, make: Callable[[], Result], digest: Callable[[Result], Any]) -> Result:
        """Make a value on all ranks, and take the first one's where any of them has another. Collective.

        Only digests travel where all are the same; every rank sees all of them, so all of them know whether the value
        itself has to follow.

        Args:
            make: Makes this rank's value; it may refuse, as for `attempt`.
            digest: What is equal for values that are.
        """
        result, digests = self._settled(make, digest)
        return result if all(each == digests[0] for each in digests) else self.first(result)

    def _settled(self, make: Callable[[], Result], digest: Callable[[Result], Any]) -> tuple[Result, list[Any]]:
        if self.group is None:
            return make(), [None]
        try:
            result = make()
        except Exception as error:
            if not is_lost(error):
                self.gather((_REFUSED if isinstance(error, USAGE) else _FAILED, one_line(error)))
            raise
        told = self.gather((_DONE, digest(result)))
        for place, (how, what) in enumerate(told):
            who = f"rank {dist.get_global_rank(self.group, place)}"
            if how == _REFUSED:
                raise ValueError(f"refused, since {who} refuses: {what}")
            if how == _FAILED:
                raise RuntimeError(f"stopped, since {who} failed: {what}")
        return result, [what for _, what in told]
