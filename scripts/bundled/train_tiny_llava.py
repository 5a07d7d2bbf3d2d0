"""Train the bundled tiny LLaVA on questions about composed scenes, and export it in Hugging Face format.

This is LLaVA's recipe in small: the frozen tower of the tiny CLIP gives the features of its penultimate layer, and a
two-layer projector and a LLaMA decoder train from scratch. One sequence packs several questions about one picture. In
most sequences each question sees only the picture and itself (an attention mask, positions restarted), so one pass over
the picture serves many single-question prompts. The losses are on the answers and, instead of LLaVA's first stage, on
three things that the generator knows: the words for what each patch shows, its place, and, in one middle layer, the
patches that an answer is read from. The same command resumes an interrupted run.

    python scripts/bundled/train_tiny_llava.py --clip runs/tiny-clip/tiny-clip --out runs/tiny-llava [KEY=VALUE ...]
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scenes import CHARACTERS, COLOURS, FAMILIES, GRID, KINDS, LABELS, THINGS, Question, ask, make_scene
from tiny_llava import IMAGE, load_weights, make_model, make_processor, make_tokenizer
from train_common import Optimizers, Run, export, loader, normalise, pixels, start
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

from vlmslim.training.config import command_line, read_config


def patch_words(labels: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return token ids (144, 4) of the words for each patch: kind, colour, character, tag's owner; -100 = none."""
    words = {"kind": [f" {k}" for k in KINDS], "colour": ["", *(f" {c}" for c in COLOURS)],
             "character": ["", *CHARACTERS], "owner": ["", *(f" {t}" for t in THINGS)]}  # fmt: skip
    columns = []
    for name, group in words.items():
        ids = [-100, *(tokenizer.encode(w, add_special_tokens=False)[-1] for w in group[1:])]
        columns.append(torch.tensor(ids)[torch.from_numpy(labels[:, list(LABELS).index(name)]).long()])
    return torch.stack(columns, -1)


def evidence(labels: np.ndarray, question: Question, answer_tokens: int) -> torch.Tensor:
    """Return the patches (answer_tokens, 2, 144) that each answer token is read from, for two kinds of head.

    Both see the same patches, except in a side question: there the first sees one item and the second the other. For
    counting they are the copies' centres; for the end token none.
    """
    column = {name: labels[:, i] for i, name in enumerate(LABELS)}
    seen = np.zeros((answer_tokens, 2, GRID * GRID), bool)
    if question.task in ("detail", "spatial"):
        seen[:-1] = column["owner"] == 1 + THINGS.index(question.about[0])
    elif question.task == "text":
        seen[0] = column["place"] > 0
        for i in range(1, answer_tokens - 1):
            seen[i] = column["place"] == i
    elif question.task == "side":
        seen[:-1, 0], seen[:-1, 1] = (column["kind"] == KINDS.index(name) for name in question.about)
    elif question.about:
        seen[:-1] = column["kind"] == KINDS.index(question.about[0])
        if question.task == "count":
            seen &= column["centre"] > 0
    return torch.from_numpy(seen)


def evidence_mass(evidence: torch.Tensor, count: bool) -> torch.Tensor:
    """Return the share of attention (answer_tokens, 2) that evidence shall get: all, or n / (n + 2) for n centres.

    An average over copies would lose their number; a share that grows with it keeps it.
    """
    n = evidence.sum(-1).float()
    return n / (n + 2) if count else (n > 0).float()


def pack(
    tokenizer: PreTrainedTokenizerFast, questions: list[Question], chat: bool, visual: int = GRID**2
) -> dict[str, torch.Tensor]:
    """Pack questions into one sequence: ids, labels (-100 where not supervised), positions, and each token's turn.

    Turn 0 is what every turn sees: "<s>USER: <image>", `visual` visual tokens. In a `chat` all turns are number 1 and
    follow on.
    """
    encode = partial(tokenizer.encode, add_special_tokens=False)
    ids = [tokenizer.bos_token_id, *encode("USER: " + IMAGE * visual + "\n")]
    labels, turns, positions = [-100] * len(ids), [0] * len(ids), list(range(len(ids)))
    shared = len(ids)
    for number, question in enumerate(questions, 1):
        user = "USER: " if chat and number > 1 else ""
        asked = encode(f"{user}{question.text} ASSISTANT:")
        answered = [*encode(f" {question.answer}"), tokenizer.eos_token_id]
        first = len(ids) if chat else shared
        ids += asked + answered
        labels += [-100] * len(asked) + answered
        turns += [1 if chat else number] * (len(asked) + len(answered))
        positions += range(first, first + len(asked) + len(answered))
    return {"ids": torch.tensor(ids), "labels": torch.tensor(labels), "turns": torch.tensor(turns),
            "positions": torch.tensor(positions)}  # fmt: skip


