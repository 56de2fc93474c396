from pathlib import Path

from nsvq.common.config import differences, read_config, to_dict, validate
from nsvq.tokenizer.config import TrainConfig
from nsvq.tokenizer.quantizers import QUANTIZERS

ROOT = Path(__file__).parents[2]
MAY_DIFFER = (
    "out:",
    "quantizer.",
    "model.latent_channels:",
    "loss.codebook_weight:",
    "loss.commitment_weight:",
    "nsvq.",
)


def other(differences):
    return [line for line in differences if not line.startswith(MAY_DIFFER)]


def test_the_common_recipe_differs_in_the_method_alone_and_each_method_has_one_and_its_papers():
    common = {}
    for path in (ROOT / "configs" / "imagenet128").glob("*.yaml"):
        if "tokenizer" not in (values := read_config(path)):  # else it is a recipe of stage two
            common[path.stem] = to_dict(validate(TrainConfig, values))
    plus = differences(common["nsvq"], common.pop("nsvq-plus"))
    losses = ("out:", "loss.", "perturbation", "discriminator.", "schedule.adversarial_")
    assert [line for line in plus if not line.startswith(losses)] == []
    assert set(common) == set(QUANTIZERS) | {"nsvq", "simvq-nsvq", "fc"}
    for name, values in common.items():
        assert not other(differences(common["nsvq"], values)), name
    papers = {p.stem for p in (ROOT / "configs" / "papers").glob("*.yaml") if "tokenizer" not in read_config(p)}
    assert papers == set(QUANTIZERS) | {"nsvq", "fc"}
    for name in papers:
        method = {"nsvq": "vq", "fc": "vq"}.get(name, name)
        assert read_config(ROOT / "configs" / "papers" / f"{name}.yaml")["quantizer"]["name"] == method


def test_the_published_recipe_is_what_every_key_defaults_to():
    values = to_dict(validate(TrainConfig, read_config(ROOT / "configs" / "papers" / "nsvq.yaml")))
    assert differences(values, to_dict(TrainConfig())) == ["out: 'runs/papers-nsvq' -> 'runs/imagenet128-nsvq'"]
