"""`agent`: attention through a few pooled queries, in its training-free form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...call.program import Blend, head_selector
from ...call.rules import Appended
from ...errors import ModelMismatchError
from ...model.grids import Grid, configured_grid, per_axis
from ...registry import option, register_patch
from ..on_grid import GridPatch, call_grid

if TYPE_CHECKING:
    from ...call.program import Program
    from ...install.stack import Call
    from ...model.sites import Site

POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def pooled(query: Tensor, grid: Grid, agents: Grid) -> Tensor:
    """Adaptive average pool of the queries of a grid: [B, H, prod(grid), D] -> [B, H, prod(agents), D]."""
    image = query.flatten(0, 1).mT.unflatten(-1, grid)
    return POOLS[len(grid)](image, agents).flatten(2).mT.unflatten(0, query.shape[:2])


def through_agents(program: Program, agents: Tensor, kappa: float, residual: float, rule: Appended) -> None:
    """Let the rows that `rule` names read the keys by way of `agents` [B, H, A, D] (formula: `AgentAttention`).

    The agents' own attention is dense and small, and is computed here; what is left is one attention call over the
    tokens and the agents, which any executor can run.

    Raises:
        ModelMismatchError: no keys can be added to this call (see `Program.append`).
    """
    key, value, heads = program.key, program.value, rule.on
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    read = F.scaled_dot_product_attention(agents, key, value, dropout_p=program.dropout, scale=program.scale)
    mixture = torch.softmax(agents @ key.mT * program.scale, -1) if program.need_weights else None
    program.append(agents, read, mixture)
    program.restrict(rule)
    on = (torch.arange(program.q_len, device=agents.device) >= rule.prefix).reshape(1, 1, -1, 1)
    if kappa != 1:
        chosen = head_selector(heads, program.num_heads, agents.device)
        rows = on if chosen is None else on & chosen
        scale = torch.ones(rows.shape, dtype=agents.dtype, device=agents.device)
        scale = scale.masked_fill(rows, program.scale ** (kappa - 1))
        program.query_scale = scale if program.query_scale is None else program.query_scale * scale
    if residual:
        # o + residual v, in what a Program can say: a blend with the own value, and a gate
        share = residual / (1 + residual)
        program.blends.append(Blend("value", on.to(agents.dtype) * share, heads))
        program.gate(1 + residual * on[:, 0].to(agents.dtype), heads)


@register_patch("agent")
@dataclass
class AgentAttention(GridPatch):
    """Attention through agents: pooled queries read all keys, and the patches read the agents.

    Source: Agent Attention, arXiv 2312.08874 (LeapLabTHU/Agent-Attention `agentsd/patch.py` and
    `agent_transformer/models/agent_deit.py`, READ and RAN; no licence, so facts only).

    Formula: agents A [B, H, a, D] are the adaptive average pool of the patch queries;
    ``o = softmax(scale^kappa q A^T) softmax(scale A k^T) v + residual v`` in the rows of patches, scale = D^-1/2.
    Prefix rows (CLS, registers) stay exact, and agents read prefix keys too. Cost 2 N a D per head instead of N^2 D.

    Neutral value: none. Two softmaxes are no dense attention, also with as many agents as tokens.

    Differs from the original: AgentSD takes its agents from a token merge (ToMe) and turns them off for late
    diffusion steps; here they are pooled as in the trained Agent-DeiT, whose biases and depth-wise convolution have no
    pretrained values and are left out, and whose CLS row goes through the agents. With half as many agents
    as patches or more the original falls back to dense attention; this refuses. Training-free quality on a ViT is not
    published: measure it with ``agreement``.
    """

    paper = "Agent Attention: On the Integration of Softmax and Linear Attention"
    arxiv = "2312.08874"
    exclusive = frozenset({"token order", "query and key source"})

    agents: int | tuple[int, ...] = option(
        7, help="agents per side of the grid (one number, or one per axis)"
    )
    kappa: float = option(
        0.3, help="exponent of the second softmax's scale; below 1 sharpens (1: the trained form)"
    )
    residual: float = option(0.075, help="share of a patch's own value that is added (0: the trained form)")
    grid: tuple[int, ...] | None = option(
        None, help="token grid, e.g. [16, 16]; default: from the pixel values"
    )

    def validate(self) -> None:
        self.require_sizes("agents")
        # a power of scale = D^-1/2: for heads of 1024 channels float32 holds its 16th
        self.require(abs(self.kappa) <= 16, "kappa", "in [-16, 16]")
        self.require(math.isfinite(self.residual) and self.residual > -1, "residual", "a finite number > -1")
        self.require_grid()

    def check(self, site: Site) -> None:
        if site.num_heads != site.num_kv_heads:
            raise ModelMismatchError(
                f"agent: {site.path} has {site.num_heads} query heads and {site.num_kv_heads} KV heads; agents are "
                "keys of one query head each. Exclude this layer with layers=..."
            )

    def sizes(self, grid: Grid) -> Grid:
        """Agents per axis.

        Raises:
            ModelMismatchError: more than the grid has tokens on an axis, or too many to save anything.
        """
        agents = per_axis(self.name, "agents", self.agents, grid)
        if any(a > size for a, size in zip(agents, grid)) or 2 * math.prod(agents) >= math.prod(grid):
            raise ModelMismatchError(
                f"agent: {agents} = {math.prod(agents)} agents on the grid {grid} of {math.prod(grid)} patches save "
                "nothing: two attention calls through them need less than half as many. Lower agents=..."
            )
        return agents

    def rule(self, grid: Grid, prefix: int) -> Appended:
        self.sizes(grid)
        return Appended(prefix + math.prod(grid), prefix)

    def edit(self, program: Program, call: Call) -> None:
        grid, prefix = call_grid(self.name, self.given, program, call)
        rule = self.rule(grid, prefix)
        if call.heads is not None:
            rule = replace(rule, on=tuple(call.heads), heads=program.num_heads)
        agents = pooled(program.query[:, :, prefix:], grid, self.sizes(grid))
        through_agents(program, agents, self.kappa, self.residual, rule)

    @classmethod
    def examples(cls, model: Any) -> list[dict[str, Any]]:
        grid = configured_grid(model)
        if grid is None or math.prod(grid) < 3:
            return []
        few = [1] * (len(grid) - 1) + [max(1, (grid[-1] - 1) // 2)]
        return [{"agents": few}, {"agents": few, "kappa": 1.0, "residual": 0.0}]
