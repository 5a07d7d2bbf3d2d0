"""The tokens that a run of decoder layers sees: a `Layout` to decide with, a `Segment` to compute with.

The layout lives on the device, where methods say which tokens stay. The host knows how many tokens each row has. So
nothing waits for the device as long as the counts are known beforehand.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.ops.attention import gather_rows


@dataclass
class Layout:
    """The tokens of a forward that a run of decoder layers sees, S of the L that the caller sent.

    mask     : (B, S) False at padding
    position : (B, S) rotary position; (axes, B, S) where it has several numbers
    image    : (B, S) i at the visual tokens of the row's i-th image, 0 at text and padding
    slot     : (B, S) position of a visual token within its image, from 0; -1 at text, at padding and where the method
               did not say which slots its tokens take
    origin   : (B, S) index in the caller's sequence
    counts   : tokens of each row, without padding
    source   : (B, L) for each of the caller's tokens, the index of the token that stands for it here: itself, or the
               last one before it that was kept; -1 if there is none. None while nothing has been dropped
    gapped   : tokens were dropped and the others kept their rotary positions
    """

    mask: Tensor
    position: Tensor
    image: Tensor
    slot: Tensor
    origin: Tensor
    counts: list[int]
    source: Tensor | None = None
    gapped: bool = False

    @property
    def last(self) -> Tensor:
        """(B,) index of each row's last token."""
        return (self.mask * torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)).argmax(1)

    def select(self, keep: Tensor, renumber: bool = False, counts: list[int] | None = None) -> "Selection | None":
        """Drop all tokens except the `keep` (B, S). The kept tokens of each row are padded on the left.

        Args:
            keep: True at tokens that stay.
            renumber: close the gaps in the rotary positions: each kept token moves down by the number of tokens
                dropped before it. Where positions have several numbers, see `closed_up`.
            counts: how many tokens of each row stay, padding not counted; None waits for the device to count them.

        Returns:
            None if everything stays.
        """
        keep = keep & self.mask
        kept_so_far = keep.cumsum(1)  # (B, S), the token itself included
        if counts is None:
            counts = kept_so_far[:, -1].tolist()
        if counts == self.counts:
            return None
        dropped_so_far = self.mask.cumsum(1) - kept_so_far
        position, shift = self.position, dropped_so_far[:, -1:]
        if renumber and position.ndim == 3:
            position, shift = closed_up(position, keep, self.image > 0)
        elif renumber:
            position = position - dropped_so_far
        size = max(counts)
        # a stable sort moves the kept tokens to the end of their row, in order
        index = keep.byte().argsort(dim=1, stable=True)[:, keep.shape[1] - size :]
        mask = keep.gather(1, index)
        # where each kept token goes; at a dropped token, where the last kept token before it goes
        target = torch.where(kept_so_far > 0, kept_so_far + (size - 1 - kept_so_far[:, -1:]), -1)
        source = target
        if self.source is not None:
            source = torch.where(self.source < 0, -1, target.gather(1, self.source.clamp(min=0)))
        layout = Layout(
            mask=mask,
            position=position.gather(-1, index.expand(*position.shape[:-1], -1)),
            image=torch.where(mask, self.image.gather(1, index), 0),  # at padding stands some dropped token
            slot=torch.where(mask, self.slot.gather(1, index), -1),
            origin=self.origin.gather(1, index),
            counts=counts,
            source=source,
            gapped=self.gapped or not renumber,
        )
        return Selection(layout, index, target, shift)


@dataclass
class Selection:
    """The outcome of `Layout.select`.

    layout  : the kept tokens
    index   : (B, S') takes them from the old sequence
    target  : (B, S) where in the new sequence each kept token went
    shift   : (B, 1) how far the rotary positions after each row move down, if they are renumbered
    """

    layout: Layout
    index: Tensor
    target: Tensor
    shift: Tensor


