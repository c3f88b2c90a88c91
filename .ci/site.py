"""What mkdocs does beyond mkdocs.yml.

Headings get the anchors that GitHub gives them, so that one link works in both places. A page may link to any
file of the repository: a Markdown file becomes a page, another file is copied, both under ``repository/``.
A notebook in docs/ is a page with its outputs, and the file itself lies beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
NOTEBOOK = ".ipynb"
COPIES = "repository"
"""The folder of the site for files from outside docs/."""
SETTINGS = "reference/settings.html"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, each file of the repository that a page links to, and what added pages
    link to in turn."""
    for notebook in [file.src_uri for file in files if file.src_uri.endswith(NOTEBOOK)]:
        content = markdown_of(repository_path(notebook))
        files.append(File.generated(config, page_of(notebook), content=content))
    waiting = [page.src_uri for page in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        file = files.src_uris[page]
        for target in LINK.findall(FENCE.sub("", file.content_string)):
            uri = site_uri(page, target)
            source = repository_path(uri)
            if uri in files.src_uris or not uri.startswith(f"{COPIES}/") or not source.is_file():
                continue
            level = InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, uri, abs_src_path=str(source), inclusion=level))
            if uri.endswith(".md"):
                waiting.append(uri)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where the files are on the site."""
    place = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        return relpath(site_uri(place, match[1]), str(PurePosixPath(place).parent))

    parts = re.split(f"({FENCE.pattern})", markdown, flags=FENCE.flags)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def on_post_build(config: MkDocsConfig) -> None:
    """Let words find a setting: ``optimizer.weight_decay`` is one word of the search."""
    path = Path(config.site_dir) / "search" / "search_index.json"
    index = json.loads(path.read_text("utf-8"))
    for entry in index["docs"]:
        words = entry["title"].split(" ")[0].rpartition(".")[2].replace("_", " ")
        if entry["location"].startswith(f"{SETTINGS}#") and " " in words:
            entry["title"] += f" – {words}"
    path.write_text(json.dumps(index, ensure_ascii=False, separators=(",", ":")), "utf-8")


def markdown_of(notebook: Path) -> str:
    """The notebook as Markdown with its outputs: pictures inside, what is shown as HTML as it is."""
    exporter = MarkdownExporter(config={"ExtractOutputPreprocessor": {"enabled": False}})
    return exporter.from_filename(str(notebook))[0]


def page_of(uri: str) -> str:
    """The page that shows the file: that of a notebook is beside it."""
    return uri.removesuffix(NOTEBOOK) + ".md" if uri.endswith(NOTEBOOK) else uri


def repository_path(uri: str) -> Path:
    """The file in the repository of a path on the site."""
    return ROOT / uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else ROOT / "docs" / uri


def site_uri(page: str, target: str) -> str:
    """Where a link's target is on the site. ``page``: the path of the page that links, on the site."""
    folder = repository_path(page).parent.relative_to(ROOT).as_posix()
    path = normpath(f"{folder}/{target}")
    return page_of(path.removeprefix("docs/")) if path.startswith("docs/") else f"{COPIES}/{path}"
