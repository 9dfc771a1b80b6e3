"""The documentation site mirrors the repository: the same relative links work on GitHub and on the site.

MkDocs wants every page under one folder, and that folder must not be the repository itself. So this hook replaces its
list of files by: the markdown of the repository under its own paths, the static files under docs/, and every other file
that a page links to (a kernel, a result), which the site serves as it is.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/**/*.md", "learn/**/*.md", "bench/results/*.md")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


def on_files(files, config):
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    wanted = pages | {path for path in (ROOT / "docs").rglob("*") if path.is_file() and path.suffix != ".py"}
    for page in pages:
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            linked = (page.parent / target).resolve()
            if "://" not in target and linked.is_file() and linked.is_relative_to(ROOT):
                wanted.add(linked)
    names = sorted(path.relative_to(ROOT).as_posix() for path in wanted)
    own = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names]
    theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files(own + theme)
