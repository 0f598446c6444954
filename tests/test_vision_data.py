"""Labelled images: folders, Parquet and the hub agree, bytes are decoded once, and what is no image is counted."""

import dataclasses
import io
import os
import struct
import threading
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_images
from flow_finetune.errors import InputError
from flow_finetune.storage import exclusive
from flow_finetune.vision import decoding
from flow_finetune.vision.config import ImageDataConfig
from flow_finetune.vision.data import align_labels, load_images
from PIL import Image, ImageOps

NAMES = ("ant", "bee", "cat")


@pytest.fixture
def images():
    return tiny_images.make_images(12, 3, 10, 0)


def _folder(root, encoded, labels):
    for index, (content, label) in enumerate(zip(encoded, labels, strict=True)):
        (root / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (root / NAMES[label] / f"{index:03d}.png").write_bytes(content)
    (root / "bee/notes.txt").write_text("no image")
    return root


def test_folder_parquet_and_hub_agree(images, tmp_path, monkeypatch):
    encoded, labels = images
    folder = load_images(ImageDataConfig(str(_folder(tmp_path / "folder", encoded, labels))), 32)
    assert folder.class_names == NAMES
    assert folder.ids[0] == "ant/000.png"
    # A folder is in the order of its classes.
    order = np.argsort(labels, kind="stable")
    numbers = load_images(ImageDataConfig(str(tiny_images.write_parquet(tmp_path / "n.parquet", encoded, labels))), 32)
    words = [NAMES[label] for label in labels]
    named = load_images(ImageDataConfig(str(tiny_images.write_parquet(tmp_path / "w.parquet", encoded, words))), 32)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    rows = {"image": [{"bytes": content, "path": None} for content in encoded], "label": labels}
    hub = datasets.Dataset.from_dict(rows, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: hub)
    from_hub = load_images(ImageDataConfig("someone/images"), 32)
    # Squares of one side are kept as they are, to be enlarged on the device.
    assert numbers.pixels.shape == (12, 10, 10, 3)
    for other in (named, from_hub):
        assert np.array_equal(other.pixels, numbers.pixels)
        assert other.class_names == NAMES
    assert numbers.class_names is None
    assert np.array_equal(folder.pixels, numbers.pixels[order])
    for found in (numbers, named, from_hub):
        assert found.labels.tolist() == labels
    assert folder.labels.tolist() == sorted(labels)


def test_images_of_several_sizes_are_cropped_to_the_wanted_one(tmp_path):
    wide, tall = tiny_images.make_images(2, 2, 40, 0)[0], tiny_images.make_images(1, 1, 24, 1)[0]
    path = tiny_images.write_parquet(tmp_path / "a.parquet", wide + tall, [0, 1, 0])
    found = load_images(ImageDataConfig(str(path)), 16)
    assert found.pixels.shape == (3, 16, 16, 3)
    half = load_images(ImageDataConfig(str(path), crop=0.5), 16)
    assert not np.array_equal(half.pixels, found.pixels)
    means = found.pixels.mean((1, 2))
    # Noise of standard deviation 50 over 1600 pixels: the colour of the class within 5 standard errors.
    np.testing.assert_allclose(half.pixels[:2].mean((1, 2)), means[:2], atol=13)


def test_an_image_that_does_not_decode_stops_or_is_counted(images, tmp_path, capsys):
    encoded, labels = images
    damaged = [*encoded]
    damaged[2], damaged[7] = encoded[2][: len(encoded[2]) // 2], b"<html>404</html>"
    path = tiny_images.write_parquet(tmp_path / "damaged.parquet", damaged, labels)
    with pytest.raises(InputError, match=r"2 of 12 images do not decode, the first: 2, 7; .* bad_images: skip"):
        load_images(ImageDataConfig(str(path)), 16)
    found = load_images(ImageDataConfig(str(path), bad_images="skip"), 16)
    assert "2 of 12 images do not decode" in capsys.readouterr().err
    assert found.num_bad == 2
    assert found.ids == [str(i) for i in range(12) if i not in (2, 7)]
    whole = load_images(ImageDataConfig(str(tiny_images.write_parquet(tmp_path / "w.parquet", encoded, labels))), 16)
    kept = [i for i in range(12) if i not in (2, 7)]
    assert np.array_equal(found.pixels, whole.pixels[kept])
    assert found.labels.tolist() == [labels[i] for i in kept]
    nothing = tiny_images.write_parquet(tmp_path / "none.parquet", [b"", b"x"], [0, 1])
    with pytest.raises(InputError, match="none is left"):
        load_images(ImageDataConfig(str(nothing), bad_images="skip"), 16)


def test_a_cache_is_decoded_once_and_mapped(images, tmp_path, monkeypatch):
    path = tiny_images.write_parquet(tmp_path / "a.parquet", *images)
    config = ImageDataConfig(str(path), cache=str(tmp_path / "cache"))
    first = load_images(config, 16)
    assert isinstance(first.pixels, np.memmap)
    monkeypatch.setattr(decoding, "_decode_into", None)
    second = load_images(config, 16)
    assert second.fingerprint == first.fingerprint == _uncached(path, monkeypatch)


def _uncached(path, monkeypatch):
    monkeypatch.undo()
    return load_images(ImageDataConfig(str(path)), 16).fingerprint


def test_parts_are_disjoint_and_together_everything(images, tmp_path):
    path = str(tiny_images.write_parquet(tmp_path / "a.parquet", *images))
    parts = [load_images(ImageDataConfig(path, part=part, holdout=0.25), 16) for part in ("train", "validation")]
    assert [len(part.ids) for part in parts] == [9, 3]
    assert {id for part in parts for id in part.ids} == {str(i) for i in range(12)}
    assert load_images(ImageDataConfig(path, limit=4), 16).ids == ["0", "1", "2", "3"]


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_parts_do_not_depend_on_a_limit(images, tmp_path, source, limit):
    if source == "folder":
        path = tmp_path / "folder"
        for index, (content, label) in enumerate(zip(*images, strict=True)):
            (path / NAMES[label]).mkdir(parents=True, exist_ok=True)
            (path / NAMES[label] / f"{index}.png").write_bytes(content)
    else:
        path = tiny_images.write_parquet(tmp_path / "a.parquet", *images)
    held_out = load_images(ImageDataConfig(str(path), part="validation", holdout=0.5), 16).ids
    assert len(held_out) == 6
    limited = load_images(ImageDataConfig(str(path), part="validation", holdout=0.5, limit=limit), 16)
    assert set(limited.ids) <= set(held_out)
    trained = load_images(ImageDataConfig(str(path), part="train", holdout=0.5, limit=limit), 16)
    assert not set(trained.ids) & set(held_out)
    if limit and source == "folder":
        # Of three classes none is left out.
        assert len(set(trained.labels.tolist())) == 3


def test_labels_are_matched_by_name(images, tmp_path):
    encoded, labels = images
    words = [NAMES[label] for label in labels]
    found = load_images(ImageDataConfig(str(tiny_images.write_parquet(tmp_path / "w.parquet", encoded, words))), 16)
    assert align_labels(found, ("cat", "dog", "bee", "ant"), 4).tolist() == [(3, 2, 0)[label] for label in labels]
    with pytest.raises(InputError, match="has the class 'cat', which the model was not trained on"):
        align_labels(found, ("ant", "bee"), 2)
    with pytest.raises(InputError, match="3 classes by name, the model 5 without names"):
        align_labels(found, None, 5)
    numbers = load_images(ImageDataConfig(str(tiny_images.write_parquet(tmp_path / "n.parquet", encoded, labels))), 16)
    with pytest.raises(InputError, match="image 2 has label 2, but the model has 2 classes, 0 to 1"):
        align_labels(numbers, None, 2)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, -1], {}, "image 1 has the label -1"),
        ([0.5, 1.0], {}, "image 0 has the label 0.5"),
        ([0, 1], {"label_field": "wnid"}, "has no column 'wnid'; it has image, label"),
        ([0, 0], {"id_field": "label"}, "ids are repeated"),
    ],
)
def test_bad_columns_are_named(images, tmp_path, labels, options, message):
    path = tiny_images.write_parquet(tmp_path / "a.parquet", images[0][:2], labels)
    with pytest.raises(InputError, match=message):
        load_images(ImageDataConfig(str(path), **options), 16)