def sample(seed: int, tokenizer: PreTrainedTokenizerFast, config: dict, split: str = "train") -> dict:
    """Make a picture and one packed sequence of questions about it."""
    scene = make_scene(seed, split)
    rng = np.random.default_rng([seed, 3])
    weights = np.array([config["mixture"][t] for t in FAMILIES], float)
    questions: dict[str, Question] = {}
    for task in rng.choice(FAMILIES, 3 * config["turns"], p=weights / weights.sum()):
        question = ask(scene, str(task), rng)
        if question and len(questions) < config["turns"]:
            questions.setdefault(question.text, question)
    asked = list(questions.values())
    chat = split == "train" and rng.random() < config["chat"]
    tasks = torch.tensor([FAMILIES.index(q.task) for q in asked])
    words = patch_words(scene.labels, tokenizer)
    centre = torch.from_numpy(scene.labels[:, list(LABELS).index("centre")]).float()
    lengths = [len(tokenizer.encode(f" {q.answer}", add_special_tokens=False)) + 1 for q in asked]
    shown = [evidence(scene.labels, q, n) for q, n in zip(asked, lengths, strict=True)]
    mass = torch.cat([evidence_mass(e, q.task == "count") for e, q in zip(shown, asked, strict=True)])
    packed = pack(tokenizer, asked, chat)
    return {
        "image": pixels(scene.image),
        "tasks": tasks,
        "words": words,
        "centre": centre,
        "evidence": torch.cat(shown),
        "mass": mass,
        **packed,
    }


def pad_packed(samples: list[dict], pad: int) -> dict[str, torch.Tensor]:
    """Right-pad packed sequences; the mask (B, 1, L, L) lets a token see earlier ones of turn 0 and of its own turn."""
    fill = {"ids": pad, "labels": -100, "turns": -1, "positions": 0}
    batch = {k: torch.nn.utils.rnn.pad_sequence([s[k] for s in samples], True, v) for k, v in fill.items()}
    turns = batch["turns"]
    same = (turns[:, None, :] == turns[:, :, None]) | (turns[:, None, :] == 0)
    seen = (same & torch.ones_like(same).tril())[:, None]
    batch["mask"] = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    return batch


def collate(samples: list[dict], pad: int) -> dict:
    """Collate samples to a batch."""
    batch = pad_packed(samples, pad)
    batch["image"] = torch.stack([s["image"] for s in samples])
    batch["words"] = torch.stack([s["words"] for s in samples])
    batch["centre"] = torch.stack([s["centre"] for s in samples])
    batch["evidence"] = torch.cat([s["evidence"] for s in samples])
    batch["mass"] = torch.cat([s["mass"] for s in samples])
    batch["tasks"] = [s["tasks"] for s in samples]
    return batch


def answer_logits(
    model: LlavaForConditionalGeneration, batch: dict
) -> tuple[torch.Tensor, torch.Tensor, LlavaModelOutputWithPast]:
    """Return logits (N, vocabulary) and targets (N,) at the supervised positions, and the model's outputs."""
    out = model.model(
        input_ids=batch["ids"], pixel_values=normalise(batch["image"]), attention_mask=batch["mask"],
        position_ids=batch["positions"], use_cache=False, output_attentions=True,
    )  # fmt: skip
    target = batch["labels"][:, 1:]
    return model.lm_head(out.last_hidden_state[:, :-1][target != -100]), target[target != -100], out


def visual_tokens(out: LlavaModelOutputWithPast) -> torch.Tensor:
    """Return the visual tokens of a batch (B * 144, hidden); transformers 5.24 has them picture by picture."""
    tokens = out.image_hidden_states
    return tokens if isinstance(tokens, torch.Tensor) else torch.cat(list(tokens))


def pointing_loss(attention: torch.Tensor, batch: dict, image_token: int) -> torch.Tensor:
    """Compare the share of one layer's attention (B, heads, L, L) on the evidence with its target, by cross-entropy."""
    asking = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    first = int((batch["ids"][0] == image_token).nonzero()[0])
    rows = attention.transpose(1, 2)[asking][..., first : first + GRID * GRID].float()  # (N, heads, 144)
    halves = rows.unflatten(1, (2, -1)).mean(2)
    got, target = (halves * batch["evidence"]).sum(-1).clamp(1e-4, 1 - 1e-4), batch["mass"]
    loss = -(target * got.log() + (1 - target) * (1 - got).log())
    return loss[target > 0].mean()


