"""The data of `train_atp.py` and `train_tokenflex.py`: scenes of the bundled generator, or a file of conversations."""

import numpy as np
from scenes import ask, make_scene

from vlmslim.training.conversations import PLACEHOLDER, Item, Items
from vlmslim.training.finetune import Settings, open_conversations


def training_data(settings: Settings) -> Items:
    """Open the data that the settings name: `data: scenes`, or a file of conversations."""
    return Scenes(settings.pictures, settings.questions) if settings.data == "scenes" else open_conversations(settings)


class Scenes(Items):
    """Scenes of the bundled generator, drawn as they are read: picture `i` is scene `first + i`.

    Args:
        count: pictures.
        questions: about each picture; each question is a conversation of its own.
        first: number of the first scene. Scenes from 1,000,000 on trained the bundled tiny LLaVA itself.
        split: "train", or "test" for the held-out styles, photographs and codes.
    """

    #: How often each task is asked.
    MIXTURE = {"presence": 2, "colour": 2, "count": 2, "spatial": 2, "detail": 3, "text": 2, "choice": 2}

    def __init__(self, count: int, questions: int = 8, first: int = 5_000_000, split: str = "train"):
        self.count, self.questions, self.first, self.split = count, questions, first, split

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        number = self.first + index
        scene, rng = make_scene(number, self.split), np.random.default_rng([number, 3])
        weights = np.array(list(self.MIXTURE.values()), float)
        tasks = rng.choice(list(self.MIXTURE), 20 * self.questions, p=weights / weights.sum())
        asked = {}
        for attempt, task in enumerate(tasks):
            question = ask(scene, str(task), rng)
            if question:  # a scene with little in it may be asked the same question again after half of the attempts
                asked[question.text if attempt < 10 * self.questions else attempt] = question
            if len(asked) == self.questions:
                break
        rows = tuple(
            [{"from": "human", "value": f"{PLACEHOLDER}\n{q.text}"}, {"from": "gpt", "value": q.answer}]
            for q in asked.values()
        )
        return Item(f"scene {number}", scene.image, rows)
