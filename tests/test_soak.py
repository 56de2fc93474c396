import pytest
import soak

import nsvq.autoregressive.train
import nsvq.diffusion.train
import nsvq.tokenizer.train

TRAINERS = [nsvq.tokenizer.train, nsvq.diffusion.train, nsvq.autoregressive.train]


@pytest.mark.parametrize("train", TRAINERS, ids=["tokenizer", "diffusion", "autoregressive"])
def test_a_run_that_is_killed_twice_equals_an_undisturbed_one(train, run_instrumented, tmp_path):
    """The short form of `make soak`."""
    stage = train.__name__.split(".")[1]
    arguments = soak.prepare(tmp_path)[stage]
    whole = soak.whole_run(stage, tmp_path)
    run_instrumented(train, *arguments, "--out", whole, record=f"{whole}-record")
    soak.disturb(stage, arguments, tmp_path, kills=2)
