"""Groups of tasks by what they ask for: reading text, fine detail, hallucination, or anything else.

Compression hurts these groups differently, and an average over all tasks hides the difference. A `group` in the task's
YAML entry overrides the group that is given here.
"""

OCR, DETAIL, HALLUCINATION, GENERAL = "OCR", "fine detail", "hallucination", "general"
GROUPS = (OCR, DETAIL, HALLUCINATION, GENERAL)

#: Beginnings of task names, up to an underscore or the end; the longest beginning that fits decides.
_PREFIXES = {
    OCR: (
        "scenes_text documents textvqa docvqa infovqa chartqa chartqapro charxiv ocrbench cc_ocr stvqa textcaps "
        "multidocvqa dude slidevqa mmlongbench_doc mtvqa vcr_wiki synthdog websrc visualwebbench omnidocbench mdpbench "
        "seedbench_2_plus"
    ),
    DETAIL: (
        "scenes_detail scenes_count scenes_spatial vstar hrbench hrbench4k hrbench8k mme_realworld realworldqa "
        "cv_bench countbench countbenchqa pixmo_count fsc147 refcoco refcoco+ refcocog screenspot mmvp embspatial "
        "blink vlmsareblind xlrs"
    ),
    HALLUCINATION: "scenes_presence pope hallusion_bench amber_g coco_cap_chair",
}
_GROUP_OF = {prefix: group for group, prefixes in _PREFIXES.items() for prefix in prefixes.split()}


def group_of(task: str) -> str:
    """Return the group of a task by its name; `general` for a name that is not listed here."""
    parts = task.lower().split("_")
    beginnings = ("_".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((_GROUP_OF[name] for name in beginnings if name in _GROUP_OF), GENERAL)


def known_first(group: str) -> tuple[int, str]:
    """Sort the groups of `GROUPS` in their order, and then others by name."""
    return (GROUPS.index(group) if group in GROUPS else len(GROUPS), group)
