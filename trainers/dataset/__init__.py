"""Datasets: from a log to rows that trainers load, with an account of every trajectory.

reading      of each logged Trajectory what rows are made of, at the speed of the parser
evidence     what was said of it: Comparisons, Reviews, Feedback; reviews reads what people decided
answers      what it shows of its answers: which were accepted, who vouches for them, how surely
compared     from the Comparisons of a Trajectory to a pair with a soft label, or why there is none
conversion   a pure function for each kind: a Trajectory → rows, or why none; critic_rows is one of them
candidates   a stretch of the log → candidate rows in spools; lengths and privacy may refuse one
split        which side a prompt is on; heldout: the evaluation sets that no row may come from
near         clusters of near-duplicate prompts, by MinHash
selection    which candidates stay: one of each content, within the caps, on their prompt's side
spool        candidates on disk, so that memory stays flat
dataset      ties them together: a folder that is whole or not there; cluster does so on Ray
recipe       what a dataset depends on besides the log
card         its card and its report
"""

from __future__ import annotations

from trainers.dataset.dataset import MANIFEST, Dataset, Engine, Origin, build, explain, read_manifest
from trainers.dataset.recipe import Recipe

__all__ = ["MANIFEST", "Dataset", "Engine", "Origin", "Recipe", "build", "explain", "read_manifest"]
