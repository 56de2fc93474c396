import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from nsvq.common import checkpoints
from nsvq.errors import UserError


def write(root, step, value=1.0):
    checkpoints.write(
        root / f"step-{step}", {"net": {"w": torch.full((64,), value)}}, {"step": step}, {"config": {"rate": 1}}
    )


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_what_was_written_is_read_and_described(tmp_path):
    write(tmp_path, 3, value=2.5)
    folder, manifest, damaged = checkpoints.newest_good(tmp_path)
    weights, state = checkpoints.read(folder)
    assert weights["net"]["w"].tolist() == [2.5] * 64
    assert (state, manifest["config"], damaged) == ({"step": 3}, {"rate": 1}, [])
    assert set(manifest["files"]) == {"net.safetensors", "state.pt"} == set(names(folder)) - {"manifest.json"}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def turn_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, turn_a_bit, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["net.safetensors", "state.pt", "manifest.json"])
def test_a_torn_or_tampered_checkpoint_is_set_aside_and_the_one_before_it_is_taken(tmp_path, damage, name):
    for step in (9, 10):
        write(tmp_path, step)
    if (name, damage) == ("manifest.json", turn_a_bit):
        damage = cut
    damage(tmp_path / "step-10" / name)
    folder, _, lines = checkpoints.newest_good(tmp_path)
    assert folder.name == "step-9"
    assert len(lines) == 1
    assert lines[0].startswith("step-10 is damaged: ")
    assert name in lines[0]
    assert names(tmp_path) == ["damaged-10", "step-9"]


def test_a_file_that_was_not_written_makes_a_checkpoint_damaged(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "step-2" / "net_1.safetensors").write_bytes(b"more")
    assert checkpoints.newest_good(tmp_path)[0].name == "step-1"


def test_only_damaged_checkpoints_end_the_run_instead_of_starting_over(tmp_path):
    assert checkpoints.newest_good(tmp_path) is None
    write(tmp_path, 1)
    cut(tmp_path / "step-1" / "state.pt")
    with pytest.raises(UserError, match=r"step-1 is damaged: state\.pt .*delete that folder to start over"):
        checkpoints.newest_good(tmp_path)
    assert names(tmp_path) == ["step-1"]


def test_a_checkpoint_outside_the_folder_is_refused(tmp_path):
    here, elsewhere = tmp_path / "run", tmp_path / "other"
    write(here, 1)
    write(elsewhere, 2)
    (here / "step-2").symlink_to(elsewhere / "step-2")
    with pytest.raises(UserError, match="outside the run's folder"):
        checkpoints.newest_good(here)
    (here / "step-2").unlink()
    write(here, 2)
    (here / "step-2" / "state.pt").unlink()
    (here / "step-2" / "state.pt").symlink_to(elsewhere / "step-2" / "state.pt")
    assert checkpoints.newest_good(here)[0].name == "step-1"


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda payload, path: path.write_bytes(pickle.dumps(payload))])
def test_no_code_runs_even_from_a_checkpoint_with_a_forged_manifest(tmp_path, save):
    root, trap = tmp_path / "run", tmp_path / "executed"
    write(root, 1)
    path = root / "step-1" / "state.pt"
    save({"step": Payload(trap)} if save is torch.save else Payload(trap), path)
    manifest = json.loads((root / "step-1" / "manifest.json").read_text())
    manifest["files"]["state.pt"] = checkpoints._digest(path)
    (root / "step-1" / "manifest.json").write_text(json.dumps(manifest))
    folder, _, damaged = checkpoints.newest_good(root)
    assert not damaged
    with pytest.raises(UserError, match="holds more than tensors and plain values"):
        checkpoints.read(folder)
    assert not trap.exists()


def test_the_newest_stay_and_those_at_intervals(tmp_path):
    for step in (5, 10, 15, 20, 25):
        write(tmp_path, step)
    checkpoints.prune(tmp_path, keep=2, keep_every=10)
    assert names(tmp_path) == ["step-10", "step-20", "step-25"]
    checkpoints.prune(tmp_path, keep=1, keep_every=None)
    assert names(tmp_path) == ["step-25"]


def test_a_disk_that_fills_leaves_the_older_checkpoint_whole_and_no_part_of_the_new_one(small_disk):
    write(small_disk, 1)
    for weights, state in (({"net": {"w": torch.zeros(2**19)}}, {}), ({}, {"w": torch.zeros(2**19)})):
        with pytest.raises(OSError, match=r"No space left|file write failed|unexpected pos"):
            checkpoints.write(small_disk / "step-2", weights, state, {})
        assert names(small_disk) == ["step-1"]
        assert checkpoints.newest_good(small_disk)[0].name == "step-1"
    write(small_disk, 2)
    assert checkpoints.newest_good(small_disk)[0].name == "step-2"
