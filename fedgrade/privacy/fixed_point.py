"""Vectors as integers with an exponent of their own, so that sums of their products are exact in any order.

Block floating point (Wilkinson 1963, "Rounding Errors in Algebraic Processes"). Double precision holds every integer up
to 2^53; a matrix product of integers whose partial sums stay below it is exact, whatever the order, the number of
threads or the other rows in it. Hence what is computed from one item depends on that item alone, to the last bit.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedgrade.errors import ModelRefused

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_PHOTOS = 4096  # of one item, every view counted: sums over them stay below 2^63
# A photo's integers are 2^20 to 2^21 long, so that each is right to a millionth of that. Rounding can pass 2^21, but
# never 2^22.
_LENGTH_BITS = 21
# The length of thresholds; a score's sum of products stays below 2^30 * 2^22.
_THRESHOLD_BITS = 30
_COARSE_BITS = 24  # of a vector's largest entry, where its length is measured in integers
_SQUARE_BITS = 62
_NUMBERS_AT_ONCE = 2**20
_ABSENT = -(2**13)  # below the exponent of any number


@dataclass(frozen=True, kw_only=True)
class FixedPointPhotos:
    """Items' photos in fixed point: sensitive, as the photos are.

    Attributes:
        integers: [items, photos, features], each photo 2^20 to 2^21 long (below 2^22 with rounding); zero where it is
            zero, or the item is not finite. Single precision holds them exactly, in half the memory.
        exponents: [items, photos]; a photo is its integers times two to this power.
        products: [items, photos, photos], inner products of an item's integers, exact.
        finite: [items], whether all numbers of the item were.
    """

    integers: npt.NDArray[np.float32]
    exponents: npt.NDArray[np.int32]
    products: IntArray
    finite: npt.NDArray[np.bool_]

    def __repr__(self) -> str:
        return "FixedPointPhotos(<sensitive>)"

    def take(self, chosen: slice) -> "FixedPointPhotos":
        """The chosen items alone."""
        return FixedPointPhotos(
            integers=self.integers[chosen],
            exponents=self.exponents[chosen],
            products=self.products[chosen],
            finite=self.finite[chosen],
        )

    @classmethod
    def of(cls, inputs: FloatArray) -> "FixedPointPhotos":
        """``inputs`` [items, photos, features], rounded to a millionth of each photo's length or less.

        Guarantee: what is kept of an item depends on that item alone, to the last bit: entries are scaled by powers of
        two and rounded one by one, and lengths are measured in integers.

        Raises:
            ModelRefused: an item has more than ``MAX_PHOTOS`` photos, counting each view as one.
        """
        items, photos, features = inputs.shape
        if photos > MAX_PHOTOS:
            raise ModelRefused(f"item batch: {photos} photos and views of one item; the limit is {MAX_PHOTOS}")
        made = cls(
            integers=np.zeros(inputs.shape, dtype=np.float32),
            exponents=np.full((items, photos), _ABSENT, dtype=np.int32),
            products=np.zeros((items, photos, photos), dtype=np.int64),
            finite=np.zeros(items, dtype=np.bool_),
        )
        at_once = max(1, _NUMBERS_AT_ONCE // max(1, photos * features))
        for start in range(0, items, at_once):
            made._fill(slice(start, start + at_once), inputs)
        return made

    def _fill(self, here: slice, inputs: FloatArray) -> None:
        """Set the items ``here``; in pieces, because memory holds a few copies of each."""
        self.finite[here] = np.isfinite(inputs[here]).all(axis=(1, 2))
        exponents = _exponents(np.where(self.finite[here, None, None], inputs[here], 0.0))
        present = (exponents > _ABSENT)[:, :, None]
        integers = np.rint(np.ldexp(np.where(present, inputs[here], 0.0), -exponents[:, :, None]))
        self.integers[here], self.exponents[here] = integers, exponents
        self.products[here] = (integers @ integers.transpose(0, 2, 1)).astype(np.int64)


def fixed_point_thresholds(thresholds: FloatArray) -> tuple[FloatArray, npt.NDArray[np.int32]]:
    """``thresholds`` [grades - 1, features] as integers less than 2^30 long, and the exponents [grades - 1] of them.

    Public numbers: nothing but accuracy rests on how they are rounded, and 24 bits of the largest are plenty. A row
    that is not finite becomes NaN.
    """
    bits = _THRESHOLD_BITS - (thresholds.shape[1].bit_length() + 1) // 2
    finite = np.isfinite(thresholds).all(axis=1, keepdims=True)
    kept = np.where(finite, thresholds, 0.0)
    exponents = np.asarray(np.frexp(np.abs(kept).max(axis=1, initial=0.0))[1] - bits, dtype=np.int32)
    return np.where(finite, np.rint(np.ldexp(kept, -exponents[:, None])), np.nan), exponents


def _exponents(vectors: FloatArray) -> npt.NDArray[np.int32]:
    """Exponents [items, photos] that leave ``vectors`` [items, photos, features] 2^20 to 2^21 long."""
    bits = min(_COARSE_BITS, (_SQUARE_BITS - vectors.shape[2].bit_length()) // 2)
    largest = np.frexp(np.abs(vectors).max(axis=2, initial=0.0))[1]
    coarse = np.rint(np.ldexp(vectors, (bits - largest)[:, :, None])).astype(np.int64)
    squares = np.einsum("ipf,ipf->ip", coarse, coarse)  # integers: exact, and below 2^62
    length = (np.frexp(squares.astype(np.float64))[1] + 1) // 2
    return np.where(squares > 0, length + largest - bits - _LENGTH_BITS, _ABSENT).astype(np.int32)
