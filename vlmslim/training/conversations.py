r"""Training data of `finetune.py`: LLaVA's conversation JSON or the bundled scenes, and the collator for both.

An item is one picture (or none) with one or more conversations about it, each a list of turns as LLaVA writes them:
`{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import ProcessorMixin

PLACEHOLDER, ROLES = "<image>", {"human": "user", "gpt": "assistant"}
IGNORED = -100


class RecordError(ValueError):
    """A record that cannot be trained on; the message names it."""


@dataclass
class Item:
    """One picture, or none, with the conversations about it; `skipped` records were left out for it."""

    where: str
    picture: Image.Image | None
    rows: tuple[list[dict], ...]
    skipped: int = 0


class Conversations(Dataset):
    """LLaVA's format (the 665k instruction-tuning mix): a JSON list or JSON lines of `id`, `image`, `conversations`.

    Records are checked when the file is read, pictures are opened when their turn comes.

    Args:
        file: `.json` (one list) or `.jsonl` (one record a line).
        images: the folder that `image` is relative to.
        on_error: "raise" stops at the first bad record; "skip" leaves bad records out and counts them. In the place of
            a picture that turns out to be unreadable comes the next record.

    Attributes:
        skipped: (record, reason) of what was left out while reading.

    Raises:
        RecordError: a broken line, a missing picture, turns that do not alternate, or `<image>` in a number that is
            not that of the pictures; names the record.
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
        """(where, record, problem) of each record; the problem is why it cannot be parsed, if so."""
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

    def _where(self, index: int, record, place: str = "") -> str:
        name = f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else ""
        return f"{self.file.name}, {place or f'record {index}'}{name}"

    def _problem(self, record) -> str:
        """What is wrong with a record; nothing if it is fine."""
        turns = record.get("conversations") if isinstance(record, dict) else None
        whole = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
        if not whole or not all(isinstance(turn.get(key), str) for turn in turns for key in ("from", "value")):
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
        try:
            with Image.open(self.images / record["image"]) as picture:
                return Item(where, picture.convert("RGB"), (record["conversations"],))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as PIL's formats have it
            path = self.images / record["image"]
            raise RecordError(f"{where}: the picture {path} cannot be read: {error}") from error


class Scenes(Dataset):
    """The bundled generator's scenes, made as they are read: picture `i` is scene `first + i`.

    Args:
        count: pictures.
        questions: about each picture, each a conversation of its own.
        first: number of the first scene; those from 1,000,000 on trained the bundled tiny LLaVA itself.
        mixture: how often each task is asked, by name.
        split: "train", or "test" for the pictures, styles and codes that are held out.
    """

    MIXTURE = {"presence": 2, "colour": 2, "count": 2, "spatial": 2, "detail": 3, "text": 2, "choice": 2}

    def __init__(
        self,
        count: int,
        questions: int = 8,
        first: int = 5_000_000,
        mixture: dict | None = None,
        split: str = "train",
    ):
        self.count, self.questions, self.first, self.split = count, questions, first, split
        self.mixture = mixture or self.MIXTURE

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        from scenes import ask, make_scene

        number = self.first + index
        scene, rng = make_scene(number, self.split), np.random.default_rng([number, 3])
        weights = np.array(list(self.mixture.values()), float)
        asked = {}
        for attempt, task in enumerate(rng.choice(list(self.mixture), 20 * self.questions, p=weights / weights.sum())):
            question = ask(scene, str(task), rng)
            if question:  # late on, a scene about which there is little to ask may be asked the same again
                asked[question.text if attempt < 10 * self.questions else attempt] = question
            if len(asked) == self.questions:
                break
        rows = tuple(
            [{"from": "human", "value": f"{PLACEHOLDER}\n{q.text}"}, {"from": "gpt", "value": q.answer}]
            for q in asked.values()
        )
        return Item(f"scene {number}", scene.image, rows)


