"""Requests as lmms-eval makes them, and an answer that `generate()` is made to say."""

import torch
from lmms_eval.api.instance import Instance
from lmms_fixtures import picture, question

from vlmslim.evaluation.conversation import user_message

GENERATE = {"max_new_tokens": 8, "until": ["\n\n"], "temperature": 0, "do_sample": False}


def pictures_of(doc: dict) -> list:
    """Most questions have one picture, some have two or none."""
    count = {1: 2, 3: 0, 5: 2}.get(doc["id"], 1)
    return [picture(doc["id"] + j) for j in range(count)]


def ask(i: int, *extra, kind="generate_until", visuals=pictures_of, text=None) -> Instance:
    extra = extra or (GENERATE,)
    arguments = (text or question(i), extra[0], visuals, *extra[1:], i, "quiz", "test")
    return Instance(kind, arguments, 0, {"task": "quiz", "doc_id": i, "repeats": 1})


def texts(lm, requests) -> list[str]:
    return [result.text for result in lm.generate_until(requests)]


def forced(lm, i: int, answer: str, one: bool = False) -> tuple[float, bool, int]:
    """Mean loss and greediness of an answer, and its length, when `generate()` is made to say it token by token."""
    prompt = lm.prompter.render(user_message(question(i), [picture(i)] if one else pictures_of({"id": i})))
    images = {"images": [prompt.media["image"]]} if prompt.media["image"] else {}
    start = lm.processor(text=prompt.text, **images, return_tensors="pt")
    ids = lm.processor(text=f"{prompt.text} {answer}", **images, return_tensors="pt")["input_ids"][0]
    n = start["input_ids"].shape[1]
    assert ids[:n].tolist() == start["input_ids"][0].tolist()
    steps = lm.model.generate(
        **start,
        do_sample=False,
        suppress_tokens=None,
        max_new_tokens=len(ids) - n,
        prefix_allowed_tokens_fn=lambda row, before: [int(ids[len(before)])],
        output_logits=True,
        return_dict_in_generate=True,
    ).logits
    logits = torch.cat(steps)
    losses = torch.nn.functional.cross_entropy(logits, ids[n:], reduction="none")
    return losses.mean().item(), bool((logits.argmax(-1) == ids[n:]).all()), len(losses)