def alignment_loss(model: LlavaForConditionalGeneration, tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of the words for each patch, its visual token read as if it were the decoder's output.

    It plays the part of LLaVA's first stage: visual tokens come to lie near the embeddings of the words for them.
    """
    scores = model.lm_head(F.rms_norm(tokens, tokens.shape[-1:])).float().log_softmax(-1)
    words = words.flatten(0, 1)
    return -scores.gather(-1, words.clamp(min=0))[words != -100].mean()


def layout_loss(tokens: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Compute the squared error of column, row and centre (B, 144), read from visual tokens (B * 144, hidden).

    They are read along three fixed directions, so that nothing has to be thrown away after training.
    """
    noise = torch.randn(tokens.shape[-1], 3, generator=torch.Generator().manual_seed(0))
    directions = torch.linalg.qr(noise).Q.to(tokens.device)
    line = torch.linspace(-1, 1, GRID, device=tokens.device)
    column, row = line.repeat(GRID).expand_as(centre), line.repeat_interleave(GRID).expand_as(centre)
    target = 2 * torch.stack([column, row, centre], -1).flatten(0, 1)
    error = (F.rms_norm(tokens.float(), tokens.shape[-1:]) @ directions - target).square()
    return (error * (1 + 4 * centre.flatten()[:, None])).mean()


def whole_answers(logits: torch.Tensor, target: torch.Tensor, eos: int) -> list[bool]:
    """Return for each answer whether it is greedy throughout; it is the target tokens (N,) up to and with an `eos`."""
    correct = (logits.argmax(-1) == target).tolist()
    ends = (target == eos).nonzero().flatten().tolist()
    return [all(correct[first : end + 1]) for first, end in zip([0, *(e + 1 for e in ends)], ends, strict=False)]


@torch.no_grad()
def evaluate(model: LlavaForConditionalGeneration, batches: list[dict], accelerator) -> dict[str, float]:
    """Return the share of held-out questions whose whole answer is the greedy one, by task."""
    right: dict[str, list[float]] = {task: [] for task in FAMILIES}
    model.eval()
    for batch in batches:
        moved = {k: v.to(accelerator.device) for k, v in batch.items() if k != "tasks"}
        with accelerator.autocast():
            logits, target, _ = answer_logits(model, moved)
        answers = whole_answers(logits, target, model.config.text_config.eos_token_id)
        for task, correct in zip(torch.cat(batch["tasks"]).tolist(), answers, strict=True):
            right[FAMILIES[task]].append(float(correct))
    model.train()
    return {task: float(np.mean(values)) if values else float("nan") for task, values in right.items()}


def main() -> None:
    """Train, evaluate, export."""
    parser = command_line(__doc__, Path(__file__).with_name("tiny_llava.yaml"), "the export is OUT/tiny-llava")
    parser.add_argument("--clip", type=Path, required=True, help="open_clip folder of the tiny CLIP")
    parser.add_argument("--start", type=Path, help="start from this run's tokenizer and weights, with a new schedule")
    parser.add_argument("--adapter", action="store_true", help="of --start take only projector and word embeddings")
    args = parser.parse_intermixed_args()
    config = read_config(args.config, args.overrides)
    accelerator = start(config)
    if args.start:
        processor = LlavaProcessor.from_pretrained(args.start / "tiny-llava")
    else:
        processor = make_processor(make_tokenizer(config["vocabulary"]))
    tokenizer = processor.tokenizer
    model = make_model(config, tokenizer, args.clip).to(accelerator.device)
    if args.start:
        load_weights(model, args.start, args.adapter)
    optimizers = Optimizers(dict(model.named_parameters()), config, ("embed_tokens", "lm_head"))
    run = Run(args.out, config, model, optimizers)
    step = run.resume()
    make = partial(sample, tokenizer=tokenizer, config=config)
    join = partial(collate, pad=tokenizer.pad_token_id)
    held_out = [make(10**7 + i, split="test") for i in range(config["eval_scenes"])]
    held_out = [join(held_out[i : i + 16]) for i in range(0, len(held_out), 16)]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {step}", flush=True)
    stop = min(args.stop or config["steps"], config["steps"])
    test = partial(evaluate, model, held_out, accelerator)
    write = partial(export, model, processor, args.out / "tiny-llava")
    for batch in loader(make, config, step, stop, join):
        batch = {k: v.to(accelerator.device) for k, v in batch.items() if k != "tasks"}
        with accelerator.autocast():
            logits, target, out = answer_logits(model, batch)
            tokens = visual_tokens(out)
            align = alignment_loss(model, tokens, batch["words"])
        parts = {
            "answer": F.cross_entropy(logits.float(), target),
            "align": align,
            "point": pointing_loss(out.attentions[len(out.attentions) // 2], batch, model.config.image_token_id),
            "layout": layout_loss(tokens, batch["centre"]),
        }
        weights = {"answer": 1, **config}
        loss = sum(weights[name] * part for name, part in parts.items())
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(step)
        step += 1
        run.report(step, stop, {"loss": loss, **parts}, test, write)
    write()


if __name__ == "__main__":
    main()
