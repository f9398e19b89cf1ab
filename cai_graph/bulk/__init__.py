"""Processes files of rows: answers and logs prompts (`cai run`), or judges existing answers (`cai judge`).

    rows      Rows: reads a file of JSONL, CSV or text; a row that cannot be read is Broken
    run       Run: answers the prompts of a file through a wrapped model, which judges and logs them; resumes
              an earlier run. Summary: the counts of a run
    judging   judge: judges the answers of a file, in order; drafts nothing and logs nothing

A run resumes an earlier one when the file's bytes and everything that affects the answers are the same. A
row's key in the log is `run:FILE/SETTINGS/INDEX`, with 16 hex digits of the digest of each, and the row's
index, since prompts may repeat within a file.
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
