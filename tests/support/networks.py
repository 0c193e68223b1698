"""Networks of five kinds, and the layer that the default takes of each."""

import torch

from tests.support import models

NETWORKS = {
    "vit": (models.Classifier, {"network": "vit"}, "net.blocks.1.fc2"),
    "torchvision": (models.Classifier, {"network": "torchvision"}, "net.1.encoder.layers.encoder_layer_1.mlp.3"),
    "transformers": (models.HFClassifier, {}, "net.vit.layers.1.mlp.fc2"),
    "mlp": (models.Classifier, {"network": "mlp"}, "net.3"),
    "cnn": (models.Classifier, {"network": "cnn"}, "net.8"),
}


def accuracy(module, data):
    module.eval()
    with torch.no_grad():
        output = module(data.tensors[0])
    return float((getattr(output, "logits", output).argmax(1) == data.tensors[1]).float().mean())
