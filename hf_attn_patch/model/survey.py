"""`Survey`: what a loaded model is, read once per public call and handed down.

    survey = Survey.of(pipeline_or_peft_or_model)
    survey.base, survey.sites, survey.wrappers

Nobody walks the model again while a survey is at work: inside `at_work`, `find_sites` of its model gives its sites.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from . import devices, mesh
from .sites import Site, attention_classes, handed_down, left_alone, read_sites
from .wrappers import base_model, wrappers_of


@dataclass(eq=False)
class Survey:
    """A transformers model and what is around and inside it.

    Attributes:
        given: what the caller holds (a model, a wrapper module, a pipeline, ...). base: the transformers model.
        wrappers: modules around `base`, outermost first. sites: its attention modules.
    """

    given: Any
    base: Any
    wrappers: tuple[nn.Module, ...] = field(repr=False)
    sites: list[Site] = field(repr=False)

    @classmethod
    def of(cls, model: Any) -> Survey:
        """Read `model`.

        Raises:
            ModelMismatchError: no transformers model in it, or several that are independent of each other.
        """
        base = base_model(model)
        return cls(model, base, wrappers_of(model, base) if model is not base else (), read_sites(base))

    def at_work(self) -> AbstractContextManager[None]:
        """Inside, `find_sites` of this model gives the sites of this survey."""
        return handed_down(self.base, self.sites)

    @property
    def parts(self) -> list[str]:
        """Part names that select at least one site, sorted."""
        return sorted({part for site in self.sites for part in site.parts})

    @cached_property
    def parallel(self) -> int:
        """Tensor-parallel ranks that share every layer (1: none)."""
        return mesh.tensor_parallel_size(self.base)

    @cached_property
    def why_not_parallel(self) -> str | None:
        """Why no method can follow the way the model is spread over processes, or None."""
        return mesh.why_not_parallel(self.base)

    @cached_property
    def why_not_trainable(self) -> str | None:
        """Why parameters that are added now would be trained apart on every rank, or None."""
        return mesh.why_not_trainable(self.wrappers, self.base)

    @property
    def left_alone(self) -> list[str]:
        """Attention that stays as it is, as ``path (class)``."""
        return left_alone(self.base)

    @property
    def attention_classes(self) -> list[str]:
        """Class names of modules that look like attention but have no dispatch."""
        return attention_classes(self.base)

    def device_of(self, site: Site) -> Any:
        """Where the queries of `site` will live (`devices.execution_device`)."""
        return devices.execution_device(self.base, site.path, site.module)

    @cached_property
    def devices(self) -> dict[str, Any]:
        """Path of every site -> where its queries will live."""
        return {site.path: self.device_of(site) for site in self.sites}
