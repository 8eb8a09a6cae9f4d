"""Units: the parts that can be removed from a decoder, and the exact cost of each.

Two kinds of unit (GRASPrune, arXiv 2604.19398, section 3): an **FFN channel** (a row of
`gate_proj` and `up_proj` with its column of `down_proj`) and a **KV group** (the rows of one KV
head in `k_proj` and `v_proj`, of its G query heads in `q_proj`, and the matching columns of
`o_proj`). A projection may be a separate linear layer or rows of a fused one (`gate_up_proj`,
`qkv_proj`).

A layer whose FFN is a mixture has a third kind: a routed **expert**, with its row of the router.

Costs are integers in multiples of the hidden size d: a channel costs 3 (3d weights), a group
(2G+2)*head_dim, an expert 3 for each of its own channels and 1 for the router's row. Flat vectors
over units (scores, gates, masks) run layer by layer, the layer's FFN channels first, then its KV
groups; the experts of all layers come after them, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grasp.errors import GraspError

FFN_COST = 3
# the linear layers of an FFN or an attention: separate, or fused in this order
FFN_NAMES = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))
ATTENTION_NAMES = (("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_proj", "o_proj"))


@dataclass(frozen=True)
class LayerUnits:
    """The units of one decoder layer. `channel_bias` and so on count biases per unit.

    At least `experts_per_token` of the experts stay, as many as the router picks for a token.
    """

    ffn: int
    kv_groups: int
    group_size: int  # G, query heads per KV head
    head_dim: int
    channel_bias: int = 0
    group_bias: int = 0
    experts: int = 0  # routed ones
    expert_width: int = 0  # channels of each
    experts_per_token: int = 0
    expert_bias: int = 0

    @property
    def units(self) -> int:
        return self.ffn + self.kv_groups + self.experts

    @property
    def kv_cost(self) -> int:
        return (2 * self.group_size + 2) * self.head_dim

    @property
    def expert_cost(self) -> int:
        return FFN_COST * self.expert_width + 1

    @property
    def cost(self) -> int:
        dense = FFN_COST * self.ffn + self.kv_cost * self.kv_groups
        return dense + self.expert_cost * self.experts


@dataclass(frozen=True, repr=False)
class UnitSpace:
    """Every removable unit of a model. `fixed_params` counts parameters no mask can remove."""

    hidden_size: int
    layers: tuple[LayerUnits, ...]
    fixed_params: int

    def __repr__(self) -> str:
        channels = sum(layer.ffn for layer in self.layers)
        groups = sum(layer.kv_groups for layer in self.layers)
        return (
            f"UnitSpace({len(self.layers)} layers: {channels:,} FFN channels, {groups:,} KV "
            f"groups{f', {self.experts:,} experts' if self.experts else ''}; "
            f"{self.prunable_params:,} of {self.total_params:,} parameters prunable)"
        )

    @classmethod
    def of(cls, model: Any) -> UnitSpace:
        """Read the units of a live model (any device, `meta` included). Raises GraspError."""
        modules = decoder_layers(model)
        layers = tuple(_layer_units(m) for m in modules)
        hidden = modules[0].gate.weight.shape[1]
        total = sum(p.numel() for p in model.parameters())
        space = cls(hidden, layers, 0)
        return cls(hidden, layers, total - space.total_params)

    @property
    def size(self) -> int:
        return sum(layer.units for layer in self.layers)

    @property
    def experts(self) -> int:
        """The routed experts of all layers; 0 for a model that is not a mixture."""
        return sum(layer.experts for layer in self.layers)

    @property
    def cost(self) -> int:
        return sum(layer.cost for layer in self.layers)

    @property
    def prunable_params(self) -> int:
        """Parameters of the FFN, router and attention matrices (biases and norms not counted)."""
        return self.cost * self.hidden_size

    @property
    def total_params(self) -> int:
        biases = sum(
            layer.channel_bias * layer.ffn
            + layer.group_bias * layer.kv_groups
            + layer.expert_bias * layer.experts
            for layer in self.layers
        )
        return self.fixed_params + self.prunable_params + biases

    def kv_cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        return sum(2 * layer.kv_groups * layer.head_dim for layer in self.layers) * bytes_per_value

    def segments(self) -> Iterator[tuple[int, slice, slice]]:
        """Yield (layer, slice of its FFN channels, slice of its KV groups) of a unit vector."""
        start = 0
        for index, layer in enumerate(self.layers):
            middle, end = start + layer.ffn, start + layer.ffn + layer.kv_groups
            yield index, slice(start, middle), slice(middle, end)
            start = end

    def expert_segments(self) -> Iterator[tuple[int, slice]]:
        """Yield (layer, slice of its experts) of a unit vector, for every layer."""
        start = self.size - self.experts
        for index, layer in enumerate(self.layers):
            yield index, slice(start, start + layer.experts)
            start += layer.experts

    @property
    def sizes(self) -> list[int]:
        """Units of each part of a unit vector: FFN and KV groups of each layer, then experts."""
        dense = [n for layer in self.layers for n in (layer.ffn, layer.kv_groups)]
        return dense + [layer.experts for layer in self.layers]

    def resized(
        self, widths: Sequence[tuple[int, int]], experts: Sequence[int] | None = None
    ) -> UnitSpace:
        """The space of the same model with `widths`: (FFN channels, KV groups) of each layer.

        `experts` of each layer: as they are if None.
        """
        counts = [layer.experts for layer in self.layers] if experts is None else experts
        layers = tuple(
            replace(layer, ffn=ffn, kv_groups=groups, experts=count)
            for layer, (ffn, groups), count in zip(self.layers, widths, counts, strict=True)
        )
        return replace(self, layers=layers)


def units(model: Any) -> UnitSpace:
    """The removable units of a live model, and the cost of each. Raises GraspError."""
    return UnitSpace.of(model)


@dataclass(frozen=True)
class Rows:
    """A projection: `size` rows of a linear layer from `start`; all rows unless it is fused."""

    linear: Any
    start: int
    size: int

    @property
    def weight(self) -> Any:
        """A view, [size, in]."""
        return self.of(self.linear.weight)

    @property
    def bias(self) -> Any:
        """A view, [size], or None."""
        return None if self.linear.bias is None else self.of(self.linear.bias)

    def of(self, values: Any) -> Any:
        """This projection's part of `values`, which has one entry per row of the linear layer."""
        return values[self.start : self.start + self.size]


