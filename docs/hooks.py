"""Let the documentation site show pages that live outside `docs/`, and notebooks, so that one link works everywhere.

A page of `docs/` links to the rest of the repository as `../assets/leaderboard_scenes.md` or `../vlmslim/patching.py`.
The site has pages for `CHANGELOG.md`, `CONTRIBUTING.md` and everything in Markdown under `assets/`. Links to other
files lead to the repository. A notebook becomes a page with its text and its code; links to `x.ipynb` lead there.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)(?=[)#])")


def on_files(files, config):
    """Add the pages and pictures from outside `docs/`, and a page for each notebook."""
    outside = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    outside += [path for path in sorted((ROOT / "assets").rglob("*")) if path.suffix in {".md", ".png"}]
    for path in outside:
        if "bank" not in path.parts:  # the pictures that the benchmarks are made of
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        on_site = path.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        files.append(File.generated(config, on_site, content=as_markdown(path, config.repo_url)))
    return files


def as_markdown(notebook, repo_url):
    """Return the cells of a notebook as Markdown, with a link to the notebook below its title."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook.read_text())["cells"]]
    parts = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells]
    title, _, rest = parts[0].partition("\n")
    link = f"[This page as a notebook]({repo_url}/blob/main/docs/notebooks/{notebook.name})"
    return "\n\n".join([title, link, rest.strip(), *parts[1:]]) + "\n"


def on_page_markdown(markdown, page, config, files):
    """Rewrite links of a page from places in the repository to places on the site."""
    page_on_site = page.file.src_uri
    page_in_repo = f"docs/{page_on_site}" if (ROOT / "docs" / page_on_site).exists() else page_on_site

    def rewrite(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page_in_repo), match[1]))
        on_site = re.sub(r"\.ipynb$", ".md", target.removeprefix("docs/"))
        if files.get_file_from_path(on_site) is not None:
            return posixpath.relpath(on_site, posixpath.dirname(page_on_site) or ".")
        if (ROOT / target).exists():
            return f"{config.repo_url}/blob/main/{target}"
        return match[0]  # a dead link, which the strict build reports

    return LINK.sub(rewrite, markdown)
