"""What networks run on: a device, threads, a precision, and as many photos at once as its memory holds.

Torch is imported where it is asked something: a site on the CPU with an exported backbone never waits for it.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from fedgrade.errors import DataRefused, JobRefused
from fedgrade.model.preprocessing import FeatureArray

if TYPE_CHECKING:
    from torch import Tensor

    Network = Callable[[Tensor], Tensor]

logger = logging.getLogger(__name__)

# "auto", "cpu", "cuda" (the first GPU) or "cuda:N", as torch counts them.
Device = str
Precision = Literal["float32", "float16"]

PHOTOS_AT_ONCE: Final = 32
DEVICE: Final = re.compile(r"auto|cpu|cuda(?::(0|[1-9][0-9]{0,2}))?")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What a site gives to networks: a device, and threads where that is the CPU."""

    device: Device
    threads: int

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise JobRefused(f"threads: {self.threads}; at least 1 is needed")
        require_device(self.device)


def require_device(device: Device) -> None:
    """Return if ``device`` is the name of one, here or elsewhere.

    Raises:
        JobRefused: it is none.
    """
    if not DEVICE.fullmatch(device):
        raise JobRefused(f"device: {device[:40]!r} is none; auto, cpu, cuda or cuda:N is expected")


def torch_device(device: Device) -> str:
    """Where torch computes if the site asks for ``device``: ``cpu`` or ``cuda:N``.

    Raises:
        JobRefused: a GPU is asked for and not there; names what there is.
    """
    require_device(device)
    if device == "cpu":
        return "cpu"
    gpus = _gpus()
    if device == "auto":
        return "cuda:0" if gpus else "cpu"
    number = int(device.partition(":")[2] or 0)
    if number < len(gpus):
        return f"cuda:{number}"
    there = ", ".join(["cpu", *(f"cuda:{at} ({name})" for at, name in enumerate(gpus))])
    found = f"torch finds {len(gpus)} GPUs" if gpus else "torch finds no GPU"
    raise JobRefused(f"device: {device!r} is asked for, but {found} here; there is {there}")


def _gpus() -> tuple[str, ...]:
    """The names of the GPUs that torch can use, in its order."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count()))


def arithmetic(device: str, precision: Precision) -> str:
    """In words that caches hang on, what makes numbers of ``device`` others than those of a CPU; empty for a CPU's.

    Of a GPU not which one: two of them differ in last bits, a precision from another in the third digit.
    """
    if device == "cpu" and precision == "float32":
        return ""
    return f"{device.partition(':')[0]}, {precision}, version 1"


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch computes with so many threads until the block ends; more than there are idle cores slow it down greatly."""
    import torch  # noqa: PLC0415

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def enough_memory(device: str) -> Iterator[None]:
    """A network that ``device`` does not hold ends in one line: another device would give other numbers unasked.

    Raises:
        DataRefused: its memory is not enough for what the block does there.
    """
    import torch  # noqa: PLC0415

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        elsewhere = "" if device == "cpu" else "set `device: cpu` in site.yaml, "
        raise DataRefused(
            f"network on {device}: its memory does not hold it; free some, {elsewhere}or ask for a job with a smaller "
            "model or smaller photos"
        ) from error


class Chunks:
    """How many photos a device holds at once: half as many from the moment on at which its memory was not enough.

    Only that changes. Where the numbers would change (another precision, another device), nothing is fallen back on.
    """

    def __init__(self, where: str, *, at_once: int = PHOTOS_AT_ONCE) -> None:
        self._where = where
        self._at_once = at_once

    def each(
        self,
        compute: Callable[[FeatureArray], FeatureArray],
        batch: FeatureArray,
        *,
        exhausted: tuple[type[Exception], ...],
        release: Callable[[], None],
    ) -> list[FeatureArray]:
        """``compute`` of all of ``batch`` [photos, ...], a part after the other.

        Args:
            compute: treats each photo on its own, so that parts give what the whole would.
            batch: whose parts it is given.
            exhausted: what it raises if the memory is not enough.
            release: gives memory back before the next try.

        Raises:
            DataRefused: not even one photo fits.
        """
        parts = list[FeatureArray]()
        start = 0
        while start < len(batch):
            chunk = batch[start : start + self._at_once]
            try:
                part = compute(chunk)
            except exhausted:
                # Nothing else in here: what was raised holds on to memory until this block is left.
                part = None
            if part is not None:
                parts.append(part)
                start += len(chunk)
                continue
            release()
            self._halve(len(chunk))
        return parts

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise DataRefused(
                f"{self._where}: its memory does not hold one photo and the network; free some, or give the site "
                "another device"
            )
        self._at_once = tried // 2
        logger.warning("%s: memory is short; from here on %d photos at once", self._where, self._at_once)


def one_by_one(
    network: "Network",
    batch: FeatureArray,
    *,
    device: str,
    dimensions: int,
    chunks: Chunks,
    precision: Precision = "float32",
) -> FeatureArray:
    """Features [photos, dimensions] of ``batch`` [photos, 3, input, input] by a torch ``network`` on ``device``.

    Guarantee: a photo's features depend on that photo alone: computed one photo at a time, by algorithms that repeat.
    In a batch, last bits would depend on who else is in it. Photos are carried there, and features back, together.
    """
    import torch  # noqa: PLC0415

    def computed(photos: FeatureArray) -> FeatureArray:
        there = torch.from_numpy(photos.copy()).to(device)
        # A copy of its own for each: where an array begins in memory may decide last bits too.
        alone = [network(there[at : at + 1].clone())[0].float() for at in range(len(photos))]
        features: FeatureArray = torch.stack(alone).cpu().numpy()
        return features

    # float32 means float32: by default, convolutions on a GPU round their inputs to 10 bits.
    repeatable = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    mixed = torch.autocast(torch.device(device).type, dtype=torch.float16, enabled=precision == "float16")
    with torch.inference_mode(), repeatable, mixed:
        parts = chunks.each(
            computed, batch, exhausted=(MemoryError, torch.OutOfMemoryError), release=torch.cuda.empty_cache
        )
    return np.concatenate([np.empty((0, dimensions), dtype=np.float32), *parts])
