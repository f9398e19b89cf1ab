"""Many rows at once: prompts through a wrapped model into the log, existing answers to verdicts.

    rows      Rows: a file of rows, opened: JSONL, CSV or text, each row read or Broken
    run       Run: its prompts, drafted, judged and logged; takes up where an earlier run of it ended.
              Summary: what a run came to
    judging   judge: its answers, judged in order; nothing is drafted and nothing is logged

A run is the same run again when the file's bytes and everything that shapes the answers are the same. A
row's key in the log is `run:FILE/SETTINGS/INDEX`: 16 digits of both digests, and the row's index, since
prompts repeat within a file.
"""

from cai_graph.bulk.judging import Judgement, judge
from cai_graph.bulk.rows import Answer, Broken, Format, Prompt, Rows
from cai_graph.bulk.run import Failed, Run, Summary

__all__ = [
    "Answer",
    "Broken",
    "Failed",
    "Format",
    "Judgement",
    "Prompt",
    "Rows",
    "Run",
    "Summary",
    "judge",
]
