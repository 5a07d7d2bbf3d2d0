"""The questions of lmms-eval's tasks: opened, made into requests, put into another order, and graded."""

import random
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lmms_eval.api.model import lmms

from vlmslim.evaluation.cells import Asked, Sample
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.progress import output_to
from vlmslim.evaluation.queries import Query, query_of
from vlmslim.evaluation.replay import requests_hash
from vlmslim.evaluation.tasks import Tasks
from vlmslim.evaluation.variants import Variant

#: lmms-eval's own default on the command line; its Python API would leave reasoning tags in the answers.
REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'


class Questions:
    """The questions of a comparison. lmms-eval opens their data, makes the requests and grades the answers.

    Args:
        config: the comparison.
        tasks: its tasks.
    """

    def __init__(self, config: RunConfig, tasks: Tasks):
        self._config, self._tasks = config, tasks
        self._log = config.output / "lmms_eval.log"
        self._latest: tuple[str, Asked | None] | None = None
        self._shuffled: dict[str, Any] = {}

    def open(self, names: Sequence[str]) -> dict[str, Any]:
        """Open the data of some tasks.

        Returns:
            lmms-eval's object of each task, by its name.

        Raises:
            Exception: whatever lmms-eval or a task raises.
        """
        from lmms_eval.tasks import get_task_dict

        with output_to(self._log):
            return get_task_dict(list(names), self._tasks.manager, "simple")

    def asked(self, task: str) -> Asked | None:
        """Return the requests of a task as lmms-eval makes them; None if they depend on answers."""
        if self._latest is None or self._latest[0] != task:
            self._latest = task, self._requests(task)
        return self._latest[1]

    def _requests(self, task: str) -> Asked | None:
        seed = self._config.seed
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        (loaded,) = self.open([task]).values()
        with output_to(self._log):
            if loaded.get_config("num_fewshot") is None:
                loaded.set_config(key="num_fewshot", value=0)
            loaded.set_fewshot_seed(seed=seed)
            loaded.build_all_requests(limit=self._config.limit, rank=0, world_size=1)
        requests = [request for request in loaded.instances for _ in range(request.repeats)]
        kinds = {request.request_type for request in requests}
        if len(kinds) > 1 or not kinds <= {"generate_until", "loglikelihood"}:
            return None
        queries = [query_of(request, {task: loaded.dataset}, simple=True) for request in requests]
        return Asked(kinds.pop(), queries, requests_hash(requests))

    def first(self, count: int, tasks: Sequence[str] | None = None) -> list[Query]:
        """Return the first questions of tasks, by default all, taken in turn."""
        names = list(tasks or [task.task for task in self._tasks.leaves])[:count]
        per_task = -(-count // len(names))
        loaded = self.open(names)
        with output_to(self._log):
            for task in loaded.values():
                task.build_all_requests(limit=per_task, rank=0, world_size=1)
        numbered: list[tuple[int, Query]] = []
        for name, task in loaded.items():
            firsts: dict[int, Any] = {}  # a multiple-choice question makes one request a choice
            for request in task.instances:
                firsts.setdefault(request.doc_id, request)
            numbered += enumerate(query_of(request, {name: task.dataset}, simple=True) for request in firsts.values())
        numbered.sort(key=lambda pair: pair[0])
        return [query for _, query in numbered[:count]]

    def grade(
        self, lm: lmms, variant: Variant, task: str, batch_size: int, sample: Sample | None = None
    ) -> tuple[dict, list[dict]]:
        """Let lmms-eval ask a model and grade what it says, with the settings that its command line would use.

        Args:
            lm: the model.
            variant: the row, whose folder takes the files that some tasks write.
            task: by its name.
            batch_size: that lmms-eval notes.
            sample: the questions; by default all within the limit.

        Returns:
            lmms-eval's results, and the samples.

        Raises:
            Exception: whatever lmms-eval, the task or the model raises.
        """
        from lmms_eval.evaluator import simple_evaluate

        sample = sample or Sample(count=self._config.limit)
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        with output_to(self._log):
            results = simple_evaluate(
                model=lm,
                tasks=[self._shuffled.get(task, task)],
                task_manager=self._tasks.manager,
                batch_size=batch_size,
                limit=sample.count,
                offset=sample.first,
                log_samples=True,
                cli_args=Namespace(
                    output_path=str(self._config.output / "cells" / variant.label),  # for submission files of tasks
                    process_with_media=False,
                    reasoning_tags=REASONING_TAGS,
                ),
                verbosity="ERROR",
                **dict.fromkeys(seeds, self._config.seed),
            )
        samples = results.pop("samples")[task]
        for name in ("date", "git_hash", "git_branch", "throughput", "usage", "efficiency"):
            results.pop(name, None)
        return results, samples

    def shuffle(self) -> dict[str, int]:
        """Put the questions of each task into a random order from now on, those within the limit only.

        Returns:
            How many questions each task has then.
        """
        counts = {}
        for number, leaf in enumerate(self._tasks.leaves):
            (task,) = self.open([leaf.task]).values()
            split = task.config.test_split if task.has_test_docs() else task.config.validation_split
            total = len(task.eval_docs)
            counts[leaf.task] = count = min(self._config.limit or total, total)
            order = np.random.default_rng([self._config.seed, number]).permutation(count)
            for data in {id(data): data for data in (task.dataset, task.dataset_no_image)}.values():  # may be one
                data[split] = data[split].select(order)
            self._shuffled[leaf.task] = task
        return counts
