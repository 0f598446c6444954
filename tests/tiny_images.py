"""A classifier with batch-norms of a few thousand parameters, and images of three classes that it can tell apart."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

NUM_SOURCE_CLASSES = 5
NUM_IMAGES = 40  # of the training set
SIZE = 16  # pixels a side that the classifier sees


def build_classifier(directory: Path) -> Path:
    """A transformers ResNet with 5 classes, its batch-norm statistics not those of initialisation."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=NUM_SOURCE_CLASSES
    )
    model = ResNetForImageClassification(config)
    model.train()
    with torch.no_grad():
        for _ in range(8):
            model(torch.randn(16, 3, 16, 16))
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(
        '{"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    return directory


def make_images(num_images: int, num_classes: int, side: int, seed: int) -> tuple[list[bytes], list[int]]:
    """PNG bytes of noise around a colour that belongs to the class, and the classes in turn."""
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(7).uniform(60, 200, (num_classes, 3))
    labels = [i % num_classes for i in range(num_images)]
    encoded = []
    for label in labels:
        pixels = np.clip(colours[label] + rng.normal(0, 50, (side, side, 3)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded, labels


def write_parquet(path: Path, images: list[bytes], labels: list) -> Path:
    """The columns of the data card."""
    pq.write_table(pa.table({"image": pa.array(images, pa.binary()), "label": labels}), path)
    return path
