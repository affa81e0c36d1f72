"""How well a score separates two sets of episodes: AUROC over chunks, with bootstrap intervals over *episodes*.

Axis letters: P perturbed, N normal episodes; T chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Interval = dict[str, float | int]


class Wins:
    """Pairs of a positive and a negative chunk, by their episodes: how many there are, and how many the positive one wins.

    wins, pairs: (P, N) float64; a tie is half a win.
    """

    def __init__(self, positives: Sequence[np.ndarray], negatives: Sequence[np.ndarray]) -> None:
        """Scores of the P and N episodes' chunks, larger the stranger; an episode may have none."""
        self.wins = np.zeros((len(positives), len(negatives)))
        ends = np.cumsum([len(p) for p in positives])
        flat = np.concatenate(list(positives))
        for column, scores in enumerate(negatives):
            ordered = np.sort(scores)
            below = np.searchsorted(ordered, flat, "left") + np.searchsorted(ordered, flat, "right")
            self.wins[:, column] = [part.sum() / 2 for part in np.split(below, ends[:-1])]
        self.pairs = np.outer([len(p) for p in positives], [len(n) for n in negatives]).astype(np.float64)

    def auroc(self, perturbed: np.ndarray | None = None, normal: np.ndarray | None = None) -> np.ndarray:
        """AUROC (...) where episodes count as often as the weights (..., P) and (..., N) say; once without."""
        p = np.ones(len(self.wins)) if perturbed is None else perturbed
        n = np.ones(self.wins.shape[1]) if normal is None else normal
        share = ((p @ self.wins) * n).sum(-1) / ((p @ self.pairs) * n).sum(-1)
        return np.asarray(share)


def resamples(episodes: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, episodes): how often each episode is drawn in each bootstrap resample."""
    return rng.multinomial(episodes, np.full(episodes, 1 / episodes), size=count).astype(np.float64)


def interval(value: float, resampled: np.ndarray, episodes: int) -> Interval:
    """A figure with its 95 % percentile interval."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high), "n": episodes}


def share_interval(hits: np.ndarray, count: int, rng: np.random.Generator) -> Interval:
    """The mean of one number an episode, (P,)."""
    weights = resamples(len(hits), count, rng)
    return interval(float(hits.mean()), weights @ hits / len(hits), len(hits))


def localisation(heatmap: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """AUROC over pixels of a heat map for a mask (height, width), and 1.0 where its hottest pixel lies inside, else 0."""
    inside = bool(mask.ravel()[int(np.argmax(heatmap))])
    return float(Wins([heatmap[mask]], [heatmap[~mask]]).auroc()), float(inside)
