"""The entrance of the language model: compress the images of the prompts, and close the gaps."""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmslim.compressor import Compressed, Compressor, ImageTokens
from vlmslim.engine.answers import NAN_SCORES, NO_SIZES, NOT_FINITE, check_compressed, check_indices, check_values
from vlmslim.engine.families import FAMILIES
from vlmslim.engine.forward import Call, Visit
from vlmslim.engine.later import Later
from vlmslim.engine.layout import Layout, Segment, to_device
from vlmslim.engine.locate import Placed, locate
from vlmslim.engine.stages import Stage
from vlmslim.ops.attention import gather_rows
from vlmslim.receipt import Image


class Entrance:
    """Takes the images of a forward from the encoder to the first decoder layer.

    Args:
        core: the model without its head.
        stages: of the patch.
        later: runs the checks of values.
    """

    def __init__(self, core: Any, stages: tuple[Stage, ...], later: Later):
        self.later = later
        self.family = FAMILIES[core.config.model_type]
        self.stage = next((stage for stage in stages if stage.acts_before_llm), None)
        self.asked = self.stage or stages[-1]  # the stage whose budget the receipt shows for each image
        self.encodes = self.stage.method if self.stage is not None and self.stage.method.encodes else None
        self.any_acts = any(stage.acts_before_llm or stage.layers for stage in stages)

    def compress(self, call: Call, embeds: Tensor) -> Tensor:
        """Compress every image and close the gaps: (B, L, d) -> (B, S, d)."""
        tokens = call.runs[0].tokens
        mask, ids = call.mask_on_host(), call.read.get("input_ids")
        placed, is_text = locate(call, mask, ids, self.family)
        call.text = is_text.sum(1).tolist()
        call.tail = embeds.shape[1] - 1 - max((int(image.columns[-1]) for image in placed), default=-1)
        end = embeds.shape[1] - call.guess
        if any(image.columns[-1] >= end for image in placed):
            call.guess, end = 0, embeds.shape[1]
        if placed and self.any_acts:
            self._check_finite([image.tokens for image in placed])
            for image in placed:
                words = None if ids is None else ids[image.row, :end][is_text[image.row, :end]]
                image.tokens.prompt = None if words is None else torch.from_numpy(np.append(call.before, words))
        results = None
        if placed and self.stage is not None:
            results = self._ask(self.stage, call, [image.tokens for image in placed])
        call.text_after = [[] for _ in call.text]
        for image in placed:
            call.text_after[image.row].append(int(is_text[image.row, image.columns[-1] + 1 : end].sum()))
        tokens.layout = self._laid_out(call, tokens, mask, placed, results)
        return embeds if results is None else self._close_gaps(call, tokens.layout, embeds, placed, is_text, results)

    def _check_finite(self, images: list[ImageTokens]) -> None:
        """Refuse images of which nothing sensible can be chosen, as soon as their values are known."""

        def refuse(sums: np.ndarray) -> None:
            for i, (image, total) in enumerate(zip(images, sums.tolist(), strict=True)):
                if not math.isfinite(total) and not image.features.isfinite().all():  # large numbers overflow a sum
                    raise ValueError(
                        f"the visual tokens of image {i} of this batch are not finite; "
                        "check the picture and the dtype of the vision tower"
                    )

        self.later.check(torch.stack([x.features.detach().sum(dtype=torch.float32) for x in images]), refuse)

    @staticmethod
    def _ask(stage: Stage, call: Call, images: list[ImageTokens]) -> list[Compressed]:
        with call.timed(images[0].features.device):
            answer = stage.method.ask(images)
        return check_compressed(stage.method, images, answer)

    def _laid_out(
        self, call: Call, tokens: Segment, mask: np.ndarray, placed: list[Placed], results: list[Compressed] | None
    ) -> Layout:
        """Lay out the prompt, and write down how many tokens of each image enter."""
        image, slot = np.zeros(mask.shape, int), np.full(mask.shape, -1)
        call.images, call.counts = [[] for _ in call.text], [[] for _ in call.text]
        if call.recorder is not None:
            call.recorder.sent = [[] for _ in call.text]
        for i, one in enumerate(placed):
            row, n, result = one.row, len(one.columns), None if results is None else results[i]
            call.images[row].append(one.tokens)
            if call.recorder is not None:
                call.recorder.sent[row].append((one.columns, result))
            call.counts[row].append(Image(n, self.asked.method.requested(n), n if result is None else len(result)))
            image[row, one.columns] = len(call.images[row])
            if result is None or result.index is not None:
                slot[row, one.columns] = np.arange(n)
        visual = [sum(counts) for counts in call.entered]
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)  # of each row
        call.image_last = [bool(image[row, at]) and visual[row] > 0 for row, at in enumerate(last)]
        for run in call.runs:
            run.visual, run.present = visual, call.entered
        if self.stage is not None:
            call.visits.append(Visit(self.stage, [sum(x.tokens for x in row) for row in call.counts], visual))
        numbers, slots = to_device(tokens.mask.device, image, slot)
        origin = torch.arange(mask.shape[1], device=numbers.device).expand(mask.shape)
        return Layout(tokens.mask, tokens.position, numbers, slots, origin, mask.sum(1).tolist())

    def _close_gaps(
        self,
        call: Call,
        layout: Layout,
        embeds: Tensor,
        placed: list[Placed],
        is_text: np.ndarray,
        results: list[Compressed],
    ) -> Tensor:
        """Move the kept tokens together, and write those that the method made into their slots."""
        assert self.stage is not None
        method, device = self.stage.method, embeds.device
        self._check_indices(method, placed, results)
        self._check_numbers(method, placed, results)
        for image, result in zip(placed, results, strict=True) if call.number is not None else ():
            if result.features is not None:
                slots = np.arange(len(result)) if result.index is None else np.sort(result.index.cpu().numpy())
                call.merge_added(image.row, image.columns, image.columns[slots], method, result)
        # of every token that a method sends: its row, and the columns of what it is and of the slot that it takes
        sizes, sent = [len(image.columns) for image in placed], [len(result) for result in results]
        starts = np.cumsum([0, *sizes[:-1]])
        keep, columns, rows, start = to_device(
            device,
            is_text,
            np.concatenate([image.columns for image in placed]),
            np.repeat([image.row for image in placed], sent),
            np.repeat(starts, sent),
        )
        picked, taken = _slots(results, sizes, device)
        content, places = columns[start + picked], columns[start + taken]
        keep = keep.index_put((rows, places), torch.ones_like(places, dtype=torch.bool))
        counts = [text + visual for text, visual in zip(call.text, map(sum, call.entered), strict=True)]
        renumber = method.positions == "renumbered"
        selection = layout.select(keep, renumber, counts)
        if selection is None:
            index, column = layout.origin, places
        else:
            index, column = selection.index, selection.target[rows, places]
            segment = Segment.of(selection.layout)
            for run in call.runs:
                run.tokens = segment.lowered(run.lower)
            if renumber:
                call.shift = selection.shift if call.shift is None else call.shift + selection.shift
        given = [result.size is not None for result in results]
        if any(given):
            (at,) = to_device(device, np.repeat(given, sent).nonzero()[0])
            counted = torch.cat([result.size.to(device).float() for result in results if result.size is not None])
            ones = torch.ones(is_text.shape, device=device)
            call.resize(ones.index_put((rows[at], places[at]), counted))
        embeds = gather_rows(embeds, index.index_put((rows, column), content))
        made = [result.features is not None for result in results]
        if any(made):
            (at,) = to_device(device, np.repeat(made, sent).nonzero()[0])
            vectors = torch.cat([result.features.to(embeds) for result in results if result.features is not None])
            embeds = embeds.index_put((rows[at], column[at]), vectors)
        return embeds

    def _check_indices(self, method: Compressor, placed: list[Placed], results: list[Compressed]) -> None:
        known = [(len(p.columns), r.index) for p, r in zip(placed, results, strict=True) if r.index is not None]
        if known:
            sizes, indices = zip(*known, strict=True)
            values = torch.cat([index.to(indices[0].device) for index in indices])
            self.later.check(values, partial(check_indices, method, list(sizes), [len(index) for index in indices]))

    def _check_numbers(self, method: Compressor, placed: list[Placed], results: list[Compressed]) -> None:
        """Refuse made tokens that are not finite, sizes that are not positive, and scores without a rank."""
        made = [(r.features.detach().isfinite().all(1) if r.features is not None else None) for r in results]
        sizes = [((r.size > 0) & r.size.isfinite() if r.size is not None else None) for r in results]
        scores = [(~p.tokens.score.isnan() if isinstance(p.tokens.score, Tensor) else None) for p in placed]
        for fine, wrong in ((made, f"tokens {NOT_FINITE}"), (sizes, NO_SIZES), (scores, NAN_SCORES)):
            lengths = [0 if part is None else len(part) for part in fine]
            if parts := [part for part in fine if part is not None]:
                values = torch.cat([part.to(parts[0].device) for part in parts])
                self.later.check(values, partial(check_values, method, "image", wrong, lengths))


def _slots(results: list[Compressed], sizes: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, for all tokens that the images send, their index in their image, and the slot that they take.

    Slots ascend, whatever the order of the tokens. A wrong index is moved into its image, because it would stop the
    device before `check_indices` says what is wrong.
    """
    first = [torch.arange(len(result), device=device) for result in results]
    picked = [
        own if result.index is None else result.index.to(device).long().clamp(0, n - 1)
        for own, result, n in zip(first, results, sizes, strict=True)
    ]
    taken = [x if r.index is None else x.sort().values for x, r in zip(picked, results, strict=True)]
    picked = [t if r.features is not None else p for t, p, r in zip(taken, picked, results, strict=True)]
    return torch.cat(picked), torch.cat(taken)
