"""Confidence intervals of shares."""

from __future__ import annotations

import math

__all__ = ["wilson"]


def wilson(count: float, of: float) -> tuple[float, float]:
    """Return the 95 % interval of the share `count / of` (Wilson 1927); a tie may count as half a case.

    >>> [round(end, 3) for end in wilson(50, 100)]
    [0.404, 0.596]
    """
    z2 = 1.959964**2
    share = count / of
    centre = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = math.sqrt(z2 * share * (1 - share) / of + z2 * z2 / (4 * of * of)) / (1 + z2 / of)
    # Rounding alone may leave a share of 0 or 1 outside.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