@dataclass(frozen=True)
class LayerModules:
    """The two prunable modules of one decoder layer, and their projections."""

    attention: Any  # has o_proj, head_dim
    mlp: Any  # has down_proj
    q: Rows
    k: Rows
    v: Rows
    gate: Rows
    up: Rows

    @property
    def linears(self) -> list[Any]:
        """All linear layers, each once."""
        return [*self.gate_up, *self.qkv, *self.outputs]

    @property
    def outputs(self) -> tuple[Any, Any]:
        """down_proj and o_proj, whose columns are units, in the order of UnitSpace."""
        return self.mlp.down_proj, self.attention.o_proj

    @property
    def gate_up(self) -> tuple[Any, ...]:
        """The linear layers that hold `gate` and `up`: two, or one."""
        return _distinct(self.gate, self.up)

    @property
    def qkv(self) -> tuple[Any, ...]:
        """The linear layers that hold `q`, `k` and `v`: three, or one."""
        return _distinct(self.q, self.k, self.v)

    @property
    def activation(self) -> Any:
        """The activation function on the output of `gate`."""
        return getattr(self.mlp, "act_fn", None) or self.mlp.activation_fn


def _distinct(*rows: Rows) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(r.linear for r in rows))


def decoder_layers(model: Any) -> list[LayerModules]:
    """Find the decoder layers by structure, in depth order. Raises GraspError with the reason."""
    kind = type(model).__name__
    if not hasattr(model, "get_decoder") or not hasattr(model.get_decoder(), "layers"):
        raise GraspError(f"{kind} is not supported: it has no list of decoder layers")
    if model.config.get_text_config() is not model.config:
        raise GraspError(f"{kind} is not supported: it accepts more than text")
    found = []
    for index, layer in enumerate(model.get_decoder().layers):
        attention = _only_child(layer, ATTENTION_NAMES, kind, index)
        mlp = _only_child(layer, FFN_NAMES, kind, index)
        _check_linears(model, (attention, ATTENTION_NAMES), (mlp, FFN_NAMES))
        found.append(LayerModules(attention, mlp, *_qkv(attention), *_gate_up(mlp)))
    if not found:
        raise GraspError(f"{kind} is not supported: its list of decoder layers is empty")
    return found


def _only_child(layer: Any, forms: tuple[tuple[str, ...], ...], kind: str, index: int) -> Any:
    # direct children only: the experts of a mixture lie deeper
    matches = [m for m in layer.children() if any(_has(m, names) for names in forms)]
    if len(matches) == 1:
        return matches[0]
    if any(name.endswith(".experts") for name, _ in layer.named_modules()):
        raise GraspError(
            f"{kind} is not supported: layer {index} is a mixture of experts, and grasp prunes "
            "dense FFNs: name a dense model"
        )
    have = sorted({type(m).__name__ for m in layer.children()})
    raise GraspError(
        f"{kind} is not supported: layer {index} needs exactly one module with "
        f"{' or '.join(', '.join(names) for names in forms)}, found {len(matches)} "
        f"(the layer holds {', '.join(have)})"
    )