def test_sources_that_hold_no_images_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no Parquet")
    for source, message in (("empty", "has no folder per class"), ("text.parquet", "is not a Parquet file"),
                            ("a.jsonl", "neither a folder with a folder per class nor a .parquet file")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_images(ImageDataConfig(str(tmp_path / source)), 16)


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    encoded, _ = tiny_images.make_images(12, 1, 10, 0)
    for number, content in enumerate(encoded):
        (tmp_path / "folder" / str(number)).mkdir(parents=True)
        (tmp_path / "folder" / str(number) / "a.png").write_bytes(content)
    found = load_images(ImageDataConfig(str(tmp_path / "folder")), 10)
    assert found.class_names == tuple(map(str, range(12)))
    # A model without class names takes them as they are numbered.
    assert align_labels(found, None, 12).tolist() == [int(id.split("/")[0]) for id in found.ids]
    words = [str(i) for i in (10, 9, 2, 0)]
    path = tiny_images.write_parquet(tmp_path / "w.parquet", encoded[:4], words)
    assert load_images(ImageDataConfig(str(path)), 10).class_names == ("0", "2", "9", "10")


def test_an_image_too_large_to_be_one_is_counted_as_any_other(images, tmp_path, monkeypatch):
    from PIL import Image

    path = tiny_images.write_parquet(tmp_path / "a.parquet", *images)
    # Twice the limit is an error of Pillow's own, and not a warning any more.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(InputError, match="12 of 12 images do not decode"):
        load_images(ImageDataConfig(str(path)), 16)


def test_a_file_that_is_gone_is_counted_with_a_cache_too(images, tmp_path, monkeypatch):
    encoded, labels = images
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {
        "image": [{"bytes": content, "path": None} for content in encoded[:-1]] + [{"bytes": None, "path": "/gone"}]
    }
    hub = datasets.Dataset.from_dict({**rows, "label": labels}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: hub)
    with pytest.raises(InputError, match="1 of 12 images do not decode, the first: 11"):
        load_images(ImageDataConfig("someone/images", cache=str(tmp_path / "cache")), 16)


def _encoded(array, mode=None, **options):
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, "JPEG" if options else "PNG", **options)
    return buffer.getvalue()


