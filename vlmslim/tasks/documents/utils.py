"""Functions that the task files of this folder name. The scenes ask and score in the same way."""

from vlmslim.tasks.scenes.utils import images, score

__all__ = ["images", "score"]
