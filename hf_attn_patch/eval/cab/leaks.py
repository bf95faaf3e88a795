"""Which of the four patterns a patch supports: tested on tiny models, not read off its description.

Causal self and cross: output t of the whole run equals that of the run cut behind t (CAB's own test and tolerance,
arXiv 2210.07661, Shark-NLP/CAB scripts/attention_pattern), the gradient of output t with respect to later inputs is
exactly zero, and decoding step by step with a cache gives the whole run again. Noncausal self: outputs depend on both
sides. Cross: source and target differ in length, outputs depend on the source; noncausal: not on the order of a source
that has no positions. Padding never changes what real tokens get.

A choice of keys that looks ahead has no gradient, so only the cut run finds it; a leak below the tolerance only the
gradient. Differs from CAB: float64, gradients, padding, bodies of transformers with two layers.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import api
from ...errors import PatchError
from .bodies import Body

if TYPE_CHECKING:
    from ..harness import Choice

TOLERANCE = 1e-4  # CAB's, here relative to the largest output; noise of float64 is far below
BODIES = (
    Body("NS", "bert", "text"),
    Body("NS", "bart", "encoder"),
    Body("NS", "vit", "vision"),
    Body("CS", "llama", "text"),
    Body("CS", "bart", "decoder"),
    Body("CS", "llava", "text"),
    Body("NC", "blip_2_qformer", "cross"),
    Body("CC", "bart", "cross"),
)


@dataclass(frozen=True)
class Check:
    """ok: None = it could not be run, `found` says why."""

    name: str
    ok: bool | None
    found: str


@dataclass
class Verdict:
    """What one patch does on one body.

    state: ``yes``; ``no``: a check failed; ``partly``: one could not be run; ``no effect``: outputs are those of the
    dense model, so nothing was tested; ``refused``: the patch does not accept the body, `reason` is its own.
    """

    row: str
    body: str
    label: str
    state: str
    reason: str = ""
    checks: list[Check] = field(default_factory=list)

    def __str__(self) -> str:
        bad = [f"{c.name}: {c.found}" for c in self.checks if not c.ok]
        why = self.reason or "; ".join(bad)
        return f"{self.label} on {self.body}, {self.row}: {self.state}{': ' + why if why else ''}"


@dataclass
class Case:
    """A tiny model with its inputs. start: first position that is tested (behind the image tokens of a VLM)."""

    body: Body
    model: Any
    inputs: dict[str, Any]
    start: int = 0

    @property
    def target(self) -> str:
        """Name of the input that is cut."""
        names = {"blip_2_qformer": "query_embeds", "bart": "decoder_input_ids", "vit": "pixel_values"}
        return "input_ids" if self.body.part == "encoder" else names.get(self.body.family, "input_ids")

    def outputs(self, inputs: dict[str, Any]) -> Tensor:
        """One vector per target token, [B, L, C]."""
        if self.body.family == "bart" and self.body.part == "encoder":
            return self.model.get_encoder()(**inputs).last_hidden_state
        with self._prompt():
            found = self.model(**inputs)
        output = found.logits if hasattr(found, "logits") else found.last_hidden_state
        return output[:, 1:] if self.body.family == "vit" else output

    @contextlib.contextmanager
    def _prompt(self) -> Iterator[None]:
        """What a conversation has, one forward lacks: where its prompt ends."""
        if self.start and api.active(self.model):
            with api.prompt(self.model, length=self.start):
                yield
        else:
            yield

    def fresh_cache(self) -> Any:
        """What generate() starts with: BART makes its own cache too deep inside for a patch to see it empty."""
        if self.body.family != "bart":
            return None
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(*(DynamicCache(config=self.model.config) for _ in range(2)))

    def cut(self, end: int) -> dict[str, Any]:
        """The inputs without target tokens from `end` on."""
        cut = dict(self.inputs)
        for name in (self.target, "attention_mask", "token_type_ids", "mm_token_type_ids"):
            if name in cut and not (name == "attention_mask" and self.body.part == "cross"):
                cut[name] = cut[name][:, :end]
        return cut

    def with_leaf(self, module: nn.Module | str) -> tuple[Tensor, Tensor]:
        """(outputs, what they are differentiated by): the output of an embedding module, or a float input."""
        if isinstance(module, str):
            leaf = self.inputs[module].clone().requires_grad_()
            return self.outputs({**self.inputs, module: leaf}), leaf
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[-1]

        hook = module.register_forward_hook(keep)
        try:
            return self.outputs(self.inputs), kept[-1]
        finally:
            hook.remove()

    def target_leaf(self) -> nn.Module | str:
        """The place where target tokens become vectors."""
        if self.body.family == "blip_2_qformer":
            return "query_embeds"
        if self.body.family == "bart":
            side = self.model.get_encoder() if self.body.part == "encoder" else self.model.get_decoder()
            return side.embed_tokens
        return self.model.embeddings if self.body.family == "vit" else self.model.get_input_embeddings()


def case(body: Body, length: int, source: int, seed: int = 0) -> Case:
    """The tiny model of a body in float64 with two rows of `length` target tokens, `source` source tokens.

    Raises:
        TinyError: the family cannot be built.
    """
    from ...testbed.tiny import tiny_inputs, tiny_model

    generator = torch.Generator().manual_seed(seed)

    def ids(count: int, vocabulary: int = 128) -> Tensor:
        return torch.randint(3, min(vocabulary, 100), (2, count), generator=generator)

    longest = {"max_position_embeddings": max(128, length + 2, source + 2)}
    overrides: dict[str, Any] = {"bert": longest, "bart": longest, "llama": longest}.get(body.family, {})
    if body.family == "vit":
        overrides = {"image_size": [1, length], "patch_size": 1}
    if body.family == "blip_2_qformer":
        overrides = {"cross_attention_frequency": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers on token ids beyond a tiny vocabulary
        model = tiny_model(body.family, seed=seed, **overrides).double()
    model.requires_grad_(False)
    if body.family == "llava":
        inputs = tiny_inputs(model, batch=2, length=length, seed=seed)
        image = inputs["input_ids"] == model.config.image_token_id
        inputs["pixel_values"] = inputs["pixel_values"].double()
        return Case(body, model, inputs, int(image.nonzero()[:, 1].max()) + 1)
    if body.family == "vit":
        return Case(body, model, {"pixel_values": torch.randn(2, 3, 1, length, generator=generator).double()})
    if body.family == "blip_2_qformer":
        width = model.config.hidden_size
        wide = [torch.randn(2, n, width, generator=generator).double() for n in (length, source)]
        mask = torch.ones(2, source, dtype=torch.long)
        return Case(
            body,
            model,
            {"query_embeds": wide[0], "encoder_hidden_states": wide[1], "encoder_attention_mask": mask},
        )
    if body.family == "bart" and body.part != "encoder":
        mask = torch.ones(2, source, dtype=torch.long)
        return Case(
            body, model, {"input_ids": ids(source), "attention_mask": mask, "decoder_input_ids": ids(length)}
        )
    return Case(
        body, model, {"input_ids": ids(length), "attention_mask": torch.ones(2, length, dtype=torch.long)}
    )


def verdicts(
    choices: Sequence[Choice],
    patterns: Sequence[str],
    length: int = 48,
    source: int = 37,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Verdict]:
    """One verdict per body of the patterns and patch; tick is called with the number of verdicts so far."""
    if length < 16 or source < 8 or length == source:
        raise ValueError(f"cab: length={length} must be at least 16, source={source} 8, and not the same")
    found: list[Verdict] = []
    for body in bodies(patterns):
        made = case(body, length, source)
        for choice in choices:
            found.append(verdict(made, choice))
            tick(len(found))
    return found


def bodies(patterns: Sequence[str]) -> list[Body]:
    """Those of the patterns."""
    return [body for body in BODIES if body.pattern in patterns]


def verdict(made: Case, choice: Choice) -> Verdict:
    """Put `choice` on the sites of a case, run the checks of its pattern, and take it off again."""
    body = made.body
    found = Verdict(body.pattern, str(body), choice.label, "refused")
    with torch.no_grad():
        dense = made.outputs(made.inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a window that saves nothing on a tiny grid is no news
            handle = api.patch(made.model, choice.what, **body.place(choice).options)
        with handle:
            with torch.no_grad():
                whole = made.outputs(made.inputs)
            found.checks = [run(name, check, made, whole) for name, check in checks_of(body)]
    except PatchError as error:
        found.reason = str(error)
        return found
    states = [c.ok for c in found.checks]
    found.state = "no" if False in states else "partly" if None in states else "yes"
    if found.state == "yes" and torch.equal(
        whole, dense
    ):  # decoding may differ although a whole run does not
        found.state, found.reason = (
            "no effect",
            "with these options and lengths it computes what the dense model does",
        )
    return found


def checks_of(body: Body) -> Checks:
    """Those of its pattern; images have no padding."""
    return tuple(c for c in CHECKS[body.pattern] if body.part != "vision" or c[0] != "padding")


def run(name: str, check: Callable[[Case, Tensor], Check], made: Case, whole: Tensor) -> Check:
    """One check; what a patch refuses in it is no failure."""
    try:
        return check(made, whole)
    except PatchError as error:
        return Check(name, None, f"refused: {error}")


def off(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry of `b`."""
    return float((a - b).abs().max() / b.abs().max())


