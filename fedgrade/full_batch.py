"""The clipped gradient sum of the full-batch modes, in integers from end to end; noise is added by the caller.

The unit is the item: its photos' and views' gradients are averaged before they are clipped. The head's gradient has a
closed form, residual times input, and the sum over items is a matrix product of clipped residuals and inputs. Both are
integers here, so that the product is exact in any order, and an item's part of it is its own to the last bit. A
floating-point product's last bits would depend on who else is in it: one item more could move every other item's part,
beyond the sensitivity (Casacuberta et al. 2022, arXiv 2207.10635). Needs neither torch nor Opacus;
:mod:`fedgrade.training` is what ``local_sgd`` does.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedgrade.errors import PlanRefused
from fedgrade.items import ItemBatch
from fedgrade.privacy.fixed_point import FixedPointPhotos, fixed_point_thresholds
from fedgrade.privacy.grid import LARGEST_SUM
from fedgrade.privacy.plan import TRAIN_GRID_BITS
from fedgrade.trust.records import DiscreteGaussian

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Few enough for their inputs to stay in a core's cache. Times what an item can add to a number of the sum without its
# sign, 2^24 * 2^22, they stay below the 2^53 up to which double precision counts.
_PHOTOS_AT_ONCE = 64
_SCORES_AT_ONCE = 4096  # photos; a bound of memory
_LARGEST_REACH = 2**24
_LARGEST_INPUT = 2**22
_RESIDUAL_BITS = 23  # of an item's largest residual, where its gradient's length is measured
# Far more than the divisions and square roots of a clip factor can be off by.
_SHRINK = 1.0 - 2.0**-40
_LEAST_EXPONENT = -(2**14)  # below any number's times any input's
# Words of inner products, residuals' and inputs': products of two words, summed over a photo's others, stay below 2^63.
_RESIDUAL_WORD, _INPUT_WORD = 28, 21


def clipped_gradient_sum(
    thresholds: FloatArray, batch: ItemBatch, *, max_grad_norm: float, mechanism: DiscreteGaussian
) -> IntArray:
    """Exact sum over items of the clipped per-item gradients at ``thresholds``, on the mechanism's grid.

    Inputs are rounded to a millionth (2^-20) of their photo's length once a batch, clipped residuals to as much of the
    clip. From there on every sum is one of integers.

    Args:
        thresholds: [grades - 1, features], the head's weights.
        batch: the items.
        max_grad_norm: L2 clip of one item's mean gradient.
        mechanism: states the grid; no noise is added here.

    Returns:
        Integers [(grades - 1) * features].

    Guarantee: one item more or less moves the result by at most ``mechanism.sensitivity`` in L2 norm, which is checked
    in integers before an item is added. An item that is not finite, or does not pass, counts as zero.

    Raises:
        PlanRefused: the mechanism is of another grid, or there are more items than 64 bits can add up.
    """
    _require_room(mechanism, items=len(batch))
    total = np.zeros(thresholds.shape, dtype=np.int64)
    at_once = max(1, _SCORES_AT_ONCE // max(1, batch.inputs.shape[1]))
    for start in range(0, len(batch), at_once):
        here = slice(start, start + at_once)
        photos = batch.fixed_point.take(here)
        residuals = _residuals(_scores(thresholds, photos), batch.photo_weights[here], batch.grades[here])
        clipped = _clipped(np.where(photos.finite[:, None, None], residuals, np.nan), photos, max_grad_norm)
        _add_products(total, clipped, photos)
    return total.ravel()


def _require_room(mechanism: DiscreteGaussian, *, items: int) -> None:
    if mechanism.sensitivity != 2**TRAIN_GRID_BITS:
        raise PlanRefused(
            f"grid: sensitivity {mechanism.sensitivity}; gradients are on the grid of 2^{TRAIN_GRID_BITS}"
        )
    if items * mechanism.sensitivity > LARGEST_SUM:
        raise PlanRefused(f"grid: {items} items; sums of 64 bits hold {LARGEST_SUM // mechanism.sensitivity} on it")


def _scores(thresholds: FloatArray, photos: FixedPointPhotos) -> FloatArray:
    """W_k . x [items, photos, grades - 1], exact sums of products of the rounded thresholds and inputs."""
    integers, exponents = fixed_point_thresholds(thresholds)
    # A threshold at a time: a matrix with a few columns is the slower product.
    products = [np.stack([wide @ threshold for threshold in integers], axis=1) for _, wide in _wide(photos)]
    scores = np.concatenate(products).reshape(*photos.exponents.shape, len(thresholds))
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(np.ldexp(scores, photos.exponents[:, :, None] + exponents), dtype=np.float64)


def _residuals(scores: FloatArray, photo_weights: FloatArray, grades: IntArray) -> FloatArray:
    """(sigmoid(score) - t) times the photo's weight in its item [items, photos, grades - 1], number by number."""
    above = grades[:, None] > np.arange(scores.shape[2])
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        # tanh saturates instead of overflowing.
        residuals = 0.5 * (1.0 + np.tanh(0.5 * scores)) - above[:, None, :]
        return np.asarray(residuals * photo_weights[:, :, None], dtype=np.float64)


