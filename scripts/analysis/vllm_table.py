"""Compare vLLM with transformers: the same checkpoints, pictures, questions and methods; print a table in Markdown.

    scripts/test_vllm.sh --table                     # makes the environment; prints the tables of both checkpoints
    scripts/test_vllm.sh --table tiny-llava-next     # of one; methods after its name replace those below

Greedy answers to the first questions of each bundled task, in fp32. vLLM runs a copy of the checkpoint with wider heads
(`padded.py`) where its CPU kernels ask for it; transformers runs the checkpoint itself. Everything runs in one thread,
because threads that wait for each other spin, and what they burn counts as CPU time.
"""

import gc
import io
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that its CPU time is the engine's
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import pyarrow.parquet as pq
import torch
from padded import pad_heads
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmslim
from vlmslim.registry import parse_method
from vlmslim.vllm import overrides

ROOT = Path(vlmslim.__file__).parent
TASKS = {
    "tiny-llava": ("scenes", ("choice", "colour", "count", "detail", "presence", "spatial", "text")),
    "tiny-llava-next": ("documents", ("keyvalue", "presence", "smallprint", "table")),
}
MODEL_TYPES = {"tiny-llava": "llava", "tiny-llava-next": "llava_next"}
EACH, NEW_TOKENS = 6, 12  # questions of a task, tokens of an answer

METHODS = {
    "tiny-llava": [
        "divprune:keep=64",
        "divprune:keep=64:positions=renumbered",
        "todre:keep=64:layer=None",
        "globalcom2:keep=64",
        "bipartite_merge:keep=64",
        "tokencorr:keep=64",
        "tokenflex:keep=64:weights=bundled/tiny-tokenflex",
        "random:keep=64",
        "pool:keep=64",
        "uniform:keep=64",
        "mmr:keep=64",
        "scope:keep=64",
        "holov:keep=64",
        "vispruner:keep=64",
        "visionzip:keep=64",
        "visionzip:keep=64:mode=released",
        "hiprune:keep=64",
        "prunesid:keep=64",
        "cdpruner:keep=64:relevance=none",
    ],
    "tiny-llava-next": [
        "divprune:keep=64",
        "divprune:keep=64:positions=renumbered",
        "globalcom2:keep=64",
        "tokencorr:keep=0.25",
        "pool:keep=64",
        "tokenflex:keep=0.25:weights=pool",
        "visionzip:keep=100:mode=released",
    ],
}


@dataclass
class Questions:
    """Pictures, prompts and right answers, one entry each."""

    images: list[Any]
    prompts: list[str]
    answers: list[str]

    @classmethod
    @cache
    def of(cls, checkpoint: str) -> "Questions":
        """Read the first questions of every task of a bundled checkpoint."""
        bench, tasks = TASKS[checkpoint]
        files = [ROOT / f"tasks/{bench}/data/{bench}_{task}.parquet" for task in tasks]
        rows = [row for file in files for row in pq.read_table(file).slice(0, EACH).to_pylist()]
        processor = AutoProcessor.from_pretrained(ROOT / "bundled" / checkpoint)
        turns = [{"type": "image"}, {"type": "text"}]
        return cls(
            [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows],
            [
                processor.apply_chat_template(
                    [{"role": "user", "content": [turns[0], turns[1] | {"text": row["question"]}]}],
                    add_generation_prompt=True,
                )
                for row in rows
            ],
            [row["answer"] for row in rows],
        )


@cache
def wide(checkpoint: str, stock: bool = False) -> str:
    """Return a folder with a bundled checkpoint whose heads vLLM's CPU kernels can take; `stock` vLLM reads it too."""
    return str(pad_heads(ROOT / "bundled" / checkpoint, Path(mkdtemp()) / checkpoint, old_names=stock))


def engine(checkpoint: str, method: str | None, **options: Any) -> Any:
    """Start vLLM on a checkpoint, with a method or as it is."""
    from vllm import LLM

    given = {} if method is None else overrides(parse_method(method), MODEL_TYPES[checkpoint])
    if "rope_parameters" in given:
        options |= {"video_pruning_rate": 0.01}
    return LLM(
        wide(checkpoint, stock=method is None),
        **{
            "hf_overrides": given,
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": 32,
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 1 << 28,
            "distributed_executor_backend": "uni",
            "limit_mm_per_prompt": {"image": 2},
        }
        | options,
    )


