"""Functions that the task files of this folder name: those of the scenes, which ask and score alike."""

from vlmslim.tasks.scenes.utils import images, score

__all__ = ["images", "score"]
