"""Racing: the top K pairs by validation counts, without scoring the losers on every image.

`Elimination` is the statistics, on numbers alone; `race` feeds it batch after batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bmsn.errors import InputError
from bmsn.evaluator import Scores, all_pairs, one_scoring, score_architectures
from bmsn.network import SupernetMixture, check_images
from bmsn.plan import Pair
from bmsn.rng import generator

# Share of the largest bet that cannot lose more than everything. Images needed in ten simulated populations, from
# independent images to batches all right or all wrong, K = 1 and 3 or 5, relative to 0.95: a bet sized by the mean and
# variance seen so far 0.96 to 1.26; shares 0.1, 0.5 and 1 side by side 0.97 to 1.10; share 0.9 alone 0.96 to 1.04;
# share 1 alone 0.97 to 2.1 (a single batch all wrong ruins it).
_BET = 0.95
_PROVEN = 1e100  # capital that decides a comparison alone; more is not kept, so nothing overflows
_BLOCK = 2**20  # comparisons computed at a time
_REST_BATCHES = 16  # copied and scored in one call once the race is decided


class Elimination:
    """Which candidates can still be among the top K of a finite population of batches, as its batches are drawn.

    The population is a fixed table of counts x[c, u], candidate by batch; the truth ranks the candidates by their sums
    over all B batches, equal sums by index (the smaller first). The batches come in uniformly random order, and the
    only randomness is that order. With probability at least `confidence` no member of the true top K is ever dropped,
    however many looks are taken; so if the race runs until K are left, they are the top K.

    One comparison. Whether a beats b is a question about D, the sum over all batches of d_u = x[a, u] - x[b, u], which
    lies in [-n, n] for batches of at most n images. The null hypothesis "a does not beat b" is D <= D0: D0 = 0, or -1
    where a tie goes to a. With r batches left and S the sum of the d_u seen, the next d has under it a mean of at most
    mu = (D0 - S) / r, so the capital

        K[a, b] = product over draws of 1 + f (d - mu) / (n + mu),        0 <= f <= 1,

    is a non-negative supermartingale that starts at 1. It needs no limit on the number of looks (Ville's inequality).
    It is also paired: batches that are hard for both cancel. With f = 1 and d constant its logarithm is about
    (B d / n) log(B / r), which no test of this guarantee can beat by much: a population in which B d / n of the batches
    hold -n instead of d has D <= 0, and looks the same so far with about the probability exp(-that). The range n is
    what costs: a gap of g (share of images) takes until B g log(B / r) is about log(K (C - K) / (1 - confidence)) if a
    single rival shows it, so many small batches decide sooner than few large ones. The variance, tiny beside n^2,
    hardly enters; bets that adapt to it were not faster (see `_BET`).

    All comparisons. If b is in the true top K, then at least C - K of its C - 1 rivals do not beat it; which ones is
    unknown, but the mean of the C - K smallest capitals K[., b] is at most the mean over those C - K, which is a
    supermartingale that starts at 1, as means of such are. So b is dropped when that mean reaches
    K / (1 - confidence): a given member of the top K is ever dropped with probability at most (1 - confidence) / K,
    any of the K with at most 1 - confidence. The level is split between the K that an error can hit, not between the
    C (C - 1) comparisons: for K = 1 not at all, and the evidence of several stronger rivals adds up. A dropped
    candidate's capitals stop where they are, which keeps them supermartingales.

    Sources: Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting" (its part on
    sampling without replacement); Vovk & Wang 2021, "E-values: calibration, combination and applications" (means);
    Maron & Moore 1994, "Hoeffding races" (racing). The capital matrix takes 8 C^2 bytes.

    Args:
        num_candidates: C.
        keep: K, in 1..C.
        confidence: in (0, 1).
        batch_sizes: images in each batch of the population, in the order in which they will be drawn.
    Attributes:
        alive: indices of the candidates not dropped, ascending.
        correct: (C,) int64, sum of the counts observed; seen: (C,) int64, images they are of.
    Raises:
        InputError: `keep` or `confidence` out of range.
    """

    def __init__(self, num_candidates: int, keep: int, *, confidence: float, batch_sizes: Sequence[int]) -> None:
        if not 1 <= keep <= num_candidates:
            raise InputError(f"keep must be in 1..{num_candidates}, the number of pairs; got {keep}")
        if not 0 < confidence < 1:
            raise InputError(f"confidence must be in (0, 1); got {confidence}")
        self.keep = keep
        self.alive = np.arange(num_candidates)
        self.correct = np.zeros(num_candidates, np.int64)
        self.seen = np.zeros(num_candidates, np.int64)
        self._sizes = list(batch_sizes)
        self._num_drawn = 0
        self._threshold = keep / (1 - confidence)
        self._capital = np.ones((num_candidates, num_candidates))  # [b, a]: that a beats b
        np.fill_diagonal(self._capital, _PROVEN)  # never among the C - K smallest

    @property
    def decided(self) -> bool:
        """No more than K are left: nobody is dropped any more."""
        return len(self.alive) == self.keep

    @property
    def top(self) -> np.ndarray:
        """Those alive from best to worst by what they got right; equal ones by index."""
        return self.alive[np.argsort(-self.correct[self.alive], kind="stable")]

    def observe(self, counts: np.ndarray) -> None:
        """Takes the next batch's counts and drops who cannot be in the top K. After the last batch K are left.

        Args:
            counts: (len(alive),) integers in 0..size of the batch, in the order of `alive`.
        Raises:
            InputError: a count out of that range, or another number of them.
        """
        size, alive = self._sizes[self._num_drawn], self.alive
        counts = np.asarray(counts, np.int64)
        if counts.shape != alive.shape or not np.all((counts >= 0) & (counts <= size)):
            raise InputError(f"counts must be {len(alive)} integers in 0..{size}; got {counts}")
        before = self.correct[alive]
        self.correct[alive] += counts
        self.seen[alive] += size
        left = len(self._sizes) - self._num_drawn  # this batch included
        self._num_drawn += 1
        if left == 1 or self.decided:  # every batch is seen, or nobody can be dropped: no statistics needed
            self.alive = np.sort(self.top[: self.keep])
            return
        evidence = np.concatenate([
            self._bet(rows, before, counts, left)
            for rows in np.array_split(np.arange(len(alive)), 1 + len(alive) ** 2 // _BLOCK)
        ])  # fmt: skip
        strongest = np.argsort(-evidence, kind="stable")[: len(alive) - self.keep]
        self.alive = np.delete(alive, strongest[evidence[strongest] >= self._threshold])

    def observe_rest(self, counts: np.ndarray, num_images: int) -> None:
        """Once K are left: takes their counts over `num_images` more images, of any number of batches."""
        self.correct[self.alive] += np.asarray(counts, np.int64)
        self.seen[self.alive] += num_images

    def _bet(self, rows: np.ndarray, before: np.ndarray, counts: np.ndarray, left: int) -> np.ndarray:
        """Updates the capitals against the alive candidates number `rows`; the evidence against each of them."""
        alive, largest = self.alive, max(self._sizes)
        remaining = sum(self._sizes[self._num_drawn :])
        lead = before[None, :] - before[rows, None]  # (rows, alive): S, of the rival over the candidate
        gain = counts[None, :] - counts[rows, None]  # d
        null = -(alive[None, :] < alive[rows, None]).astype(np.int64)  # D0
        # (d - mu) / (n + mu) with both multiplied by `left`: integers, so exact, and never below -1.
        room = largest * left + null - lead
        ratio = (gain * left + lead - null) / np.maximum(room, 1)
        block = np.ix_(alive[rows], alive)
        capital = np.minimum(self._capital[block] * np.where(room > 0, 1 + _BET * ratio, 1), _PROVEN)
        capital[lead + gain - remaining > null] = _PROVEN  # not even losing every image left would change it
        self._capital[block] = capital
        num_nulls = len(self.correct) - self.keep
        weakest = np.partition(self._capital[alive[rows]], num_nulls - 1, axis=1)[:, :num_nulls]
        return weakest.mean(1)


@dataclass(frozen=True, slots=True)
class Race:
    """The outcome of a race.

    Attributes:
        pairs: (architecture, supernet index), in the order given.
        correct: (len(pairs),) int64, on the CPU: correctly classified among the images seen.
        seen: (len(pairs),) int64: images each pair was scored on; all of them for the top K.
        total: number of images.
        top: indices of the top K in `pairs`, from best to worst; exact counts, equal ones in the order of `pairs`.
        decided_after: images after which only K were left.
    """

    pairs: tuple[Pair, ...]
    correct: Tensor
    seen: Tensor
    total: int
    top: tuple[int, ...]
    decided_after: int

    @property
    def ranking(self) -> tuple[Pair, ...]:
        """The top K, from best to worst."""
        return tuple(self.pairs[index] for index in self.top)

    @property
    def decided_early(self) -> bool:
        """K were left before all images were seen."""
        return self.decided_after < self.total

    @property
    def share_seen(self) -> float:
        """Images scored, over those that scoring every pair on all of them takes; in (0, 1]."""
        return float(self.seen.sum()) / (self.total * len(self.pairs))


def images_seen(scores: Scores | Race) -> list[int]:
    """Images that each pair was scored on."""
    return scores.seen.tolist() if isinstance(scores, Race) else [scores.total] * len(scores.pairs)


def race(
    mixture: SupernetMixture,
    images: Tensor,
    labels: Tensor,
    keep: int,
    *,
    confidence: float = 0.95,
    pairs: Sequence[Pair] | None = None,
    batch_size: int = 256,
    seed: int = 0,
    score: Callable[..., Scores] = score_architectures,
) -> Race:
    """Finds the `keep` best pairs by counts over all images, and drops the others as soon as that is safe.

    The unit is a batch, because its images share BatchNorm statistics: the batches are those that `score_architectures`
    would take, the last and smaller one included, and come in a seeded random order. All pairs still alive are scored
    on each in one pass. Once `keep` are left they are scored on the rest, so their counts, and their order, are those
    of `score_architectures`. Should it never come to that, all batches are seen and the result is exact.

    Source: `Elimination`, where the guarantee is derived.

    Args:
        mixture, images, labels, batch_size: as for `score_architectures`.
        keep: K, in 1..number of pairs.
        confidence: the returned K are the top K of all images with at least this probability over the order of the
            batches, in (0, 1).
        pairs: (architecture, supernet index), each once; of equal counts the earlier one is better. None: all pairs.
        seed: of the order.
        score: called as score(mixture, images, labels, pairs, batch_size=...); a `functools.partial` of
            `score_architectures` sets its other arguments.
    Returns:
        Race.
    Raises:
        InputError: any of these out of range.
    """
    pairs = all_pairs(mixture) if pairs is None else tuple(pairs)
    if batch_size < 2:
        raise InputError(f"batch_size must be at least 2; got {batch_size}")
    if len(labels) != len(images):
        raise InputError(f"labels must be {len(images)} integers; got {tuple(labels.shape)}")
    batches = torch.arange(len(images)).split(batch_size)
    last = images[batches[-1]]  # its turn may come late, and a group of too few values is an error
    check_images(mixture, last.permute(0, 3, 1, 2).float() if last.dtype == torch.uint8 and last.ndim == 4 else last)

    order = generator(seed, "race").permutation(len(batches)).tolist()
    state = Elimination(len(pairs), keep, confidence=confidence, batch_sizes=[len(batches[b]) for b in order])

    def count(indices: Tensor) -> np.ndarray:
        alive = [pairs[index] for index in state.alive]
        return score(mixture, images[indices], labels[indices], alive, batch_size=batch_size).correct.numpy()

    num_raced = 0
    with one_scoring():
        while num_raced < len(order) and not state.decided:
            state.observe(count(batches[order[num_raced]]))
            num_raced += 1
        rest = sorted(order[num_raced:])  # so that the smaller batch, if it is among them, stays last
        for first in range(0, len(rest), _REST_BATCHES):
            indices = torch.cat([batches[b] for b in rest[first : first + _REST_BATCHES]])
            state.observe_rest(count(indices), len(indices))
    decided_after = sum(len(batches[b]) for b in order[:num_raced])
    return Race(
        pairs=pairs,
        correct=torch.from_numpy(state.correct),
        seen=torch.from_numpy(state.seen),
        total=len(images),
        top=tuple(state.top.tolist()),
        decided_after=decided_after,
    )