def served(llm: Any, prompts: Sequence[str], images: Sequence[Any]) -> tuple[list[str], list[int]]:
    """Return vLLM's answers, and the tokens of each prompt."""
    from vllm import SamplingParams

    given = [{"prompt": p, "multi_modal_data": {"image": i}} for p, i in zip(prompts, images, strict=True)]
    outputs = llm.generate(given, SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
    return [x.outputs[0].text.strip() for x in outputs], [len(x.prompt_token_ids) for x in outputs]


@torch.no_grad()
def expected(checkpoint: str, method: str | None, prompts: Sequence[str], images: Sequence[Any]) -> list[str]:
    """Return transformers' answers under vlmslim, in batches of 21."""
    folder = ROOT / "bundled" / checkpoint
    model, processor = _loaded(folder)
    slim = vlmslim.patch(model, [parse_method(method or "none")])
    answers: list[str] = []
    with slim:
        for first in range(0, len(prompts), 21):
            part = slice(first, first + 21)
            inputs = processor(
                images=list(images[part]),
                text=list(prompts[part]),
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            answers += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


@cache
def _loaded(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def peak_blocks(llm: Any, questions: Questions) -> int:
    """Return the most blocks of the KV cache that the scheduler gave out at once, all questions asked together."""
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    step, used = llm.llm_engine.step, [0]

    def watched() -> Any:
        out = step()
        used.append(pool.num_gpu_blocks - pool.get_num_free_blocks())
        return out

    llm.llm_engine.step = watched
    served(llm, questions.prompts, questions.images)
    llm.llm_engine.step = step
    return max(used)


def cpu_seconds(llm: Any, questions: Questions) -> float:
    """Return the CPU seconds that vLLM takes for pictures that no cache has: the least of three runs."""
    seconds = []
    for turned in (ImageOps.mirror, ImageOps.flip, lambda image: image.rotate(180)):
        images = [turned(image) for image in questions.images]
        begun = time.process_time()
        served(llm, questions.prompts, images)
        seconds.append(time.process_time() - begun)
    return min(seconds)  # because other programs on the machine only add


def compare(checkpoint: str, method: str | None, base: float | None) -> tuple[str, float]:
    """Compare one method, and return its line of the table, and its CPU seconds, which the line divides by `base`."""
    questions = Questions.of(checkpoint)
    llm = engine(checkpoint, method, enable_prefix_caching=False)
    answers, tokens = served(llm, questions.prompts, questions.images)
    seconds, blocks = cpu_seconds(llm, questions), peak_blocks(llm, questions)
    del llm
    gc.collect()
    wanted = expected(checkpoint, method, questions.prompts, questions.images)
    equal = sum(a == b for a, b in zip(answers, wanted, strict=True))
    right = sum(a.lower().rstrip(".") == b.lower() for a, b in zip(answers, questions.answers, strict=True))
    n = len(answers)
    cells = [
        f"`{method}`" if method else "unpruned, stock vLLM",
        f"{sum(tokens) / n:.1f}",
        f"{equal} / {n}",
        f"{right / n:.1%}",
        str(blocks),
        f"{seconds / (base or seconds):.2f}",
    ]
    return f"| {' | '.join(cells)} |", seconds


def main(tables: dict[str, list[str]]) -> None:
    """Print a table for each checkpoint, with its methods."""
    packages = {"vlmslim": "vlmslim", "torch": "torch", "transformers": "transformers"}
    import vllm

    found = ", ".join(f"{name} {version(package)}" for name, package in packages.items())
    print(f"vllm {vllm.__version__}, {found}, Python {platform.python_version()}, {platform.machine()}, fp32, eager\n")
    for checkpoint, methods in tables.items():
        print(
            f"| {checkpoint} | prompt tokens, mean | same answer as transformers | right | KV blocks, peak | CPU time |"
        )
        print("|---|---:|---:|---:|---:|---:|")
        base = None
        for method in [None, *methods]:
            line, seconds = compare(checkpoint, method, base)
            base = base or seconds
            print(line, flush=True)
        print()


if __name__ == "__main__":
    asked = sys.argv[1:]
    main({asked[0]: asked[1:] or METHODS[asked[0]]} if asked else METHODS)
