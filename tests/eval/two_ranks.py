"""torchrun two_ranks.py FOLDER: evaluations of FOLDER/cases.json, as one rank of two, to FOLDER/RANK.json."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from fakes import FakePipeline

from nsvq.errors import UserError
from nsvq.eval import generation, probe, reconstruction
from nsvq.eval.distributed import build_in_turn, gather_by_index
from nsvq.eval.given_images import given_images


def run(which, options, accelerator):
    if which == "reconstruction":
        return reconstruction.evaluate(reconstruction.ReconstructionConfig(**options), accelerator)
    if which == "probe":
        return probe.evaluate(probe.ProbeConfig(**options), accelerator)
    config = generation.GenerationConfig(**options)
    source = given_images(config.images) if config.images else FakePipeline()
    return generation.evaluate(source, config, accelerator)


def count_twice(accelerator):
    try:
        return str(gather_by_index(accelerator, [{"index": torch.tensor([7])}]))
    except RuntimeError as error:
        return str(error)


def fail_on_the_first(accelerator):
    """What each rank raises, and how many builds there were, when the first one cannot build."""
    builds = []

    def build():
        builds.append(1)
        if accelerator.is_main_process:
            raise UserError("no weights")

    try:
        build_in_turn(accelerator, build)
    except UserError as error:
        return [str(error), len(builds)]


def main():
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text())
    results = {name: run(*case, accelerator) for name, case in cases.items()}
    results |= {"twice": count_twice(accelerator), "fail": fail_on_the_first(accelerator)}
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main()
