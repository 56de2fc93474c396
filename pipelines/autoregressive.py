"""The pipeline of the autoregressive stage: its folder, and our class for it.

<folder>/transformer  vae           stock `LlamaForCausalLM` and `VQModel`; each loads by its own library
<folder>/nsvq_autoregressive.py     autoregressive/sampling.py, for DiffusionPipeline.from_pretrained(folder,
                                    trust_remote_code=True); our class does not run it
<folder>/model_index.json  nsvq.json  README.md
"""

import json
import shutil
from pathlib import Path

import torch
from accelerate.utils import compare_versions
from diffusers import DiffusionPipeline, VQModel
from transformers import LlamaForCausalLM

from nsvq.autoregressive import sampling
from nsvq.autoregressive.config import TokenSampling
from nsvq.autoregressive.sampling import TokenPipeline
from nsvq.errors import UsageError
from nsvq.files import atomic_folder
from nsvq.pipelines.card import write_card
from nsvq.pipelines.class_names import ClassNames
from nsvq.pipelines.folders import InstalledCode, local_folder, read_index, refuse_options

SHIPPED_MODULE = "nsvq_autoregressive"
# What diffusers calls it: releases before 0.40 do not know the new name, and later ones warn of the old one.
_DTYPE = "dtype" if compare_versions("diffusers", ">=", "0.40") else "torch_dtype"
CLASS_NAME = [SHIPPED_MODULE, TokenPipeline.__name__]  # in model_index.json
# Keys of configs that say how to sample the one or the other kind of model.
TOKEN_KEYS, DIFFUSION_KEYS = set(TokenSampling.model_fields), {"guidance_interval", "steps", "sampler", "guide"}


class AutoregressivePipeline(InstalledCode, ClassNames, TokenPipeline):
    """Loads and saves folders of `TokenPipeline`, with this project's code in place of theirs, and names the class that
    was meant where there is none such. `ClassConditionalPipeline.from_pretrained` gives one for such a folder."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options) -> "AutoregressivePipeline":
        """As diffusers' own. Raises `ValueError` for a `scheduler`, of which there is none."""
        if "scheduler" in options:
            raise ValueError("an autoregressive pipeline has no scheduler: leave it out")
        if not options.keys() & {"dtype", "torch_dtype"}:  # as diffusers' parts; transformers' keep the stored type
            options[_DTYPE] = torch.float32
        index = read_index(pretrained_model_name_or_path, options)
        return super().from_pretrained(local_folder(pretrained_model_name_or_path, index, options), **options)

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, variant: str | None = None, **ignored
    ) -> None:
        """Write a folder as training does, class names included; `push_to_hub` uploads the same. The weights of a
        `variant` are written beside those that are there."""
        refuse_options(ignored, safe_serialization)
        save_pipeline(Path(save_directory), self.transformer, self.vae, self.id2label, variant=variant)


def generates_tokens(pipeline: DiffusionPipeline, given: set[str]) -> bool:
    """Whether it is a pipeline of this stage. Raises `UsageError` where keys that were `given` mean nothing to it."""
    tokens = isinstance(pipeline, TokenPipeline)
    if wrong := sorted(given & (DIFFUSION_KEYS if tokens else TOKEN_KEYS)):
        kind = "an autoregressive" if tokens else "a diffusion"
        raise UsageError(f"--{wrong[0]} means nothing to {kind} model: leave it out")
    return tokens


def save_pipeline(
    folder: Path,
    transformer: LlamaForCausalLM,
    vae: VQModel,
    classes: dict[int, str],
    about: dict | None = None,
    variant: str | None = None,
) -> None:
    """Write the pipeline folder in one step, in place of what was there; weights of a `variant` beside it.

    `about` says how it was trained (see `pipelines.card`), and goes to nsvq.json and the model card.
    """
    with atomic_folder(folder) as part:
        if variant and folder.is_dir():
            shutil.copytree(folder, part, dirs_exist_ok=True)
        TokenPipeline(transformer, vae).save_pretrained(part, variant=variant)
        shutil.copyfile(sampling.__file__, part / f"{SHIPPED_MODULE}.py")
        index = part / "model_index.json"
        changes = {"_class_name": CLASS_NAME, "id2label": {str(i): name for i, name in classes.items()}}
        index.write_text(json.dumps(json.loads(index.read_text()) | changes, indent=2, ensure_ascii=False) + "\n")
        if about is not None:
            (part / "nsvq.json").write_text(json.dumps(about, indent=2) + "\n")
            write_card(part)
