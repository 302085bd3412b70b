"""For mkdocs: links from a page to files of the repository that are no pages are shown as their paths."""

from __future__ import annotations

import posixpath
import re


def on_page_markdown(markdown, page, config, files):
    def shown(match):
        text, target = match[1], match[2]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), target.partition("#")[0]))
        return f"{text} (`{path.removeprefix('../')}`)" if path.startswith("../") else match[0]

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)", shown, markdown)
