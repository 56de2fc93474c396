import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def run_script(monkeypatch):
    """Call a script's `main` in this process with arguments, as one rank of its own."""

    def run(main, *arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        main()

    return run
