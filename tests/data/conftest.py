import io
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from nsvq.data import shards, sources


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Nothing is read from or left in the user's data cache, and no data set stays open between tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(shards, "CACHE", tmp_path / "index")
    sources._open.cache_clear()


@pytest.fixture
def png():
    """png(i, width, height) -> the bytes of a picture whose colour tells its number i < 250."""

    def make(i: int, width: int = 9, height: int = 8) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full((height, width, 3), [i, 255 - i, 7], np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture
def write_shard():
    """write_shard(path, [(key, {field: bytes}), ...]) writes a webdataset tar."""

    def write(path, samples):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for key, fields in samples:
                for field, data in fields.items():
                    info = tarfile.TarInfo(f"{key}.{field}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    return write
