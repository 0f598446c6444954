"""Why images do not decode, and which files of a folder are images."""

import io
import json

import numpy as np
import pytest
import tiny_images
from flow_finetune.errors import InputError
from flow_finetune.vision.config import ImageDataConfig
from flow_finetune.vision.data import load_images
from PIL import Image


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


def _folder(root, images, names: dict[int, str]):
    """A folder per class; the image of a number has that number as its name, or the one given."""
    for index, (content, label) in enumerate(zip(*images, strict=True)):
        directory = root / "abc"[label]
        directory.mkdir(parents=True, exist_ok=True)
        (directory / names.get(index, f"{index}.png")).write_bytes(content)
    return str(root)


def test_files_left_out_for_their_ending_are_counted(images, tmp_path, capfd):
    whole = _folder(tmp_path / "whole", images, {})
    (tmp_path / "whole/a/.DS_Store").write_text("")
    assert len(load_images(ImageDataConfig(whole), 16).ids) == 6
    assert "files left out" not in capfd.readouterr().err
    folder = _folder(tmp_path / "folder", images, {0: "0.HEIC", 1: "1.heic", 5: "5"})
    (tmp_path / "folder/b/notes.txt").write_text("")
    assert load_images(ImageDataConfig(folder), 16).ids == ["a/3.png", "b/4.png", "c/2.png"]
    told = capfd.readouterr().err
    assert "files left out for their ending, which is no image's: 4 (2 of .heic, " in told
    assert "1 of none" in told
    assert "1 of .txt" in told


def test_endings_that_this_pillow_reads_are_images(images, tmp_path, monkeypatch, capfd):
    names = {0: "0.jfif", 1: "1.JPE", 2: "2.jp2", 3: "3.avif"}
    for index, kind in ((0, "JPEG"), (1, "JPEG")):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(images[0][index])).save(buffer, kind)
        images[0][index] = buffer.getvalue()
    folder = _folder(tmp_path / "folder", images, names)
    known = dict.fromkeys((".jfif", ".jpe", ".jp2", ".avif"), "JPEG")
    # What the bytes are, Pillow sees for itself; the ending says only that they are an image's.
    monkeypatch.setattr(Image, "registered_extensions", lambda: known)
    assert sorted(load_images(ImageDataConfig(folder), 16).ids) == [
        "a/0.jfif", "a/3.avif", "b/1.JPE", "b/4.png", "c/2.jp2", "c/5.png",
    ]  # fmt: skip
    assert "files left out" not in capfd.readouterr().err
    del known[".avif"]
    assert "a/3.avif" not in load_images(ImageDataConfig(folder), 16).ids
    assert "files left out for their ending, which is no image's: 1 (1 of .avif)" in capfd.readouterr().err