def compared(name: str, worst: float, where: str) -> Check:
    found = f"largest difference {worst:.1e}{where}"
    return Check(name, worst <= TOLERANCE, found)


def cut_run(made: Case, whole: Tensor) -> Check:
    """Output t of the whole run against the run that ends at t, for every t."""
    differences = {}
    with torch.no_grad():
        for t in range(made.start, whole.shape[1] - 1):
            differences[t] = off(made.outputs(made.cut(t + 1))[:, t], whole[:, t])
    worst = max(differences, key=lambda t: differences[t])
    return compared("cut", differences[worst], f" at output {worst} of {whole.shape[1]}")


def no_later_gradient(made: Case, whole: Tensor) -> Check:
    """The gradient of output t is exactly 0 behind t, and not 0 everywhere."""
    before, after = sides(made, whole)
    if before == 0:
        return Check("gradient", None, "no output has a gradient")
    return Check("gradient", after == 0, f"largest behind output t: {after:.1e}")


def both_sides(made: Case, whole: Tensor) -> Check:
    """Outputs depend on earlier and on later tokens."""
    before, after = sides(made, whole)
    missing = [side for side, size in (("earlier", before), ("later", after)) if size == 0]
    if len(missing) == 2:
        return Check("both sides", None, "no output has a gradient")
    return Check("both sides", not missing, f"{missing[0]} tokens are never read" if missing else "read")


