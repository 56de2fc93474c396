"""SqueezeNet 1.1 with torchvision's weights as a network of torch-fidelity: a teacher that two CPU cores can afford.

--loss.alignment.network benchmarks/squeezenet.py --loss.alignment.layer features
Weights come from torchvision's download, or from where torchvision would have put them.
"""

import torch
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torchvision.models import squeezenet1_1
from torchvision.transforms import functional

from nsvq.tokenizer.teachers import IMAGENET_MEAN, IMAGENET_STD


class SqueezeNet(FeatureExtractorBase):
    """uint8 [B, 3, H, W] -> ("512" [B, 512], "logits" [B, 1000]), float32. `features`: a map [B, 512, 13, 13]."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        stock = squeezenet1_1(weights="IMAGENET1K_V1")
        self.features, self.classifier = stock.features, stock.classifier
        self.requires_grad_(False)
        self.eval()

    def forward(self, x):
        pixels = functional.resize(x, [224, 224], antialias=True).float() / 255
        maps = self.features(functional.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))
        found = {"512": maps.mean((2, 3)), "logits": self.classifier(maps).flatten(1)}
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list():
        return "512", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"isc": "logits", "fid": "512", "kid": "512", "prc": "512"}[metric]

    @staticmethod
    def can_be_compiled():
        return True

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros([1, 3, 4, 4], dtype=torch.uint8)


register_feature_extractor("squeezenet1-1", SqueezeNet)
