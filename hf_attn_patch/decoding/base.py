"""`Decoding`: a method that compares the logits of the prompt with those of a changed prompt, as data; the registry."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ..errors import ConfigError, ModelMismatchError, RegistrationError, UnknownPatchError, did_you_mean
from ..forward.needs.images import image_token_ids
from ..model.sites import base_model
from ..plugins import plugins
from ..registry import Patch, option

if TYPE_CHECKING:
    from torch import Tensor

    from .stream import SecondStream

GROUP = "hf_attn_patch.decodings"

# name -> module:Class; one file each
BUILTIN = {
    name: f"hf_attn_patch.decoding.{name}:{cls}"
    for name, cls in {
        "vcd": "VisualContrastiveDecoding",
        "icd": "InstructionContrastiveDecoding",
        "m3id": "MultiModalMutualInformation",
        "sid": "SelfIntrospectiveDecoding",
        "pai": "ImageFreeGuidance",
        "agla": "GlobalLocalAssembly",
    }.items()
}


@dataclass
class Given:
    """Objects beside the options that a method may need to build its second prompt.

    processor: of the model (tokenizer and image processor). images: the pictures, one per image of the batch, PIL or
    arrays [H, W, 3] of uint8. texts: what was asked, one per image. matcher: (BLIP image-text matching model, its
    processor). second: inputs of the second stream, ready-made; a method then builds none.
    """

    processor: Any = None
    images: Any = None
    texts: Any = None
    matcher: Any = None
    second: Any = None


@dataclass
class Decoding:
    """Base of all methods; fields are options, as in `Patch`. Subclass as a dataclass, decorate with
    `register_decoding`.

    Class attributes: paper, arxiv: source. pixels: needs pixel values. neutral: options that leave generation as it is.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    arxiv: ClassVar[str] = ""
    pixels: ClassVar[bool] = False
    neutral: ClassVar[dict[str, Any]] = {}

    beta: float = option(
        0.1, help="tokens less likely than beta times the likeliest are ruled out (0 = none)"
    )
    patched: bool = option(True, help="the second stream runs with the model's patches on")

    def validate(self) -> None:
        """Check values that need no model. Raises `ConfigError`."""
        self.require(0 <= self.beta <= 1, "beta", "0..1")

    def check_model(self, model: Any) -> None:
        """Refuse a model that this method cannot decode from. Raises `ModelMismatchError`."""
        base, kind = base_model(model), type(base_model(model)).__name__
        if not image_token_ids(base.config):
            raise ModelMismatchError(
                f"{self.name}: the config of {kind} names no image token (image_token_id); it is for "
                "vision-language models"
            )
        if not hasattr(base, "generate") or base.get_output_embeddings() is None:
            raise ModelMismatchError(
                f"{self.name}: {kind} predicts no tokens; load the class with a language-model head "
                "(AutoModelForImageTextToText)"
            )
        if getattr(base.config, "is_encoder_decoder", False):
            raise ModelMismatchError(
                f"{self.name}: {kind} is an encoder-decoder; a second stream is defined for decoder-only models, whose "
                "image tokens stand in the prompt"
            )

    @property
    def streams_needed(self) -> bool:
        """False where the options make the second stream pointless, and the original does not run it."""
        return True

    def second(self, model: Any, inputs: dict[str, Any], given: Given) -> list[dict[str, Any]]:
        """Inputs for ``generate`` of each further stream."""
        raise NotImplementedError

    def combine(self, main: Tensor, others: list[Tensor], step: int) -> Tensor:
        """Logits [R, V] to go on with; `step` is 1 for the first generated token."""
        raise NotImplementedError

    def around(self, model: Any, stream: SecondStream) -> AbstractContextManager[Any]:
        """Entered around every forward of a second stream."""
        return nullcontext()

    # options are read, written and checked exactly as those of a patch
    def to_dict(self) -> dict[str, Any]:
        """Options as plain JSON data."""
        return Patch.to_dict(self)  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Decoding:
        """Build and validate from options. Raises `ConfigError` as `Patch.from_dict` does."""
        return Patch.from_dict.__func__(cls, options)  # type: ignore[attr-defined]

    def require(self, condition: bool, field: str, meaning: str) -> None:
        """Raise `ConfigError` for `field` unless `condition`."""
        Patch.require(self, condition, field, meaning)  # type: ignore[arg-type]


_known: dict[str, Any] = {}
D = TypeVar("D", bound=type[Decoding])


def register_decoding(name: str) -> Callable[[D], D]:
    """Class decorator: make a `Decoding` dataclass available as `name`.

    Raises:
        RegistrationError: `name` is taken by something else; both origins are named.
    """

    def decorate(cls: D) -> D:
        cls.name = name
        address = f"{cls.__module__}:{cls.__qualname__}"
        known = {**BUILTIN, **{k: v if isinstance(v, str) else _address(v) for k, v in _known.items()}}
        if known.get(name, address) != address:
            raise RegistrationError(
                f"two decodings are called {name!r}: {known[name]} and {address}. Rename one"
            )
        _known[name] = cls
        return cls

    return decorate


def _address(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def available() -> list[str]:
    """Names of all two-stream methods, built-in and from the entry points ``hf_attn_patch.decodings``."""
    return sorted({**BUILTIN, **_known, **{p.name: p for p in plugins(GROUP, BUILTIN) if p.target}})


def get(name: str) -> type[Decoding]:
    """The class of method `name`.

    Raises:
        UnknownPatchError: no such method; the message suggests close names. RegistrationError: it cannot be loaded, or
            two packages claim the name.
    """
    names = available()
    if name not in names:
        raise UnknownPatchError(
            f"no decoding is called {name!r}.{did_you_mean(name, names)} Available: {', '.join(names)}"
        )
    target: Any = _known.get(name, BUILTIN.get(name))
    plugin = next((p for p in plugins(GROUP, BUILTIN) if p.name == name and name not in BUILTIN), None)
    if plugin is not None and plugin.problem:
        raise RegistrationError(plugin.problem)
    target = plugin.target if target is None and plugin is not None else target
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        try:
            target = getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:  # somebody else's module may fail in any way
            raise RegistrationError(
                f"decoding {name!r} from {plugin.origin if plugin else 'hf_attn_patch'} points to {target!r}, which "
                f"cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        _known[name] = target
    return target


def build(name_or_config: str | Decoding, options: dict[str, Any]) -> Decoding:
    """A validated config from a name + options, or a config object (+ options that replace its fields).

    Raises:
        UnknownPatchError, ConfigError.
    """
    if isinstance(name_or_config, str):
        return get(name_or_config).from_dict(options)
    if isinstance(name_or_config, Decoding):
        return type(name_or_config).from_dict({**name_or_config.to_dict(), **options})
    raise ConfigError(
        f"expected a decoding's name or config, got {type(name_or_config).__name__}; names: {', '.join(available())}"
    )
