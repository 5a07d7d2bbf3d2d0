"""The tokens that a run of decoder layers sees: a `Layout` to decide with, a `Segment` to compute with.

The layout lives on the device, where methods say which tokens stay. The host knows how many tokens each row has. So
nothing waits for the device as long as the counts are known beforehand.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

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
                dropped before it. Where positions have several numbers, see `closed_up`; this waits for the device.
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
            on_host = (x.cpu().numpy() for x in (position, keep, self.image > 0))
            position, shift = to_device(position.device, *closed_up(*on_host))
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


def closed_up(position: np.ndarray, keep: np.ndarray, visual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
    closed, fall = position.copy(), np.zeros(keep.shape, dtype=position.dtype)
    total = np.zeros((len(keep), 1), dtype=position.dtype)
    for row, there in enumerate(visual):
        (columns,) = there.nonzero()
        for run in np.split(columns, (np.diff(columns) != 1).nonzero()[0] + 1) if len(columns) else []:
            before, stays = position[:, row, run], keep[row, run]
            after = np.stack([_without_gaps(axis, stays) for axis in before])
            closed[:, row, run] = after
            end = after[-2:, stays].max() if stays.any() else before[-2:].min() - 1
            lost = before[-2:].max() - end
            fall[row, run[-1] + 1 :] += lost
            total[row] += lost
    return closed - fall, total


def _without_gaps(x: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """Renumber coordinates x (n,), so that those of which no token `stays` (n,) leave no gap."""
    values, which = np.unique(x, return_inverse=True)
    gaps = np.diff(values, append=values[-1:] + 1) * ~np.isin(values, x[stays])
    return x - (gaps.cumsum() - gaps)[which]


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