def sides(made: Case, whole: Tensor) -> tuple[float, float]:
    """Largest |gradient| of an output t with respect to inputs before t, and behind t."""
    output, leaf = made.with_leaf(made.target_leaf())
    if not output.requires_grad:
        return 0.0, 0.0
    prefix = leaf.shape[1] - output.shape[1]  # CLS
    before = after = 0.0
    weights = torch.randn(output.shape[-1], dtype=output.dtype, generator=torch.Generator().manual_seed(0))
    steps = range(made.start, output.shape[1], max(1, output.shape[1] // 12))
    for t in steps:
        (slope,) = torch.autograd.grad((output[:, t] @ weights).sum(), leaf, retain_graph=True)
        slope = slope[:, prefix:].abs()
        before = max(before, float(slope[:, :t].sum()))
        after = max(after, float(slope[:, t + 1 :].sum()))
    return before, after


def stepwise(made: Case, whole: Tensor) -> Check:
    """Decoding with a cache, one token at a time (a VLM reads its prompt at once)."""
    length, first = whole.shape[1], max(made.start, 1)
    inputs = dict(made.inputs)
    target, mask = made.target, inputs.pop("attention_mask", None)
    if made.body.family == "bart":
        inputs["encoder_outputs"] = made.model.get_encoder()(input_ids=inputs.pop("input_ids"))
        inputs["attention_mask"] = mask
    outputs, cache = [], made.fresh_cache()
    with torch.no_grad():
        for begin, end in [(0, first), *((t, t + 1) for t in range(first, length))]:
            step = {**inputs, target: inputs[target][:, begin:end]}
            if begin:
                step.pop("pixel_values", None)
            out = made.model(**step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outputs.append(out.logits)
    every = torch.cat(outputs, 1)[:, made.start :]
    per_token = ((every - whole[:, made.start :]).abs().amax((0, 2)) / whole.abs().max()).tolist()
    worst = max(range(len(per_token)), key=lambda i: per_token[i])
    return compared("decode", per_token[worst], f" at output {worst + made.start} of {length}")


def padding(made: Case, whole: Tensor) -> Check:
    """Masked tokens at the end of the source (or of an encoder's row) change nothing."""
    inputs = dict(made.inputs)
    names = {"blip_2_qformer": ("encoder_hidden_states", "encoder_attention_mask")}
    data, mask = names.get(made.body.family, ("input_ids", "attention_mask"))
    extra = inputs[data][:, :5].flip(1)
    inputs[data] = torch.cat([inputs[data], extra], 1)
    inputs[mask] = torch.cat([inputs[mask], torch.zeros_like(inputs[mask][:, :5])], 1)
    with torch.no_grad():
        padded = made.outputs(inputs)[:, : whole.shape[1]]
    return compared("padding", off(padded, whole), "")


def reads_source(made: Case, whole: Tensor) -> Check:
    """Outputs depend on the source, which has a length of its own."""
    if made.body.family == "blip_2_qformer":
        output, leaf = made.with_leaf("encoder_hidden_states")
    else:
        output, leaf = made.with_leaf(made.model.get_encoder().layernorm_embedding)
    if not output.requires_grad:
        return Check("source", None, "no output has a gradient")
    (slope,) = torch.autograd.grad(output.sum(), leaf)
    lengths = f"L={whole.shape[1]}, S={leaf.shape[1]}"
    ok = bool(slope.abs().sum() > 0)
    return Check("source", ok, lengths if ok else f"{lengths}: the source is never read")


def any_order(made: Case, whole: Tensor) -> Check:
    """A source without positions, in another order, says the same."""
    source = made.inputs["encoder_hidden_states"]
    order = torch.randperm(source.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixed = made.outputs({**made.inputs, "encoder_hidden_states": source[:, order]})
    return compared("order", off(mixed, whole), "")


Checks = tuple[tuple[str, Callable[[Case, Tensor], Check]], ...]
CAUSAL: Checks = (("cut", cut_run), ("gradient", no_later_gradient), ("decode", stepwise))
CHECKS: dict[str, Checks] = {
    "NS": (("both sides", both_sides), ("padding", padding)),
    "CS": CAUSAL,
    "NC": (("source", reads_source), ("order", any_order), ("padding", padding)),
    "CC": (*CAUSAL, ("source", reads_source), ("padding", padding)),
}
