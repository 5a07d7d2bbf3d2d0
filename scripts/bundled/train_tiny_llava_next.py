"""Train the bundled tiny LLaVA-NeXT to read rendered pages, and export it in Hugging Face format.

Training starts from the tiny LLaVA and includes the tower, as in LLaVA-NeXT: first the tower and the projector learn
the characters that patches show, then the whole model learns answers. The generator knows three things that help: the
character at each patch of the mosaic (alignment loss), whose value it belongs to (tracing loss, read from one middle
layer), and where each answer token is read (that layer's attention). The same command resumes an interrupted run.

    python scripts/bundled/train_tiny_llava_next.py --out runs/tiny-llava-next [KEY=VALUE ...]
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pages import CROP, LABELS, LETTERS, PATCH, PINPOINTS, SIDE, SMALL_PRINT, TASKS, Page, ask, labels, make_page
from scenes import CHARACTERS, Question
from tiny_llava import CHAT_TEMPLATE, IMAGE, load_weights
from train_common import (
    MEAN,
    STD,
    Optimizers,
    Run,
    export,
    loader,
    standardise_inputs,
    start,
)
from train_tiny_llava import pack, pad_packed, whole_answers
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from vlmslim.training.config import command_line, read_config

ROOT = Path(__file__).resolve().parents[2]
TRACED = ("owner", "place", "column")


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaNextProcessor:
    """Build the processor: a thumbnail and up to four tiles of 144 px, 81 image tokens each, one more for each line."""
    image = LlavaNextImageProcessor(
        size={"shortest_edge": CROP}, crop_size={"height": CROP, "width": CROP}, image_grid_pinpoints=PINPOINTS,
        image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    return LlavaNextProcessor(
        image, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
        image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip


class Student(torch.nn.Module):
    """The model and the linear heads of the tracing loss, which are thrown away after training."""

    def __init__(self, llava: LlavaForConditionalGeneration):
        """`llava`: the trained tiny LLaVA, whose weights are taken."""
        super().__init__()
        config = llava.config
        vision = config.vision_config.to_dict() | {"image_size": CROP}
        self.next = LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                vision_config=vision, text_config=config.text_config, image_token_index=config.image_token_id,
                image_grid_pinpoints=PINPOINTS, vision_feature_layer=-2, vision_feature_select_strategy="default",
                image_seq_length=SIDE**2, tie_word_embeddings=True, dtype="float32", bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
            )
        )  # fmt: skip
        state = llava.state_dict()
        name = next(k for k in state if k.endswith("position_embedding.weight"))
        state[name] = crop_positions(state[name])
        missing, unexpected = self.next.load_state_dict(state, strict=False)
        if missing != ["model.image_newline"] or unexpected:
            raise ValueError(f"not the weights of a tiny LLaVA: missing {missing}, unexpected {unexpected}")
        self.next.generation_config = llava.generation_config
        self.next.set_attn_implementation("eager")  # short sequences on a CPU: faster than sdpa, backward above all
        self.next.model.vision_tower.encoder.layers[-1].requires_grad_(False)  # never read: features are layer -2's
        self.next.model.vision_tower.post_layernorm.requires_grad_(False)
        self.middle = config.text_config.num_hidden_layers // 2
        self.heads = torch.nn.Linear(config.text_config.hidden_size, sum(LABELS[name] for name in TRACED))

    def features(self, batch: dict) -> torch.Tensor:
        """Visual tokens of all pages in a row (sum of lengths, hidden)."""
        pages = self.next.model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output
        return torch.cat(list(pages))

    def forward(self, batch: dict) -> tuple[torch.Tensor, ...]:
        """Logits and targets of the answer tokens, visual tokens, the middle layer's input there and its attention."""
        tokens = self.features(batch)
        embedded = self.next.get_input_embeddings()(batch["ids"])
        visual = batch["ids"] == self.next.config.image_token_id
        embedded = embedded.masked_scatter(visual[..., None], tokens.to(embedded.dtype))
        out = self.next.model.language_model(
            inputs_embeds=embedded, attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False,
            output_attentions=True, output_hidden_states=True,
        )  # fmt: skip
        asked = batch["labels"][:, 1:] != -100
        logits = self.next.lm_head(out.last_hidden_state[:, :-1][asked])
        read = out.hidden_states[self.middle][visual]
        return logits, batch["labels"][:, 1:][asked], tokens, read, out.attentions[self.middle]