def _add_products(total: IntArray, clipped: IntArray, photos: FixedPointPhotos) -> None:
    """Add the sum over items and photos of ``clipped`` [items, photos, grades - 1] times the inputs, to ``total``."""
    parts = np.ascontiguousarray(clipped.reshape(-1, len(total)).T, dtype=np.float64)
    for here, wide in _wide(photos):
        for threshold, part in enumerate(parts[:, here]):
            total[threshold] += (part @ wide).astype(np.int64)


def _wide(photos: FixedPointPhotos) -> Iterator[tuple[slice, FloatArray]]:
    """Integers [photos, features] in double precision, a few at a time, in memory that is used again."""
    features = photos.integers.shape[2]
    narrow = photos.integers.reshape(-1, features)
    wide = np.empty((min(_PHOTOS_AT_ONCE, len(narrow)), features))
    for start in range(0, len(narrow), _PHOTOS_AT_ONCE):
        here = slice(start, start + _PHOTOS_AT_ONCE)
        piece = wide[: len(narrow[here])]
        piece[:] = narrow[here]
        yield here, piece


def _clipped(residuals: FloatArray, photos: FixedPointPhotos, max_grad_norm: float) -> IntArray:
    """Integers [items, photos, grades - 1] whose products with the inputs' integers are the items' clipped gradients.

    ``residuals`` [items, photos, grades - 1] are first taken relative to the item's largest, as integers; a clip only
    ever scales them. Those of an item that is not finite become zero.
    """
    exponents = photos.exponents[:, :, None]
    residuals = np.where(np.isfinite(residuals).all(axis=(1, 2), keepdims=True), residuals, 0.0)
    scale = np.frexp(residuals)[1] + exponents
    largest = scale.max(axis=(1, 2), where=residuals != 0.0, initial=_LEAST_EXPONENT)
    shift = exponents + (_RESIDUAL_BITS - largest)[:, None, None]
    with np.errstate(over="ignore", under="ignore"):
        integers = np.rint(np.ldexp(residuals, shift)).astype(np.int64)
        whole = np.ldexp(1.0 / max_grad_norm, TRAIN_GRID_BITS - _RESIDUAL_BITS + largest)
    factors = _clip_factors(integers, photos.products, whole)
    return _on_grid(np.trunc(integers * factors[:, None, None]), photos.products)


def _clip_factors(residuals: IntArray, products: IntArray, whole: FloatArray) -> FloatArray:
    """What items' ``residuals`` [items, photos, grades - 1] are multiplied by: ``whole`` [items], or less for the clip.

    Rounding toward zero afterwards shortens one photo's residuals, but can lengthen the sum over several photos, by no
    more than is taken off here. Photos of one item that cancel to less than a sixteenth are shortened further, for sums
    of them to stay exact.
    """
    lengths = np.sqrt(_squared_lengths(residuals, products).astype(np.float64))
    reach = np.abs(residuals).max(axis=2, initial=0).sum(axis=1)
    photos = np.count_nonzero(residuals.any(axis=2), axis=1)
    rounding = np.where(photos > 1, photos * np.sqrt(residuals.shape[2]) * _LARGEST_INPUT, 0.0)
    limit = (2.0**TRAIN_GRID_BITS - rounding) * _SHRINK
    clip = np.divide(limit, lengths, out=np.full(len(whole), np.inf), where=lengths > 0)
    exact = np.divide(_LARGEST_REACH * _SHRINK, reach, out=np.zeros(len(whole)), where=reach > 0)
    return np.asarray(np.minimum(np.minimum(whole, clip), exact), dtype=np.float64)


def _on_grid(residuals: FloatArray, products: IntArray) -> IntArray:
    """``residuals`` [items, photos, grades - 1] as integers; those of an item that would be too long become zero.

    Guarantee: every item's squared length in the sum is at most 2^80, sensitivity², and what it adds up to without
    signs leaves the sum exact. NaN passes neither check.
    """
    # Number by number first: only then can no integer wrap around and pass for small.
    fits = np.abs(residuals).max(axis=2, initial=0.0).sum(axis=1) <= _LARGEST_REACH
    integers = np.where(fits[:, None, None], residuals, 0.0).astype(np.int64)
    integers[_squared_lengths(integers, products) > 4**TRAIN_GRID_BITS] = 0
    return integers


def _squared_lengths(residuals: IntArray, products: IntArray) -> npt.NDArray[np.object_]:
    """Squared lengths [items] of items' gradients, exactly, as Python's integers: they take 80 bits and more.

    For an item with residuals c_p and inputs x_p, the square of sum_p c_p (x) x_p is sum_pq (c_p . c_q) (x_p . x_q).
    ``products`` [items, photos, photos] holds the x_p . x_q. No residual may be larger than 2^24.
    """
    inner = residuals @ residuals.transpose(0, 2, 1)
    high, low = inner >> _RESIDUAL_WORD, inner & (2**_RESIDUAL_WORD - 1)
    upper, lower = products >> _INPUT_WORD, products & (2**_INPUT_WORD - 1)
    words = (
        (high * upper, _RESIDUAL_WORD + _INPUT_WORD),
        (high * lower, _RESIDUAL_WORD),
        (low * upper, _INPUT_WORD),
        (low * lower, 0),
    )
    squares = sum(word.sum(axis=2).astype(np.object_) * 2**bits for word, bits in words)
    return np.asarray(np.sum(squares, axis=1), dtype=np.object_)
