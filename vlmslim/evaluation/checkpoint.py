"""The checkpoint of a comparison, loaded once: its model and processor, and a patch for each row."""

from functools import cached_property
from typing import Any

from transformers import BatchFeature

import vlmslim
from vlmslim.evaluation.answering import Answerer
from vlmslim.evaluation.cells import UNPATCHED
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.lmms_model import VlmSlim
from vlmslim.evaluation.progress import MakeBar
from vlmslim.evaluation.queries import Query
from vlmslim.evaluation.variants import Variant
from vlmslim.io.provenance import hardware
from vlmslim.patching import Slim


class Checkpoint:
    """A checkpoint that is loaded when it is first needed.

    Args:
        config: the comparison, which names the checkpoint.
        make_bar: makes a progress bar for the questions of a cell.

    Raises:
        OSError, TypeError, ValueError: by the first use: it cannot be loaded, or no method can be attached to it.
    """

    def __init__(self, config: RunConfig, make_bar: MakeBar | None = None):
        self._config, self._make_bar = config, make_bar
        self._patches: dict[Variant, Slim] = {}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        first = VlmSlim(**self._config.model.arguments())
        loaded = first.model, first.processor
        first.clean()
        return loaded

    @property
    def model(self) -> Any:
        """The loaded model. Between two calls no method is attached to it."""
        return self._loaded[0]

    @property
    def processor(self) -> Any:
        """The processor of the model."""
        return self._loaded[1]

    @cached_property
    def hardware(self) -> str:
        """The device that answers, in words."""
        return hardware(self._config.model.device)

    @cached_property
    def _reader(self) -> tuple[Answerer, dict]:
        lm = self.lmms_model(UNPATCHED, 1)
        lm.clean()
        return lm.answerer, lm.protocol

    @property
    def answerer(self) -> Answerer:
        """The reader of prompts, which answers with whatever patch the model has at the moment."""
        return self._reader[0]

    @property
    def protocol(self) -> dict:
        """The preparation of pictures and prompts, as `vlmslim.originals.protocol.describe` says it."""
        return self._reader[1]

    def inputs(self, query: Query) -> BatchFeature:
        """Return the inputs of `generate()` for one query."""
        return self.answerer.encode([self.answerer.render(query)])

    def lmms_model(self, variant: Variant, batch_size: int) -> VlmSlim:
        """Make the lmms-eval model of one method. lmms-eval discards it after use, but the checkpoint stays."""
        passed_on = {"max_frames_num", "system_prompt", "share_prefix"}
        options = {name: value for name, value in self._config.model.arguments().items() if name in passed_on}
        lm = VlmSlim(self.model, list(variant.stages), batch_size, processor=self.processor, **options)
        if self._make_bar is not None:
            lm.make_bar = self._make_bar
        return lm

    def patch(self, variant: Variant, record: str | None = None) -> Slim:
        """Attach the method of a row to the model; see `vlmslim.patch`."""
        return vlmslim.patch(self.model, list(variant.stages), record=record)

    def kept_patch(self, variant: Variant) -> Slim:
        """Return the patch of a row, ready to be attached. Patches are kept, because some load weights."""
        if variant not in self._patches:
            self._patches[variant] = self.patch(variant)
            self._patches[variant].remove()
        self._patches[variant].reset_receipt()
        return self._patches[variant]
