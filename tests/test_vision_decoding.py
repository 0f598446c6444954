"""Why images do not decode, and which files of a folder are images."""

import json

import numpy as np
import pytest
import tiny_images
from flow_finetune.errors import InputError
from flow_finetune.vision.config import ImageDataConfig
from flow_finetune.vision.data import load_images


@pytest.fixture
def images():
    return tiny_images.make_images(6, 3, 10, 0)


def _damaged(path, images, damage: dict):
    """The images, some of which are other bytes."""
    encoded, labels = images
    return str(tiny_images.write_parquet(path, [damage.get(i, content) for i, content in enumerate(encoded)], labels))


def test_the_first_image_that_does_not_decode_says_why(images, tmp_path, capfd):
    cut, page = images[0][2][:60], b"<html>404</html>"
    for number, (damage, reason) in enumerate((
        ({2: cut, 4: page}, "2, 4; why 2 does not: OSError: image file is truncated"),
        ({2: page, 4: cut}, "2, 4; why 2 does not: UnidentifiedImageError: cannot identify image file;"),
    )):  # fmt: skip
        path = _damaged(tmp_path / f"{number}.parquet", images, damage)
        # Decoded, and from a cache as it is filled and as it is read.
        for options in ({}, {"cache": str(tmp_path / "cache")}, {"cache": str(tmp_path / "cache")}):
            with pytest.raises(InputError) as stopped:
                load_images(ImageDataConfig(path, **options), 16)
            assert f"2 of 6 images do not decode, the first: {reason}" in str(stopped.value)
        assert load_images(ImageDataConfig(path, bad_images="skip"), 16).num_bad == 2
        assert reason in capfd.readouterr().err
    path = _damaged(tmp_path / "none.parquet", images, {})
    assert load_images(ImageDataConfig(path, cache=str(tmp_path / "cache")), 16).num_bad == 0


def test_a_cache_of_before_reasons_were_kept_is_read(images, tmp_path):
    path = _damaged(tmp_path / "a.parquet", images, {2: b"<html>404</html>"})
    config = ImageDataConfig(path, cache=str(tmp_path / "cache"), bad_images="skip")
    first = load_images(config, 16)
    (kept,) = (tmp_path / "cache").glob("*.json")
    assert json.loads(kept.read_text())["indices"] == [2]
    kept.write_text("[2]")
    second = load_images(config, 16)
    assert (second.ids, second.fingerprint) == (first.ids, first.fingerprint)
    assert np.array_equal(second.pixels, first.pixels)
    with pytest.raises(InputError, match="1 of 6 images do not decode, the first: 2; mend or remove them"):
        load_images(ImageDataConfig(path, cache=str(tmp_path / "cache")), 16)
