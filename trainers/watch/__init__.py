"""The Goodhart watch: what is tracked while a policy is trained on a reward, and when it stops.

"When a measure becomes a target, it ceases to be a good measure." Gao et al. 2022 (arXiv:2210.10760) measured
it: the reward that is trained on keeps rising while a better judge's score rises, turns and falls; a KL
penalty moves along that curve and does not lift it. So a run is stopped by a held-out score: that of a judge
the policy is not trained on, over fixed held-out prompts, each answered twice in every observation.

    rules     the two rules that stop a run, and how often they do so in vain
    figures   what else is told of a step: boilerplate, length, refusals
    watch     observes a run, keeps what it saw, and decides by the rules
    plot      the readings as SVG

What is written: `watch.jsonl`, a Reading for each step; `heldout.jsonl`, all held-out answers with both
scores, so that they can be scored again; `watch.svg`.
"""

from __future__ import annotations

from trainers.watch.figures import Reading
from trainers.watch.rules import Decision
from trainers.watch.watch import Watch, WatchConfig

__all__ = ["Decision", "Reading", "Watch", "WatchConfig"]
