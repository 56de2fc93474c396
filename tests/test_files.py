import os

import pytest

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
