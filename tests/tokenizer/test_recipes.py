from pathlib import Path

from nsvq.common.config import differences, read_yaml, to_dict, validate
from nsvq.tokenizer.config import TrainConfig
from nsvq.tokenizer.quantizers import QUANTIZERS

ROOT = Path(__file__).parents[2]
MAY_DIFFER = ("out:", "quantizer.", "model.latent_channels:", "loss.codebook_weight:", "loss.commitment_weight:",
              "loss.nonstationary_weight:", "loss.temperature:", "schedule.freeze:", "schedule.replace:")  # fmt: skip


def other(differences):
    return [line for line in differences if not line.startswith(MAY_DIFFER)]


def test_the_common_recipe_differs_in_the_method_alone_and_each_method_has_one_and_its_papers():
    common = {}
    for path in (ROOT / "configs" / "imagenet128").glob("*.yaml"):
        if "tokenizer" not in (values := read_yaml(path)):  # else it is a recipe of stage two
            common[path.stem] = to_dict(validate(TrainConfig, values))
    assert set(common) == set(QUANTIZERS) | {"simvq-nsvq"}
    for name, values in common.items():
        assert not other(differences(common["nsvq"], values)), name
    papers = {path.stem for path in (ROOT / "configs" / "papers").glob("*.yaml")}
    assert papers == set(QUANTIZERS)
    for name in papers:
        assert read_yaml(ROOT / "configs" / "papers" / f"{name}.yaml")["quantizer"]["name"] == name
