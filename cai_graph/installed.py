"""Finds the command that installs an extra of cai-graph in the way this installation was made."""

from __future__ import annotations

from pathlib import Path

__all__ = ["command"]


def command(extra: str = "") -> str:
    """Return the shell command that installs cai-graph with an extra from its original source.

    Installers record that source in `direct_url.json`:
    https://packaging.python.org/en/latest/specifications/direct-url/.
    """
    import json
    import shlex
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    extras = f"[{extra}]" if extra else ""
    try:
        told = distribution("cai-graph").read_text("direct_url.json")
    except PackageNotFoundError:
        return f"pip install -e {shlex.quote(f'{Path(__file__).parents[1]}{extras}')}"
    match json.loads(told or "{}"):
        case {"dir_info": {"editable": True}, "url": str(url)}:
            return f"pip install -e {shlex.quote(f'{url2pathname(urlsplit(url).path)}{extras}')}"
        case {"vcs_info": {"vcs": str(vcs), "commit_id": str(commit)}, "url": str(url)}:
            return f"pip install {shlex.quote(f'cai-graph{extras} @ {vcs}+{url}@{commit}')}"
        case {"url": str(url)}:
            return f"pip install {shlex.quote(f'cai-graph{extras} @ {url}')}"
        case _:  # from an index
            return f"pip install {shlex.quote(f'cai-graph{extras}')}"