def crop_positions(weight: torch.Tensor) -> torch.Tensor:
    """Cut the middle out of a square grid of position embeddings (1 + n * n, width), with the class token's.

    Not interpolated: a patch covers as many pixels as before, so neighbours stay one step apart.
    """
    n = int((len(weight) - 1) ** 0.5)
    first = (n - SIDE) // 2
    grid = weight[1:].view(n, n, -1)[first : first + SIDE, first : first + SIDE]
    return torch.cat([weight[:1], grid.flatten(0, 1)])


@torch.no_grad()
def prepare_projector(model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, pages: int = 16) -> None:
    """Standardise the projector's inputs by what the tower gives for a few pages."""
    crops = [processor.image_processor(make_page(i, "train").image, return_tensors="pt") for i in range(pages)]
    crops = torch.cat([c["pixel_values"][0] for c in crops])
    features = model.model.vision_tower(crops, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
    standardise_inputs(model.model.multi_modal_projector, features, fresh=False)


def visual_labels(page: Page) -> np.ndarray:
    """`pages.labels` for every visual token (N, len(LABELS)) int64: -1 for thumbnail and newlines, which have none."""
    grid = labels(page).astype(np.int64)
    lines = np.pad(grid, ((0, 0), (0, 1), (0, 0)), constant_values=-1)
    return np.concatenate([np.full((SIDE**2, len(LABELS)), -1), lines.reshape(-1, len(LABELS))])


def token_words(known: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Token ids (N, 2) of the characters that a visual token shows, a blank where it shows none; -100 = no label."""
    ids = [tokenizer.encode(c, add_special_tokens=False)[-1] for c in (" ", *CHARACTERS)]
    words = torch.tensor(ids)[torch.from_numpy(known[:, :2]).clamp(min=0)]
    words[torch.from_numpy(known[:, 0]) < 0] = -100
    words[:, 1][torch.from_numpy(known[:, 1]) <= 0] = -100
    return words


def traced(known: np.ndarray) -> torch.Tensor:
    """Targets (N, 3) of the tracing loss: owner and column of values, place of any character; -100 elsewhere."""
    first, owner, place, column = (known[:, list(LABELS).index(name)] for name in ("first", *TRACED))
    keep = (place > 0, first > 0, (place > 0) & (column > 0))
    values = zip(keep, (owner, place, column), strict=True)
    return torch.from_numpy(np.stack([np.where(k, v, -100) for k, v in values], -1))


def evidence(known: np.ndarray, question: Question, answer_tokens: int) -> torch.Tensor:
    """Visual tokens (answer_tokens, N) that each answer token is read from; none for the end token."""
    owner, place, column = (known[:, list(LABELS).index(name)] for name in TRACED)
    seen = np.zeros((answer_tokens, len(known)), bool)
    if question.about:
        name, where = question.about
        own = owner == (SMALL_PRINT if name == "small" else 1 + LETTERS.index(name))
        if where == "key":
            seen[:-1] = own & (place == 0)
        else:
            own &= (place > 0) & (column == int(where))
            seen[0] = own
            for i in range(1, answer_tokens - 1):
                seen[i] = own & (place == i)
    return torch.from_numpy(seen)


def sample(seed: int, processor: LlavaNextProcessor, config: dict, split: str = "train") -> dict:
    """Make a page and one packed sequence of questions about it."""
    page, rng, tokenizer = make_page(seed, split), np.random.default_rng([seed, 3]), processor.tokenizer
    weights = np.array([config["mixture"][t] for t in TASKS], float)
    questions: dict[str, Question] = {}
    for task in rng.choice(TASKS, 4 * config["turns"], p=weights / weights.sum()):
        question = ask(page, str(task), rng)
        if question and len(questions) < config["turns"]:
            questions.setdefault(question.text, question)
    asked = list(questions.values())
    known = visual_labels(page)
    lengths = [len(tokenizer.encode(f" {q.answer}", add_special_tokens=False)) + 1 for q in asked]
    crops = processor.image_processor(page.image, return_tensors="pt")
    return {
        "pixel_values": crops["pixel_values"][0],
        "image_sizes": crops["image_sizes"][0],
        "tasks": torch.tensor([TASKS.index(q.task) for q in asked]),
        "words": token_words(known, tokenizer),
        "small": torch.from_numpy(known[:, list(LABELS).index("owner")] == SMALL_PRINT),
        "traced": traced(known),
        "evidence": [evidence(known, q, n) for q, n in zip(asked, lengths, strict=True)],
        **pack(tokenizer, asked, split == "train" and rng.random() < config["chat"], len(known)),
    }


def collate(samples: list[dict], pad: int) -> dict:
    """Collate pages padded to four crops, labels of visual tokens in a row, evidence (answer tokens, longest page)."""
    batch = pad_packed(samples, pad)
    most = max(len(s["pixel_values"]) for s in samples)
    fill = [F.pad(s["pixel_values"], (0, 0, 0, 0, 0, 0, 0, most - len(s["pixel_values"]))) for s in samples]
    batch["pixel_values"] = torch.stack(fill)
    batch["image_sizes"] = torch.stack([s["image_sizes"] for s in samples])
    for name in ("words", "small", "traced"):
        batch[name] = torch.cat([s[name] for s in samples])
    longest = max(len(s["words"]) for s in samples)
    seen = [F.pad(e, (0, longest - e.shape[1])) for s in samples for e in s["evidence"]]
    batch["evidence"] = torch.cat(seen)
    batch["tasks"] = torch.cat([s["tasks"] for s in samples])
    return batch


def alignment_loss(
    model: LlavaNextForConditionalGeneration, tokens: torch.Tensor, batch: dict, small: float
) -> torch.Tensor:
    """Cross-entropy of the character at each patch, its visual token read as if it were the decoder's output.

    Patches with a character weigh as much together as those without, times three; in small print `small` times more.
    """
    words, blank = batch["words"], batch["blank"]
    scores = model.lm_head(F.rms_norm(tokens, tokens.shape[-1:])).float().log_softmax(-1)
    loss = -scores.gather(-1, words.clamp(min=0))
    shown = ((words != -100) & (words != blank)) * (1 + (small - 1) * batch["small"].float()[:, None])
    return (loss * shown).sum() / shown.sum() + loss[words == blank].mean() / 3


def tracing_loss(heads: torch.nn.Linear, read: torch.Tensor, batch: dict) -> torch.Tensor:
    """Cross-entropy of owner, place and column, read from the middle layer's input at visual tokens (N, hidden)."""
    logits = heads(F.rms_norm(read, read.shape[-1:])).float().split([LABELS[name] for name in TRACED], -1)
    targets = batch["traced"].unbind(-1)
    return sum(F.cross_entropy(x, y) for x, y in zip(logits, targets, strict=True) if (y != -100).any())


def pointing_loss(attention: torch.Tensor, batch: dict, image_token: int) -> torch.Tensor:
    """Negative log of the share of attention (B, heads, L, L) on the evidence, averaged over half of the heads."""
    asking = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    first = int((batch["ids"][0] == image_token).nonzero()[0])
    seen = batch["evidence"]
    rows = attention.transpose(1, 2)[asking][..., first : first + seen.shape[1]].float()  # (answer tokens, heads, N)
    share = (rows[:, : rows.shape[1] // 2].mean(1) * seen).sum(-1)
    return -share[seen.any(-1)].clamp(min=1e-4).log().mean()


@torch.no_grad()
def character_accuracy(model: LlavaNextForConditionalGeneration, tokens: torch.Tensor, batch: dict) -> float:
    """Share of patches with one character whose visual token is nearest to that character's embedding."""
    words = batch["words"]
    lone = (words[:, 0] != -100) & (words[:, 0] != batch["blank"]) & (words[:, 1] == -100)
    got = model.lm_head(F.rms_norm(tokens[lone], tokens.shape[-1:])).argmax(-1)
    return float((got == words[lone, 0]).float().mean())


@torch.no_grad()
def evaluate(student: Student, batches: list[dict], accelerator, reading: bool) -> dict[str, float]:
    """Share of held-out characters read, and of questions whose whole answer is the greedy one, by task."""
    right: dict[str, list[float]] = {"characters": [], **{task: [] for task in TASKS}}
    student.eval()
    for batch in batches:
        moved = {k: v.to(accelerator.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        with accelerator.autocast():
            if reading:
                right["characters"].append(character_accuracy(student.next, student.features(moved), moved))
                continue
            logits, target, tokens, _, _ = student(moved)
            right["characters"].append(character_accuracy(student.next, tokens, moved))
        answers = whole_answers(logits, target, student.next.config.text_config.eos_token_id)
        for task, correct in zip(batch["tasks"].tolist(), answers, strict=True):
            right[TASKS[task]].append(float(correct))
    student.train()
    return {task: float(np.mean(values)) for task, values in right.items() if values}


@torch.no_grad()
def freeze_tower(model: LlavaNextForConditionalGeneration) -> None:
    """Round the tower to what the export stores, and train it no more."""
    for parameter in model.model.vision_tower.parameters():
        parameter.copy_(parameter.half())
        parameter.grad = None
        parameter.requires_grad_(False)


def main() -> None:
    """Train, evaluate, export."""
    parser = command_line(
        __doc__, Path(__file__).with_name("tiny_llava_next.yaml"), "the export is OUT/tiny-llava-next"
    )
    parser.add_argument("--start", type=Path, help="start from this run's weights, with a new schedule")
    args = parser.parse_intermixed_args()
    config = read_config(args.config, args.overrides)
    accelerator = start(config)
    llava = ROOT / config["start"]
    processor = make_processor(AutoProcessor.from_pretrained(llava).tokenizer)
    student = Student(LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32))
    model = student.next
    prepare_projector(model, processor)
    if args.start:
        load_weights(student, args.start, adapter=False)
    student.to(accelerator.device)
    skip_muon = ("embed_tokens", "lm_head", "position_embedding", "heads")
    optimizers = Optimizers(dict(student.named_parameters()), config, skip_muon)
    run = Run(args.out, config, student, optimizers)
    step = run.resume()
    make = partial(sample, processor=processor, config=config)
    blank = processor.tokenizer.encode(" ", add_special_tokens=False)[-1]
    join = partial(collate, pad=processor.tokenizer.pad_token_id)
    held_out = [make(10**7 + i, split="test") for i in range(config["eval_pages"])]
    held_out = [join(held_out[i : i + 16]) | {"blank": blank} for i in range(0, len(held_out), 16)]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {step}", flush=True)
    stop = min(args.stop or config["steps"], config["steps"])
    if step >= config["tower_steps"]:
        freeze_tower(model)
    write = partial(export, model, processor, args.out / "tiny-llava-next")
    for batch in loader(make, config, step, stop, join):
        batch = {k: v.to(accelerator.device) for k, v in batch.items()} | {"blank": blank}
        reading = step < config["reading"]
        with accelerator.autocast():
            if reading:
                parts = {"align": alignment_loss(model, student.features(batch), batch, config["small"])}
            else:
                logits, target, tokens, read, attention = student(batch)
                parts = {
                    "answer": F.cross_entropy(logits.float(), target),
                    "align": alignment_loss(model, tokens, batch, config["small"]),
                    "trace": tracing_loss(student.heads, read, batch),
                    "point": pointing_loss(attention, batch, model.config.image_token_id),
                }
        weights = {"answer": 1, "align": 1} if reading else {"answer": 1, **config}
        loss = sum(weights[name] * part for name, part in parts.items())
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizers.step(step)
        step += 1
        if step == config["tower_steps"]:
            freeze_tower(model)
        test = partial(evaluate, student, held_out, accelerator, reading)
        run.report(step, stop, {"loss": loss, **parts}, test, write)
    write()


if __name__ == "__main__":
    main()
