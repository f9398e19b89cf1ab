"""Runs `cai` as `python -m cai_graph.cli`."""

from cai_graph.cli import main

main()