def closed_up(position: Tensor, keep: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """Close the gaps in rotary positions of several numbers: time, height and width.

    In each run of visual tokens, and on each axis, a coordinate that no token holds any more vanishes. So kept tokens
    stay in their rows, columns and frames, and the axes do not mix. What stands after the run moves down by what the
    run lost in height or in width, whichever was longer. With one axis this is the plain rule.

    Args:
        position: (axes, B, L).
        keep: (B, L) True at tokens that stay.
        visual: (B, L) True at visual tokens. Text between the frames of a video divides it into runs.

    Returns:
        The positions (axes, B, L), and (B, 1), how far what follows the sequence moves down.
    """
    begun = (visual & ~F.pad(visual, (1, 0))[:, :-1]).cumsum(1)  # runs, up to each token
    run = torch.where(visual, begun, 0)  # of each token, from 1; 0 for none
    closed = torch.where(visual, _without_gaps(position, run, keep), position)

    def of_runs(x: Tensor, reduce: str) -> Tensor:
        """Reduce x (B, L) within each run: (B, L + 1), 0 where there is none."""
        return F.pad(torch.zeros_like(x), (1, 0)).scatter_reduce(1, run, x, reduce, include_self=False)

    before, after = position[-2:], closed[-2:].amax(0)
    none_stays = of_runs(before.amin(0), "amin") - 1
    end = of_runs(torch.where(keep, after, torch.iinfo(after.dtype).min), "amax").maximum(none_stays)
    lost = (of_runs(before.amax(0), "amax") - end).index_fill(1, begun.new_zeros(1), 0)
    fall = lost.cumsum(1)
    return closed - fall.gather(1, begun - visual.long()), fall[:, -1:]


def _without_gaps(x: Tensor, run: Tensor, stays: Tensor) -> Tensor:
    """Renumber coordinates x (axes, B, L) within each run (B, L), so that those of which no token `stays` vanish."""
    run, stays = run.expand_as(x), stays.expand_as(x)
    order = x.argsort(dim=-1, stable=True)
    order = order.gather(-1, run.gather(-1, order).argsort(dim=-1, stable=True))  # by run, then by coordinate
    value, run, stays = (each.gather(-1, order) for each in (x, run, stays))
    first = torch.searchsorted(run, run)  # where the run of each token begins
    step = torch.where(run.diff(dim=-1) == 0, value.diff(dim=-1), 0)  # to the next coordinate; 0 within one
    group = F.pad((run.diff(dim=-1) != 0) | (step != 0), (1, 0)).cumsum(-1)  # the tokens of one coordinate
    held = torch.zeros_like(group).scatter_add(-1, group, stays.long()).gather(-1, group) > 0
    gaps = F.pad(step.masked_fill(held[..., :-1], 0), (1, 0)).cumsum(-1)
    return torch.empty_like(x).scatter_(-1, order, value - (gaps - gaps.gather(-1, first)))


@dataclass
class Segment:
    """The tokens of a forward that a run of decoder layers sees, on the device.

    mask     : (B, S) False at padding
    position : (B, S) rotary position; (axes, B, S) where it has several numbers
    padded   : whether some row may have padding
    layout   : more of the same; None in a forward without images
    source   : (B, L) `Layout.source`; None while nothing has been dropped
    """

    mask: Tensor
    position: Tensor
    padded: bool
    layout: Layout | None = None
    source: Tensor | None = None

    @classmethod
    def of(cls, layout: Layout) -> "Segment":
        """Take the tokens of a layout of which something has been dropped."""
        assert layout.source is not None
        padded = min(layout.counts) < layout.mask.shape[1]
        return cls(layout.mask, layout.position, padded, layout, layout.source)

    def lowered(self, by: Tensor | None) -> "Segment":
        """Return the same tokens at rotary positions that are lower `by` (B, 1)."""
        return self if by is None else replace(self, position=self.position - by.to(self.position.device))

    @property
    def shortened(self) -> bool:
        """True if tokens have been dropped."""
        return self.source is not None

    @property
    def gapped(self) -> bool:
        """True if the rotary positions have gaps where tokens were dropped."""
        return self.layout is not None and self.layout.gapped

    def of_callers(self, values: np.ndarray | Tensor, fill: float) -> Tensor:
        """Take from `values` (B, L), one for each of the caller's tokens, those of the tokens here; `fill` at padding.

        Returns:
            (B, S).
        """
        assert self.layout is not None
        sent = values if isinstance(values, Tensor) else to_device(self.mask.device, values)[0]
        return torch.where(self.layout.mask, sent.gather(1, self.layout.origin), fill)

    def restore(self, hidden: Tensor) -> Tensor:
        """Put hidden states (B, S, d) back where the caller expects them: (B, L, d).

        The place of a dropped token takes the state of the last kept token before it, because that token is the one
        which predicts the next token. A loss or a log-likelihood over the caller's labels is therefore the one of the
        shortened sequence. Places before the first kept token are zero.
        """
        if self.source is None:
            return hidden
        source = self.source.to(hidden.device)
        return gather_rows(hidden, source.clamp(min=0)).masked_fill_(source[..., None] < 0, 0)

    def restore_map(self, attention: Tensor) -> Tensor:
        """Lay an attention map (B, heads, S, P + S) out over the caller's sequence: (B, heads, L, P + L).

        The place of a dropped token takes the row of the last kept token before it, as `restore` does. Nothing is paid
        to a dropped token, nor from places before the first kept token.
        """
        if self.source is None:
            return attention
        assert self.layout is not None
        source, origin = self.source.to(attention.device), self.layout.origin.to(attention.device)
        rows = source.clamp(min=0)[:, None, :, None].expand(-1, attention.shape[1], -1, attention.shape[3])
        attention = attention.gather(2, rows).masked_fill_(source[:, None, :, None] < 0, 0)
        held = attention.shape[3] - origin.shape[1]
        wide = attention.new_zeros(*attention.shape[:3], held + source.shape[1])
        wide[..., :held] = attention[..., :held]
        paid = attention[..., held:] * self.mask.to(attention.device)[:, None, None]
        return wide.scatter_add(3, held + origin[:, None, None].expand_as(paid), paid)


def to_device(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """Copy arrays from the host to a device, without waiting for the device."""
    return [torch.from_numpy(array).to(device, non_blocking=True) for array in arrays]


def concat_masks(cached: Tensor | None, mask: Tensor) -> Tensor:
    """Put one mask after the other, (B, P) and (B, S) -> (B, P + S). None stands for an empty one."""
    return mask if cached is None else torch.cat([cached, mask], dim=1)