def _has(module: Any, names: tuple[str, ...]) -> bool:
    return all(name in module._modules for name in names)


def _check_linears(model: Any, *parts: tuple[Any, tuple[tuple[str, ...], ...]]) -> None:
    """Raise GraspError if a projection is not a plain linear layer."""
    from torch import nn  # here, so that a plan from config.json alone needs no torch

    for module, forms in parts:
        for child, linear in module.named_children():
            # a subclass may compute more, or pack its weight
            if child in _linear_names(forms) and type(linear) is not nn.Linear:
                name = next(name for name, m in model.named_modules() if m is linear)
                raise GraspError(
                    f"{type(model).__name__} is not supported: {name} is a {type(linear).__name__},"
                    " not a plain nn.Linear: name a model that is neither quantised nor wrapped"
                )


def _linear_names(forms: tuple[tuple[str, ...], ...]) -> set[str]:
    return {name for names in forms for name in names}


def _qkv(attention: Any) -> tuple[Rows, ...]:
    if not hasattr(attention, "qkv_proj"):
        return tuple(_whole(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
    queries = attention.o_proj.weight.shape[1]
    keys = (attention.qkv_proj.weight.shape[0] - queries) // 2
    return _parts(attention.qkv_proj, (queries, keys, keys))


def _gate_up(mlp: Any) -> tuple[Rows, ...]:
    if not hasattr(mlp, "gate_up_proj"):
        return _whole(mlp.gate_proj), _whole(mlp.up_proj)
    channels = mlp.down_proj.weight.shape[1]
    return _parts(mlp.gate_up_proj, (channels, channels))


def _whole(linear: Any) -> Rows:
    return Rows(linear, 0, linear.weight.shape[0])


def _parts(linear: Any, sizes: tuple[int, ...]) -> tuple[Rows, ...]:
    return tuple(Rows(linear, sum(sizes[:i]), size) for i, size in enumerate(sizes))


def _layer_units(modules: LayerModules) -> LayerUnits:
    head_dim = _head_dim(modules)
    _check_ffn(modules.mlp)
    q, k, v = modules.q, modules.k, modules.v
    kv_groups = k.size // head_dim
    group_size = q.size // head_dim // kv_groups
    channel_bias = sum(rows.bias is not None for rows in (modules.gate, modules.up))
    group_bias = head_dim * (
        group_size * (q.bias is not None) + (k.bias is not None) + (v.bias is not None)
    )
    return LayerUnits(modules.gate.size, kv_groups, group_size, head_dim, channel_bias, group_bias)


def _check_ffn(mlp: Any) -> None:
    """Refuse an FFN that shows that it computes more than its linear layers. Raises GraspError."""
    kind = type(mlp).__name__
    for name, parameter in _beside(mlp, FFN_NAMES):
        raise GraspError(
            f"{kind} is not supported: {name} has {parameter.numel()} values beside the linear "
            "layers, and channels cannot be removed from it"
        )
    for name, value in vars(mlp).items():  # whether it is used, a short run tells before learning
        if name.endswith("multiplier") and value != 1:
            raise GraspError(f"{kind} is not supported: it multiplies by {name}, which is {value}")


def _head_dim(modules: LayerModules) -> int:
    """The head size of an attention whose heads can be removed one by one. Raises GraspError."""
    attention, queries, keys = modules.attention, modules.q.size, modules.k.size
    kind, head_dim = type(attention).__name__, getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int):
        raise GraspError(f"{kind} is not supported: it does not say its head_dim")
    if attention.o_proj.weight.shape[1] != queries or keys != modules.v.size or queries % keys:
        raise GraspError(
            f"{kind} is not supported: {queries} query, {keys} key and {modules.v.size} value rows "
            f"with {attention.o_proj.weight.shape[1]} output columns are no grouped heads"
        )
    for name, parameter in _beside(attention, ATTENTION_NAMES):
        if parameter.numel() != head_dim:
            raise GraspError(
                f"{kind} is not supported: {name} has {parameter.numel()} values, one head has "
                f"{head_dim}, so heads cannot be removed one by one"
            )
    return head_dim


def _beside(module: Any, forms: tuple[tuple[str, ...], ...]) -> list[tuple[str, Any]]:
    """The parameters of a module, with names, that are outside its linear layers."""
    linears = _linear_names(forms)
    return [(n, p) for n, p in module.named_parameters() if n.split(".")[0] not in linears]
