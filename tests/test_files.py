import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from nsvq.files import atomic_file, atomic_folder


def everything(root):
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def fail(part, failure):
    part.write_text("half")
    raise failure


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "result.json"
    for failure in (OSError, KeyboardInterrupt):
        with pytest.raises(failure), atomic_file(path) as part:
            fail(part, failure)
        assert everything(tmp_path) == {}
    with atomic_file(path) as part:
        part.write_text("old")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), atomic_file(path) as part:
        fail(part, OSError("full"))
    assert everything(tmp_path) == {"new/result.json": "old"}
    with atomic_file(path, shared=True) as mine, atomic_file(path) as part:
        assert str(os.getpid()) in mine.name
        mine.write_text("mine")
        part.write_text("new")
    assert everything(tmp_path) == {"new/result.json": "mine"}


def test_a_folder_has_its_name_only_when_it_is_whole_and_holds_nothing_of_the_one_before(tmp_path):
    target = tmp_path / "runs" / "tokenizer"
    with atomic_folder(target) as part:
        (part / "old").write_text("old")
    (tmp_path / "runs" / ".tokenizer.part").mkdir()  # what a kill leaves
    (tmp_path / "runs" / ".tokenizer.part" / "left").write_text("over")
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as part:
        fail(part / "half", KeyboardInterrupt)
    assert everything(tmp_path) == {"runs/tokenizer/old": "old"}
    with atomic_folder(target) as part:
        (part / "deep").mkdir()
        (part / "deep" / "new").write_text("new")
        assert everything(target) == {"old": "old"}
    assert everything(tmp_path) == {"runs/tokenizer/deep/new": "new"}
    assert [path.name for path in target.parent.iterdir()] == ["tokenizer"]


@pytest.fixture
def umask():
    """umask(mask) sets it for the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "plain"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_every_library_have_the_mode_that_the_umask_gives(tmp_path, umask, mask, plain):
    umask(mask)
    tensors = {"a": torch.zeros(2)}
    with atomic_file(tmp_path / "shard.safetensors") as part:
        save_file(tensors, part)
    with atomic_folder(tmp_path / "tokenizer") as folder:
        (folder / "deep").mkdir()
        save_file(tensors, folder / "deep" / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / "run.sh").touch(0o700)
        (folder / "wide").touch()
        (folder / "wide").chmod(0o666)
    for name in ("shard.safetensors", "tokenizer/deep/model.safetensors", "tokenizer/config.json"):
        assert mode(tmp_path / name) == plain
    assert mode(tmp_path / "tokenizer" / "run.sh") == 0o700 | plain
    assert mode(tmp_path / "tokenizer" / "wide") == 0o666


def test_a_file_left_to_its_owner_by_a_kill_does_not_hand_that_on(tmp_path, umask):
    (tmp_path / ".shard.safetensors.part").touch(0o600)
    with atomic_file(tmp_path / "shard.safetensors") as part:
        save_file({"a": torch.zeros(2)}, part)
    assert mode(tmp_path / "shard.safetensors") == 0o644


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power loss it would be there, and empty."""
    path, synced, real = tmp_path / "manifest.json", [], os.fsync

    def fsync(handle):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), path.exists(), os.fstat(handle).st_size))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_file(path) as part:
        part.write_text("whole")
    assert synced == [(str(part), False, 5)]
