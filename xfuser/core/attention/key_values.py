"""Keys and values that outlive the step which computed them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


class KeyValueMemory:
    """Keys and values [B, heads, S, d] of every declared attention module, by its number.

    Where steps are announced (`begin_step`), those of the step before the newest one are held as well.
    """

    def __init__(self) -> None:
        self._held: dict[int, Pair] = {}
        self._before: dict[int, Pair] = {}
        self._kept_at: dict[int, int] = {}
        self._before_at: dict[int, int] = {}
        self._step = 0

    def clear(self) -> None:
        for each in (self._held, self._before, self._kept_at, self._before_at):
            each.clear()

    def begin_step(self, step: int, extrapolate: bool) -> None:
        """Make room for a step's keys and values, and draw the remembered ones on to it.

        Args:
            step: Its number.
            extrapolate: Whether what is remembered will be read: it is then moved to this step along the straight line
                through the newest two steps that were kept, as the trajectory's forecasts are. Otherwise the step has
                to keep all of its own.
        """
        for module, at in self._kept_at.items():
            before, before_at = self._before.get(module), self._before_at.get(module)
            if before_at != at:  # evaluated since the last announcement; what is held otherwise was drawn on then
                self._before[module], self._before_at[module] = self._held[module], at
            self._held.pop(module, None)
            if extrapolate:
                reach = 0.0 if before_at is None or before_at == at else (step - at) / (at - before_at)
                self._held[module] = _drawn_on(before, self._before[module], reach)
        self._step = step

    def holds(self, modules: range) -> bool:
        return all(module in self._held for module in modules)

    def length(self, module: int) -> int:
        return self._held[module][0].shape[2]

    def keep(self, module: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._held[module] = (key.detach(), value.detach())
        self._kept_at[module] = self._step

    def keep_rows(self, module: int, batch: int, rows: slice | None, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep what belongs to some images of a batch of this size."""
        if rows is None:
            self.keep(module, key, value)
            return
        held = self._held.get(module)
        if held is None or held[0].shape != (batch, *key.shape[1:]):
            held = self._held[module] = (key.new_empty(batch, *key.shape[1:]), value.new_empty(batch, *value.shape[1:]))
        for whole, fresh in zip(held, (key, value), strict=True):
            whole[rows] = fresh
        self._kept_at[module] = self._step

    def update(
        self, module: int, places: torch.Tensor, offset: int, others: slice, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put fresh keys and values among the remembered ones, which are changed in place, and return all of them.

        The tokens at ``places`` [B, k] stand at ``offset`` among the fresh ones and among the remembered ones; those
        in ``others`` (text, if any) come along whole.
        """
        remembered = self._held[module]
        self._kept_at[module] = self._step
        for whole, fresh in zip(remembered, (key, value), strict=True):
            count = places.shape[1]
            chosen = fresh[:, :, offset : offset + count]
            index = (places + offset)[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3])
            whole.scatter_(2, index, chosen)
            if others.start != others.stop:
                begin = count if offset == 0 else 0
                whole[:, :, others] = fresh[:, :, begin : begin + others.stop - others.start]
        return remembered

    def update_spans(
        self, module: int, spans: list[slice], key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put fresh keys and values, which stand one span after the other, at their spans of the remembered ones."""
        remembered = self._held[module]
        self._kept_at[module] = self._step
        for whole, fresh in zip(remembered, (key, value), strict=True):
            begin = 0
            for span in spans:
                count = span.stop - span.start
                whole[:, :, span] = fresh[:, :, begin : begin + count]
                begin += count
        return remembered

    def tensors(self) -> Iterator[torch.Tensor]:
        for pair in (*self._held.values(), *self._before.values()):
            yield from pair


def _drawn_on(before: Pair | None, newest: Pair, reach: float) -> Pair:
    """Go on from the newest ones by so many times their distance to those before; a copy where there are none."""
    if before is None or before[0].shape != newest[0].shape:
        before = newest
    key, value = (torch.lerp(*pair, 1 + reach) for pair in zip(before, newest, strict=True))
    return key, value
