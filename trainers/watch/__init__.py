"""The Goodhart watch: measures a policy during training on a reward, and stops overoptimization.

"When a measure becomes a target, it ceases to be a good measure." Gao et al. 2022 (arXiv:2210.10760) measured
this: the reward that is trained on keeps rising, while a better judge's score first rises and then falls. A
KL penalty only chooses a point on that curve; it does not raise the curve. So a held-out score decides when
a run is stopped: the score of a judge that the policy is not trained on, over fixed held-out prompts, each
answered twice in every observation.

    rules     the two rules that stop a run, and their rates of false stops
    figures   the other metrics of a step: boilerplate, length, refusals
    watch     observes a run, records the readings, and applies the rules
    plot      the readings as SVG

It writes `watch.jsonl`, a Reading per step; `heldout.jsonl`, all held-out answers with their scores and
rewards, so that they can be scored again; and `watch.svg`.
"""

from __future__ import annotations

from trainers.watch.figures import Reading
from trainers.watch.rules import Decision
from trainers.watch.watch import Watch, WatchConfig

__all__ = ["Decision", "Reading", "Watch", "WatchConfig"]
