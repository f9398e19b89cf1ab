"""Builds static HTML pages: one file without scripts or external resources, with every text escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

__all__ = ["document", "figure", "table"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .6rem 0 } td { padding: .2rem 1.2rem .2rem 0; vertical-align: top }
th { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #ccd5dd }
td:first-child { color: #566370 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
td.text { white-space: pre-wrap; overflow-wrap: anywhere }
figure { margin: 1rem 0 } figcaption { color: #566370; font-size: .9rem }
svg, img { max-width: 100%; height: auto }
"""


def document(title: str, body: str) -> str:
    """Return a page around a body that is already HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{body}</body>
</html>
"""


def table(
    rows: Iterable[Sequence[str]],
    *,
    header: Sequence[str] = (),
    numbers: Sequence[int] = (),
    text: bool = False,
) -> str:
    """Return a table of escaped cells; the columns `numbers` are aligned to the right."""

    def cell(place: int, value: str, tag: str = "td") -> str:
        kind = ' class="n"' if place in numbers else ' class="text"' if text and place else ""
        return f"<{tag}{kind}>{html.escape(value)}</{tag}>"

    head = "".join(cell(n, name, "th") for n, name in enumerate(header))
    body = "".join(f"<tr>{''.join(cell(n, value) for n, value in enumerate(row))}</tr>\n" for row in rows)
    return f"<table>\n{f'<tr>{head}</tr>' if head else ''}{body}</table>\n"


def figure(svg: str, caption: str) -> str:
    """Return a plot with its caption. It is embedded as an image, so that nothing in it can run."""
    data = base64.b64encode(svg.encode()).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>\n"
    )
