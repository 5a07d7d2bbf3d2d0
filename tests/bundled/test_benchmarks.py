"""The bundled tasks: their pictures and answers are those that the generators make today."""

import numpy as np
import pytest

pq = pytest.importorskip("pyarrow.parquet")
from make_benchmark import BENCHMARKS


@pytest.mark.parametrize("benchmark, task", [(b, task) for b in BENCHMARKS.values() for task in b.tasks])
def test_a_bundled_task_matches_its_generator(benchmark, task):
    rows = pq.read_table(benchmark.file(task)).to_pylist()
    assert len(rows) >= 200 and len({row["id"] for row in rows}) == len(rows)
    row = rows[len(rows) // 2]
    picture = benchmark.make(int(row["scene"]), "test")
    if task == "choice":  # the wrong options are drawn anew
        assert [option for option in row["choices"] if option in picture.named("thing")] == [row["answer"]]
        return
    asked = [benchmark.ask(picture, task, np.random.default_rng(i)) for i in range(300)]
    assert {q.answer for q in asked if q and q.text == row["question"]} == {row["answer"]}


@pytest.mark.parametrize("name, megabytes", [("scenes", 25), ("documents", 8)])
def test_bundled_tasks_are_small(name, megabytes):
    files = [BENCHMARKS[name].file(task) for task in BENCHMARKS[name].tasks]
    assert sum(file.stat().st_size for file in files) < megabytes * 2**20
