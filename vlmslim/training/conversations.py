r"""Conversations about pictures as training data: LLaVA's JSON format, and the collator that makes batches of them.

An item is one picture (or none) with one or more conversations about it. A conversation is a list of turns as LLaVA
writes them: `{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

PLACEHOLDER, ROLES = "<image>", {"human": "user", "gpt": "assistant"}
IGNORED = -100  # the label of a token that is not supervised


class RecordError(ValueError):
    """A record that cannot be trained on; the message names the record."""


@dataclass
class Item:
    """One picture, or none, with the conversations about it.

    where   : the name of the record, for error messages
    picture : the picture; None in a record of text alone
    rows    : the conversations; each becomes one row of the batch
    skipped : records before this one that were left out because their pictures cannot be read
    """

    where: str
    picture: Image.Image | None
    rows: tuple[list[dict], ...]
    skipped: int = 0


class Items(Dataset[Item]):
    """A training set of known length: `finetune` takes any data set of `Item`s."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Item:
        raise NotImplementedError


class Conversations(Items):
    """LLaVA's format (the 665k instruction-tuning mix): a JSON list or JSON lines of `id`, `image`, `conversations`.

    The records are checked when the file is read. A picture is opened when its record is used.

    Args:
        file: `.json` (one list) or `.jsonl` (one record a line).
        images: the folder that `image` is relative to.
        on_error: "raise" stops at the first bad record. "skip" leaves bad records out and counts them; the next record
            takes the place of one whose picture cannot be read.

    Attributes:
        skipped: (record, reason) for each record that was left out while the file was read.

    Raises:
        RecordError: a broken line, a missing picture, turns that do not alternate, or another number of `<image>` than
            of pictures; the message names the record.
    """

    def __init__(self, file: str | Path, images: str | Path = ".", on_error: str = "raise"):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r}: use 'raise' or 'skip'")
        self.file, self.images, self.on_error = Path(file), Path(images), on_error
        self.records: list[dict] = []
        self.skipped: list[tuple[str, str]] = []
        for where, record, problem in self._read():
            problem = problem or self._problem(record)
            if not problem:
                self.records.append(record)
            elif on_error == "raise":
                raise RecordError(f"{where}: {problem}")
            else:
                self.skipped.append((where, problem))
        if not self.records:
            raise RecordError(f"{self.file}: none of its {len(self.skipped)} records can be trained on")

    def _read(self) -> Iterator[tuple[str, Any, str]]:
        """Yield (where, record, problem) for each record; the problem is empty if the record can be parsed."""
        text = self.file.read_text(encoding="utf-8")
        if self.file.suffix != ".jsonl":
            try:
                records = json.loads(text)
            except json.JSONDecodeError as error:
                raise RecordError(f"{self.file}: not readable as JSON: {error}") from error
            if not isinstance(records, list):
                raise RecordError(f"{self.file}: a list of records was expected; one record a line is called .jsonl")
            yield from ((self._where(i, record), record, "") for i, record in enumerate(records))
            return
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                record, problem = None, ""
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    problem = f"not readable as JSON: {error}"
                yield self._where(number - 1, record, f"line {number}"), record, problem

    def _where(self, index: int, record: Any, place: str = "") -> str:
        name = f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else ""
        return f"{self.file.name}, {place or f'record {index}'}{name}"

    def _problem(self, record: Any) -> str:
        """Say what is wrong with a record; return an empty text if nothing is."""
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("from", "value"))
            for turn in turns
        ):
            return "'conversations' is not a list of turns with 'from' and 'value', both text"
        if len(turns) < 2 or [t["from"] for t in turns] != ["human", "gpt"] * (len(turns) // 2):
            return "turns must alternate, 'human' first and 'gpt' last"
        picture = record.get("image")
        if picture is not None and not isinstance(picture, str):
            return f"'image' is {picture!r}: one path was expected"
        found, expected = sum(t["value"].count(PLACEHOLDER) for t in turns), int(picture is not None)
        if found != expected:
            return f"{found} {PLACEHOLDER} in the conversation, but {expected} picture"
        if picture is not None and not (self.images / picture).is_file():
            return f"no picture {self.images / picture}"
        return ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Item:
        for skipped in range(len(self)):
            try:
                return replace(self._item((index + skipped) % len(self)), skipped=skipped)
            except RecordError:
                if self.on_error == "raise":
                    raise
        raise RecordError(f"{self.file}: none of the pictures in {self.images} can be read")

    def _item(self, index: int) -> Item:
        record = self.records[index]
        where = f"{self.file.name} (id {record.get('id', index)!r})"
        if record.get("image") is None:
            return Item(where, None, (record["conversations"],))
        path = self.images / record["image"]
        try:
            with Image.open(path) as picture:
                return Item(where, picture.convert("RGB"), (record["conversations"],))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow raises
            raise RecordError(f"{where}: the picture {path} cannot be read: {error}") from error


class Collator:
    """Makes one batch of items, with the checkpoint's own processor and chat template. Labels are on the answers only.

    The batch holds the inputs of the model's forward, with rows padded on the right, and
        labels  : (B, L)  the tokens of the answers and of their ends of sequence; -100 elsewhere
        copies  : int     rows that share a picture; these rows follow each other
        where   : list    the record of each row
        skipped : int     records that were left out because their pictures cannot be read

    Raises:
        ValueError: the tokenizer is not a fast one, or the items have different numbers of conversations.
        RecordError: the chat template changes earlier turns of a conversation, or does not keep its `<image>`.
    """

    def __init__(self, processor: Any):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image = processor.image_token
        self.image_id = self.tokenizer.convert_tokens_to_ids(self.image)
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not say where in the text a token stands, which labels need: "
                "load the fast version of this tokenizer"
            )

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        """Make one batch."""
        copies = {len(item.rows) for item in items}
        if len(copies) > 1:
            raise ValueError(
                f"the pictures of a batch have {sorted(copies)} conversations; give all pictures the same number"
            )
        batch: dict[str, Any] = {"skipped": sum(item.skipped for item in items), "copies": copies.pop()}
        batch["where"] = [item.where for item in items for _ in item.rows]
        pictures, ids, labels = [], [], []
        for item in items:
            visual_tokens = 0
            if item.picture is not None:
                visual_tokens, inputs = self._picture(item.picture)
                pictures.append(inputs)
            for row in item.rows:
                tokens, targets = self._row(row, visual_tokens, item.where)
                ids.append(tokens)
                labels.append(targets)
        pad = self.tokenizer.pad_token_id
        batch["input_ids"] = pad_sequence(ids, True, self.tokenizer.eos_token_id if pad is None else pad)
        batch["labels"] = pad_sequence(labels, True, IGNORED)
        batch["attention_mask"] = pad_sequence([torch.ones_like(x) for x in ids], True, 0)
        if pictures:
            crops = max(p["pixel_values"].shape[1] if p["pixel_values"].ndim == 5 else 1 for p in pictures)
            batch["pixel_values"] = torch.cat([_padded(p["pixel_values"], crops) for p in pictures])
            if "image_sizes" in pictures[0]:
                batch["image_sizes"] = torch.cat([p["image_sizes"] for p in pictures])
        return batch

    def _picture(self, picture: Image.Image) -> tuple[int, dict[str, Tensor]]:
        """Process one picture: its number of visual tokens, and the model's inputs."""
        inputs = dict(self.processor(images=picture, text=self.image, return_tensors="pt"))
        return int((inputs.pop("input_ids") == self.image_id).sum()), inputs

    def _row(self, turns: list[dict], visual_tokens: int, where: str) -> tuple[Tensor, Tensor]:
        """Token ids (L,) and labels (L,) of one conversation, with a placeholder for each visual token."""
        text, answers = self._text(turns, where)
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids: list[int] = []
        labels: list[int] = []
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            copies = visual_tokens if token == self.image_id else 1
            answer = token != self.image_id and start < end and any(a <= start and end <= b for a, b in answers)
            ids += [token] * copies
            labels += [token if answer else IGNORED] * copies
        found = encoded["input_ids"].count(self.image_id)
        if found != int(visual_tokens > 0):
            raise RecordError(f"{where}: {found} {self.image} in the prompt, but {int(visual_tokens > 0)} picture")
        return torch.tensor(ids), torch.tensor(labels)

    def _text(self, turns: list[dict], where: str) -> tuple[str, list[tuple[int, int]]]:
        """Write a conversation with the chat template: the text, and (start, end) of each answer in it."""
        messages, text, done, answers = [], "", "", []
        for turn in turns:
            words = turn["value"].replace(PLACEHOLDER, "").strip()
            content = [{"type": "image"}] if PLACEHOLDER in turn["value"] else []  # in front, as LLaVA does
            messages.append({"role": ROLES[turn["from"]], "content": [*content, {"type": "text", "text": words}]})
            if turn["from"] == "human":
                continue
            asked = self.processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
            whole = self.processor.apply_chat_template(messages)
            if not (whole.startswith(asked) and asked.startswith(done)):
                raise RecordError(f"{where}: the chat template rewrites earlier turns when a conversation goes on")
            text += asked[len(done) :]
            answer, end, rest = whole[len(asked) :].partition(self.tokenizer.eos_token)
            if not end:  # LLaVA-1.5's template has no end of sequence, but its authors trained with one
                answer, end = answer.rstrip(), self.tokenizer.eos_token
            answers.append((len(text), len(text) + len(answer + end)))
            text += answer + end + rest
            done = whole
        return text, answers


def _padded(pixels: Tensor, crops: int) -> Tensor:
    """Pad pixels (1, c, 3, h, w) with empty crops to `crops`; leave pixels without a dimension of crops as they are."""
    if pixels.ndim == 5 and pixels.shape[1] < crops:
        fill = pixels.new_zeros(len(pixels), crops - pixels.shape[1], *pixels.shape[2:])
        return torch.cat([pixels, fill], 1)
    return pixels
