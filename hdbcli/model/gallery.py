"""A page of pictures for a browser: one file, with the pictures inside, that loads and runs
nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from string import Template

# The policy holds even if a text should ever get past the escaping.
PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fafafa }
main { display: flex; flex-wrap: wrap; gap: 1.5em }
figure { margin: 0; width: 256px }
img { width: 100%; height: auto; border-radius: 4px }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px }
summary { color: #666 }
</style>
</head>
<body>
<h1>$title</h1>
<main>
$figures
</main>
</body>
</html>
"""
)
FIGURE = Template(
    """<figure>
<img src="data:image/png;base64,$data" alt="$caption">
<figcaption>$caption
<details><summary>settings</summary><pre>$settings</pre></details></figcaption>
</figure>"""
)


def gallery(title: str, pictures: Iterable[tuple[bytes, str, str]]) -> str:
    """Return a page of PNG files, each with its caption and how it was made."""
    figures = []
    for png, caption, settings in pictures:
        figures.append(
            FIGURE.substitute(
                data=base64.b64encode(png).decode(),
                caption=html.escape(caption),
                settings=html.escape(settings),
            )
        )
    return PAGE.substitute(title=html.escape(title), figures="\n".join(figures))