class Collator:
    """Items to one batch, with the checkpoint's own processor and chat template; labels on the answers only.

    The batch holds what the model's forward takes, and
        labels  : (B, L)  the answers' tokens, their end-of-sequence token included; -100 elsewhere
        copies  : int     rows that share a picture, in turn
        where   : list    the record of each row
        skipped : int     records left out because of their picture
    Rows are padded on the right.

    Raises:
        RecordError: the template does not write a record's turns, or `<image>` into the text, in their places.
    """

    def __init__(self, processor: ProcessorMixin):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image = processor.image_token
        self.image_id = self.tokenizer.convert_tokens_to_ids(self.image)
        if not self.tokenizer.is_fast:
            raise ValueError("labels need the places of tokens in the text: load the fast version of this tokenizer")

    def __call__(self, items: list[Item]) -> dict:
        """One batch."""
        copies = {len(item.rows) for item in items}
        if len(copies) > 1:
            raise ValueError("all pictures of a batch need equally many conversations")
        batch = {"skipped": sum(item.skipped for item in items), "copies": copies.pop()}
        batch["where"] = [item.where for item in items for _ in item.rows]
        pictures = [self._picture(item.picture) for item in items if item.picture is not None]
        sizes = iter([size for size, _ in pictures])
        ids, labels = [], []
        for item in items:
            size = next(sizes) if item.picture is not None else 0
            for row in item.rows:
                tokens, targets = self._row(row, size, item.where)
                ids.append(tokens)
                labels.append(targets)
        pad = self.tokenizer.pad_token_id
        batch["input_ids"] = pad_sequence(ids, True, self.tokenizer.eos_token_id if pad is None else pad)
        batch["labels"] = pad_sequence(labels, True, IGNORED)
        batch["attention_mask"] = pad_sequence([torch.ones_like(x) for x in ids], True, 0)
        if pictures:
            crops = max(p["pixel_values"].shape[1] if p["pixel_values"].ndim == 5 else 1 for _, p in pictures)
            batch["pixel_values"] = torch.cat([_padded(p["pixel_values"], crops) for _, p in pictures])
            if "image_sizes" in pictures[0][1]:
                batch["image_sizes"] = torch.cat([p["image_sizes"] for _, p in pictures])
        return batch

    def _picture(self, picture: Image.Image) -> tuple[int, dict]:
        """How many visual tokens the processor gives a picture, and what it makes of it."""
        made = dict(self.processor(images=picture, text=self.image, return_tensors="pt"))
        return int((made.pop("input_ids") == self.image_id).sum()), made

    def _row(self, turns: list[dict], visual: int, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels (L,) each of one conversation, with `visual` tokens in the place of the picture."""
        text, answers = self._text(turns, where)
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids, labels = [], []
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            many = visual if token == self.image_id else 1
            answer = token != self.image_id and start < end and any(a <= start and end <= b for a, b in answers)
            ids += [token] * many
            labels += [token if answer else IGNORED] * many
        found = encoded["input_ids"].count(self.image_id)
        if found != int(visual > 0):
            raise RecordError(f"{where}: {found} {self.image} in the prompt, but {int(visual > 0)} picture")
        return torch.tensor(ids), torch.tensor(labels)

    def _text(self, turns: list[dict], where: str) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as the chat template writes it, and where its answers begin and end."""
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
            if not end:  # LLaVA-1.5's template leaves it out, but its authors trained with it
                answer, end = answer.rstrip(), self.tokenizer.eos_token
            answers.append((len(text), len(text) + len(answer + end)))
            text += answer + end + rest
            done = whole
        return text, answers


def _padded(pixels: torch.Tensor, crops: int) -> torch.Tensor:
    """Pixels with as many crops as the others of the batch; those without crops as they are."""
    if pixels.ndim == 5 and pixels.shape[1] < crops:
        fill = pixels.new_zeros(len(pixels), crops - pixels.shape[1], *pixels.shape[2:])
        return torch.cat([pixels, fill], 1)
    return pixels
