"""Files are whole or absent."""

import errno
import json
import os
from pathlib import Path

import pytest
from flow_finetune.errors import InputError
from flow_finetune.storage import (
    atomic_path,
    describe_file,
    exclusive,
    exclusive_file,
    fingerprint,
    is_described,
    is_used,
    require_disk_space,
    require_writable,
    write_json,
)


def test_a_file_or_directory_replaces_the_old_one_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"b": 1})
    assert path.read_text() == '{\n "b": 1\n}\n'
    with atomic_path(tmp_path / "d") as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("x")
    with atomic_path(tmp_path / "d") as temporary:
        temporary.mkdir()
        (temporary / "newer").write_text("y")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["newer"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), KeyboardInterrupt()])
def test_nothing_is_left_and_the_old_file_stays_when_writing_fails(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_directory_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/model").write_text("mine")
    with pytest.raises(InputError, match="runs is a directory, which is not replaced by a file"):
        write_json(tmp_path / "runs", {})
    assert (tmp_path / "runs/model").read_text() == "mine"


def test_a_place_that_cannot_be_written_to_is_named_before_anything_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file is a file; .*file/a/b is to be a directory"):
        require_writable(tmp_path / "file/a/b")
    require_writable(tmp_path / "new/a")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="may not be written to"):
        require_writable(tmp_path / "new/a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_errors_keep_their_class(tmp_path):
    with pytest.raises(PermissionError), atomic_path(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")


def test_too_small_a_disk_is_named_even_for_a_path_that_does_not_exist_yet(tmp_path):
    require_disk_space(tmp_path / "a" / "b", 1)
    with pytest.raises(InputError, match="MiB are free"):
        require_disk_space(tmp_path / "a" / "b", 1 << 60)
    require_disk_space(Path("relative") / "path", 1)


def test_what_a_killed_call_had_begun_to_write_does_not_count_as_used(tmp_path):
    assert not is_used(tmp_path / "new")
    (tmp_path / "train").mkdir()
    (tmp_path / ".run.json.partial").write_text("{")
    (tmp_path / "train/.identity.json.partial").write_text("{")
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial/weights").write_text("")
    assert not is_used(tmp_path)
    (tmp_path / "train/notes.partial").write_text("somebody's")
    assert is_used(tmp_path)
    assert is_used(tmp_path / "train/notes.partial")


def test_fingerprints_keep_parts_apart():
    assert fingerprint([b"ab", b"c"]) != fingerprint([b"a", b"bc"])
    assert fingerprint([b"ab"]) == fingerprint([bytearray(b"ab")])


def test_what_is_written_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    """A crash of the machine leaves the old file or the new one, whole: content, then name, then the names beside it."""
    done, sync, replace = [], os.fsync, os.replace

    def note(file):
        done.append(os.readlink(f"/proc/self/fd/{file}").removeprefix(str(tmp_path)))
        sync(file)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    write_json(tmp_path / "a", 1)
    assert done == ["/.a.partial", "replace", ""]
    done.clear()
    with atomic_path(tmp_path / "d") as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("x")
    assert done == ["/.d.partial", "/.d.partial/weights", "replace", ""]


def test_what_lies_beside_a_file_is_not_opened(tmp_path):
    """A link to nothing, as editors leave them, would raise after all was written; a pipe would be waited for."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.#notes.txt").symlink_to("nobody@nowhere:1")
    os.mkfifo(tmp_path / "other/pipe")
    write_json(tmp_path / "a.json", 1)
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_what_a_killed_call_had_begun_is_not_in_what_the_next_writes(tmp_path):
    for name in ("file", "directory"):
        (tmp_path / f".{name}.partial").mkdir()
        (tmp_path / f".{name}.partial/half").write_text("half")
    write_json(tmp_path / "file", 1)
    with atomic_path(tmp_path / "directory") as temporary:
        temporary.mkdir()
    assert (tmp_path / "file").read_text() == "1\n"
    assert not list((tmp_path / "directory").iterdir())


def test_what_is_no_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a", {"loss": float("nan")})
    assert not os.listdir(tmp_path)


def test_a_directory_that_another_process_has_made_is_not_removed(tmp_path, monkeypatch):
    """Both saw that there was none."""
    path = tmp_path / "out"
    with exclusive(path):
        monkeypatch.setattr(Path, "exists", lambda self: False)
        with pytest.raises(InputError, match="another process works in"), exclusive(path):
            pass
        monkeypatch.undo()
        assert path.is_dir()
    assert not path.exists()
    path.mkdir()
    with exclusive(path):
        pass
    assert path.is_dir()


def test_a_link_stays_and_what_it_stands_for_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["new"]


def test_one_process_at_a_time_makes_a_file(tmp_path):
    path = tmp_path / "new" / "scores.parquet"
    lock = path.with_name(".scores.parquet.lock")
    lock.mkdir(parents=True)  # of a process that was killed
    with exclusive_file(path):
        with (
            pytest.raises(InputError, match=r"another process makes .*scores.parquet; wait for it"),
            exclusive_file(path),
        ):
            pass
        assert lock.is_dir()
        # What is made beside it is another's.
        with exclusive_file(path.with_name("other")), exclusive(path.parent):
            pass
    assert not list(path.parent.iterdir())


def test_a_file_is_known_by_its_content_wherever_it_lies(tmp_path):
    path = tmp_path / "a" / "m.gguf"
    path.parent.mkdir()
    path.write_bytes(bytes(1000))
    stored = json.loads(json.dumps(describe_file(path)))
    assert is_described(path, stored)
    copy = tmp_path / "m.gguf"
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(1, 1))
    assert is_described(copy, stored)
    assert not is_described(copy.rename(tmp_path / "n.gguf"), stored)
    path.write_bytes(bytes(999) + b"1")
    os.utime(path, ns=(2, 2))
    assert not is_described(path, stored)
    path.write_bytes(bytes(999))
    assert not is_described(path, stored)
