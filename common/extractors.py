"""Networks that a Python file registers with torch-fidelity: judges of eval/, and teachers of tokenizer/."""

import functools
import http.client
import importlib.util
import sys
from pathlib import Path

from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from nsvq.errors import UsageError, UserError

# What building a network raises that is not a fault of its code: no file, no network, weights of another shape.
BUILD_ERRORS = (OSError, RuntimeError, ValueError, NotImplementedError, http.client.HTTPException)


@functools.cache
def register_file(path: Path) -> str:
    """The name that the file registers; it runs once a process. Raises `UsageError` where it does not load, and where
    there is not exactly one new name in the registry afterwards."""
    before = set(FEATURE_EXTRACTORS_REGISTRY)
    spec = importlib.util.spec_from_file_location(f"features_from_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import would, so that the file may define dataclasses
    try:
        spec.loader.exec_module(module)
    except (OSError, ImportError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path}: the file does not load: {type(error).__name__}: {error}") from error
    new = sorted(set(FEATURE_EXTRACTORS_REGISTRY) - before)
    if len(new) != 1:
        what = "exactly one new extractor (torch_fidelity.register_feature_extractor)"
        raise UsageError(f"{path}: the file must register {what}, it registered {', '.join(new) or 'none'}")
    return new[0]


def build_registered(name: str, layers: list[str]) -> FeatureExtractorBase:
    """The network that a file registered as `name`, with its own weights, on the CPU; it gives `layers`. Raises
    `UserError` where it cannot be built."""
    try:
        return create_feature_extractor(name, layers, cuda=False, verbose=False)
    except BUILD_ERRORS as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"the extractor {name} cannot be built ({cause})") from None