def test_16_bits_are_reduced_to_8(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    path = tiny_images.write_parquet(tmp_path / "a.parquet", [_encoded(ramp)] * 2, [0, 1])
    found = load_images(ImageDataConfig(str(path)), 16).pixels
    assert np.array_equal(found[0], np.repeat((ramp // 257).astype(np.uint8)[..., None], 3, -1))
    assert found.max() == 255
    assert len(np.unique(found)) > 200


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_do_not_decode(tmp_path, mode):
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).convert(mode).save(buffer, "TIFF")
    path = tiny_images.write_parquet(tmp_path / "a.parquet", [buffer.getvalue()] * 2, [0, 1])
    with pytest.raises(InputError, match="2 of 2 images do not decode"):
        load_images(ImageDataConfig(str(path)), 16)


@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_pillow_turns_them(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = _encoded(pixels, exif=exif, quality=95)
    path = tiny_images.write_parquet(tmp_path / "a.parquet", [content] * 2, [0, 1])
    found = load_images(ImageDataConfig(str(path)), 32).pixels[0]
    assert np.array_equal(found, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")))


def test_a_damaged_exif_block_does_not_spoil_an_image(tmp_path):
    """What is wrong with it is another entry than the orientation; Pillow's own turning raises as it writes it back."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    front = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01"
    turned = b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    blocks = [front + b"J\0\x02\0\0\0\x06\0\0\0&" + turned + b"\x80\0\0\0maker\0",
              front + b"\x1f\0\x02\0\0\0\x06\0\0\0&" + turned + b"\0\0\0\0\xaaaker\0"]  # fmt: skip
    encoded = [_encoded(pixels, exif=block, quality=95) for block in blocks]
    for content in encoded:
        with pytest.raises((struct.error, TypeError)):
            ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    path = tiny_images.write_parquet(tmp_path / "a.parquet", encoded, [0, 1])
    found = load_images(ImageDataConfig(str(path)), 32)
    assert found.num_bad == 0
    plain = np.asarray(Image.open(io.BytesIO(encoded[0])))
    assert np.array_equal(found.pixels, np.stack([np.rot90(plain, -1)] * 2))


def test_pixels_that_are_damaged_do_not_decode(tmp_path):
    """Of a PNG they are read for its EXIF block."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    good = _encoded(pixels)
    bad = bytearray(good)
    bad[good.index(b"IDAT") + 60] ^= 0xFF
    path = tiny_images.write_parquet(tmp_path / "a.parquet", [good, bytes(bad)], [0, 1])
    with pytest.raises(InputError, match="1 of 2 images do not decode, the first: 1"):
        load_images(ImageDataConfig(str(path)), 16)


def test_images_are_turned_upright(tmp_path):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :12] = 255  # seen with orientation 6, which turns clockwise, the left is at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tiny_images.write_parquet(tmp_path / "a.parquet", [_encoded(pixels, exif=exif, quality=95)] * 2, [0, 1])
    found = load_images(ImageDataConfig(str(path)), 16).pixels[0].astype(int)
    assert found[:6].min() > 240
    assert found[-6:].max() < 15


def test_a_limit_takes_all_classes_of_a_folder_alike(images, tmp_path):
    folder = _folder(tmp_path / "folder", *images)
    found = load_images(ImageDataConfig(str(folder), limit=7), 32)
    assert np.bincount(found.labels).tolist() == [3, 2, 2]
    whole = load_images(ImageDataConfig(str(folder)), 32)
    assert {id: label for id, label in zip(found.ids, found.labels.tolist(), strict=True)}.items() <= {
        id: label for id, label in zip(whole.ids, whole.labels.tolist(), strict=True)
    }.items()
    assert whole.ids == sorted(whole.ids)  # without one, in the order of the folders


def test_a_folder_of_splits_is_not_taken_for_classes(images, tmp_path):
    for split in ("train", "test"):
        _folder(tmp_path / "pets" / split, *images)
    with pytest.raises(InputError, match=r"has a folder per split \(test, train\), not one per class; .*pets/train"):
        load_images(ImageDataConfig(str(tmp_path / "pets")), 32)
    assert load_images(ImageDataConfig(str(tmp_path / "pets/train")), 32).class_names == NAMES


def test_a_column_of_paths_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "label": [0, 1]}), path)
    with pytest.raises(InputError, match="'image' holds text, not encoded bytes"):
        load_images(ImageDataConfig(str(path)), 16)


def test_names_on_one_side_alone_are_told(images, tmp_path, capfd):
    encoded, labels = images
    numbers = load_images(ImageDataConfig(str(tiny_images.write_parquet(tmp_path / "n.parquet", encoded, labels))), 16)
    assert align_labels(numbers, NAMES, 3).tolist() == labels
    told = " ".join(capfd.readouterr().err.split())
    assert "has classes by number, the model by name: 0 is taken for ant, 1 for bee and so on" in told
    folder = load_images(ImageDataConfig(str(_folder(tmp_path / "folder", encoded, labels))), 16)
    assert align_labels(folder, None, 3).tolist() == sorted(labels)
    assert "has classes by name, the model by number: 0 is taken for ant" in " ".join(capfd.readouterr().err.split())
    align_labels(folder, NAMES, 3), align_labels(numbers, None, 3)
    assert "is taken for" not in capfd.readouterr().err


def test_a_decoder_of_its_own_kind_of_error_is_counted(images, tmp_path, monkeypatch):
    """Pillow's AVIF raises RuntimeError, its DDS NotImplementedError."""
    path = tiny_images.write_parquet(tmp_path / "a.parquet", *images)
    opened, failing = Image.open, {images[0][1]: RuntimeError, images[0][4]: NotImplementedError}

    def open_or_fail(file, *arguments, **options):
        if file.getvalue() in failing:
            raise failing[file.getvalue()]("Failed to decode image: Missing or empty image item")
        return opened(file, *arguments, **options)

    monkeypatch.setattr(Image, "open", open_or_fail)
    with pytest.raises(InputError, match="2 of 12 images do not decode, the first: 1, 4"):
        load_images(ImageDataConfig(str(path)), 10)


def test_a_file_name_that_is_no_text_has_an_id(images, tmp_path):
    folder = _folder(tmp_path / "folder", *images)
    os.rename(folder / "ant/000.png", os.fsencode(folder) + b"/ant/\xff.png")
    found = load_images(ImageDataConfig(str(folder)), 16)
    assert "ant/\\xff.png" in found.ids
    assert "\n".join(found.ids).encode()


def test_numbers_with_zeros_before_them_have_an_order(images, tmp_path):
    orders = []
    for names in (["01", "1", "2"], ["2", "1", "01"]):
        path = tiny_images.write_parquet(tmp_path / "a.parquet", images[0][:3], names)
        orders.append(load_images(ImageDataConfig(str(path)), 16).class_names)
    assert orders == [("01", "1", "2")] * 2


def test_a_cache_that_another_process_fills_is_waited_for(images, tmp_path):
    path = tiny_images.write_parquet(tmp_path / "a.parquet", *images)
    config, done = ImageDataConfig(str(path), cache=str(tmp_path / "cache")), []
    load_images(config, 16)
    (stored,) = (tmp_path / "cache").glob("*.npy")
    for file in list((tmp_path / "cache").iterdir()):
        file.unlink()
    with exclusive(tmp_path / "cache" / f".{stored.name}.lock"):
        thread = threading.Thread(target=lambda: done.append(load_images(config, 16)))
        thread.start()
        time.sleep(0.5)
        assert not done
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    thread.join(60)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".npy"]
    # A run may keep its cache in its own directory, which it has locked.
    with exclusive(tmp_path / "run"):
        load_images(dataclasses.replace(config, cache=str(tmp_path / "run")), 16)
    assert done[0].fingerprint == load_images(ImageDataConfig(str(path)), 16).fingerprint


def test_a_cache_whose_pixels_were_deleted_is_filled_again(images, tmp_path):
    path = tiny_images.write_parquet(tmp_path / "a.parquet", *images)
    config = ImageDataConfig(str(path), cache=str(tmp_path / "cache"))
    first = load_images(config, 16)
    (stored,) = (tmp_path / "cache").glob("*.npy")
    stored.unlink()
    assert load_images(config, 16).fingerprint == first.fingerprint
    assert stored.is_file()
