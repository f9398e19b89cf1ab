"""Datasets: builds rows that trainers load from a log, and accounts for every trajectory.

reading      parses the fields of each logged Trajectory that rows need, and skips the others
evidence     finds the Comparisons, Reviews and Feedback about it; reviews evaluates people's decisions
answers      derives which answers were accepted, by whom, and with what probability
compared     turns the Comparisons of a Trajectory into pairs with soft labels, or reasons for dropping them
conversion   one pure function for each kind: Trajectory → rows or a reason; critic_rows is one of them
candidates   converts a stretch of the log to candidate rows in spools; lengths and privacy may reject one
split        assigns prompts to train or test; heldout excludes the prompts of evaluation sets
near         finds clusters of near-duplicate prompts, by MinHash
selection    selects candidates: one per content, within the caps, in their prompt's split
spool        stores candidates on disk, so that memory use is constant
dataset      runs all of these and writes the folder atomically; cluster does so on Ray
recipe       the settings of a dataset: all that it depends on besides the log
card         writes the dataset's card and report
"""

from __future__ import annotations

from trainers.dataset.dataset import MANIFEST, Dataset, Engine, Origin, build, explain, read_manifest
from trainers.dataset.recipe import Recipe

__all__ = ["MANIFEST", "Dataset", "Engine", "Origin", "Recipe", "build", "explain", "read_manifest"]
