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
from grasp.model.experts import SHARED_WIDTH, RoutedExperts, routed_experts

FFN_COST = 3
SHARED = "takes the keys and values of another layer"
ABSENT = {"kv_groups": 0, "group_size": 1, "head_dim": 1}  # an attention that stays whole


@dataclass(frozen=True)
class LayerUnits:
    """The units of one decoder layer. `channel_bias` and so on count biases per unit.

    A layer whose FFN or attention is absent or stays whole has 0 of them. At least
    `experts_per_token` of the experts stay, as many as the router picks for a token.
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
    def heads(self) -> int:
        """Query heads."""
        return self.group_size * self.kv_groups

    @property
    def queries(self) -> int:
        """Values of the queries of a token."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Values of the keys of a token, and of its values."""
        return self.kv_groups * self.head_dim

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
    fixed_keys: int = 0  # values of K per token in attention whose heads stay

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
        hidden = next(m.hidden_size for m in modules if m.hidden_size)
        total = sum(p.numel() for p in model.parameters())
        space = cls(hidden, layers, 0, sum(m.whole_keys for m in modules))
        return replace(space, fixed_params=total - space.total_params)

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

    @property
    def is_uniform(self) -> bool:
        """Whether all FFNs have equal widths, and so have all attentions and all mixtures."""
        ffns = {layer.ffn for layer in self.layers if layer.ffn}
        attentions = {(x.kv_groups, x.group_size) for x in self.layers if x.kv_groups}
        experts = {layer.experts for layer in self.layers if layer.experts}
        return max(len(ffns), len(attentions), len(experts)) <= 1

    @property
    def widest(self) -> int:
        """Channels of the widest FFN, or of the widest attention if no FFN has units."""
        return max(n.ffn for n in self.layers) or max(n.queries for n in self.layers)

    def kv_cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        keys = self.fixed_keys + sum(layer.keys for layer in self.layers)
        return 2 * keys * bytes_per_value

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
class FFN:
    """A gated FFN whose channels can be removed: down(activation(gate x) * up x)."""

    module: Any
    gate: Rows
    up: Rows
    down: Any

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The linear layers that hold `gate` and `up`: two, or one."""
        return _distinct(self.gate, self.up)

    @property
    def activation(self) -> Any:
        """The activation function on the output of `gate`; None if the module does not name it."""
        names = ("act_fn", "activation_fn", "activation")
        return next((getattr(self.module, n) for n in names if hasattr(self.module, n)), None)


@dataclass(frozen=True)
class Attention:
    """A grouped-query attention whose KV groups can be removed; the module says its head_dim."""

    module: Any
    q: Rows
    k: Rows
    v: Rows
    out: Any

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The linear layers that hold `q`, `k` and `v`: three, or one."""
        return _distinct(self.q, self.k, self.v)


@dataclass(frozen=True)
class LayerModules:
    """The prunable modules of one decoder layer; None for what is absent or stays whole."""

    ffn: FFN | None
    attention: Attention | None
    routed: RoutedExperts | None = None  # then `ffn` is the shared expert
    whole: tuple[str, ...] = ()  # why a module that looks like one of these stays whole
    whole_keys: int = 0  # values of K per token in attention that stays whole

    @property
    def parts(self) -> tuple[FFN | Attention, ...]:
        """The prunable modules, in the order of UnitSpace."""
        return tuple(part for part in (self.ffn, self.attention) if part is not None)

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The linear layers whose columns are units, in the order of UnitSpace."""
        ends = (self.ffn and self.ffn.down, self.attention and self.attention.out)
        return tuple(linear for linear in ends if linear is not None)

    @property
    def linears(self) -> list[Any]:
        """All linear layers of the prunable modules, each once."""
        return [linear for part in self.parts for linear in part.inputs] + [*self.outputs]

    @property
    def hidden_size(self) -> int | None:
        """None if nothing in the layer is prunable."""
        found = [linear.weight.shape[0] for linear in self.outputs]
        found += [self.routed.router.weight.shape[1]] if self.routed else []
        return int(found[0]) if found else None


def _distinct(*rows: Rows) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(r.linear for r in rows))


def decoder_layers(model: Any) -> list[LayerModules]:
    """Find the prunable modules by structure, layer by layer in depth order.

    Every layer is listed, also one without any. Raises GraspError with the reasons if no layer has
    one.
    """
    kind = type(model).__name__
    layers = getattr(decoder_of(model), "layers", None)
    if layers is None:
        raise GraspError(f"{kind} is not supported: it has no list of decoder layers")
    found = [_layer_modules(model, layer) for layer in layers]
    if any(SHARED in why for modules in found for why in modules.whole):
        found = [_with_whole_attention(modules) for modules in found]
    if any(modules.routed for modules in found):
        found = [_as_in_a_mixture(modules) for modules in found]
    if not found:
        raise GraspError(f"{kind} is not supported: its list of decoder layers is empty")
    if not any(modules.parts or modules.routed for modules in found):
        reasons = "; ".join(dict.fromkeys(why for modules in found for why in modules.whole))
        needed = (
            "a layer needs a gated FFN (gate_proj, up_proj, down_proj), routed experts or grouped "
            "attention (q_proj, k_proj, v_proj, o_proj)"
        )
        raise GraspError(f"{kind} is not supported: {reasons or needed}")
    return found


def decoder_of(model: Any) -> Any:
    """The module that holds the decoder layers: the text tower of a model that sees images."""
    return model.get_decoder() if hasattr(model, "get_decoder") else None


def layers_name(model: Any) -> str:
    """The name of the list of decoder layers, such as model.layers."""
    layers = decoder_of(model).layers
    name: str = next(name for name, module in model.named_modules() if module is layers)
    return name


def why_whole(model: Any) -> tuple[str, ...]:
    """What stays whole in the layers of a model and why, each reason once, with its layers."""
    reasons: dict[str, list[int]] = {}
    for index, modules in enumerate(decoder_layers(model)):
        for why in modules.whole:
            reasons.setdefault(why, []).append(index)
    depth = len(decoder_layers(model))
    return tuple(
        why if len(at) == depth else f"{why} ({len(at)} of {depth} layers)"
        for why, at in reasons.items()
    )


def _layer_modules(model: Any, layer: Any) -> LayerModules:
    # here, so that a plan from config.json alone needs no torch
    from grasp.model.modeling_grasp import ATTENTION_FORMS, FFN_FORMS, parts_of

    whole: list[str] = []
    routed = routed_experts(layer)
    ffns = parts_of(routed.block if routed else layer, FFN_FORMS)
    attentions = parts_of(layer, ATTENTION_FORMS)
    for module, names in (*ffns, *attentions):
        _check_linears(model, module, names)
    ffn = _only([_ffn(*found) for found in ffns], whole)
    if routed and ffn and not hasattr(model.config.get_text_config(), SHARED_WIDTH):
        whole.append(f"{type(ffn.module).__name__}: the config has no width for shared experts")
        ffn = None
    attention = _only([_attention(*found) for found in attentions], whole)
    known = {module for module, _ in (*ffns, *attentions)} | {routed and routed.block}
    others = [m for m in layer.children() if m not in known and m._modules and _has_matrix(m)]
    whole += map(_of_another_kind, others)
    keys = 0
    if attention is None:
        keys = sum(_keys(module, names) for module, names in attentions)
    return LayerModules(ffn, attention, routed, tuple(dict.fromkeys(whole)), keys)


def _with_whole_attention(modules: LayerModules) -> LayerModules:
    """Without the attention, because other layers may read its keys and values."""
    if modules.attention is None:
        return modules
    why = f"{type(modules.attention.module).__name__} may share its keys and values"
    keys = modules.attention.k.size
    return replace(
        modules,
        attention=None,
        whole=(*modules.whole, why),
        whole_keys=modules.whole_keys + keys,
    )


def _as_in_a_mixture(modules: LayerModules) -> LayerModules:
    """Without the FFN of a layer that has no experts: its width is not that of a shared expert."""
    if modules.routed or modules.ffn is None:
        return modules
    why = f"{type(modules.ffn.module).__name__} is in a layer without experts"
    return replace(modules, ffn=None, whole=(*modules.whole, why))


def _only(found: list[Any], whole: list[str]) -> Any:
    """The one module of its kind; None, with the reason added to `whole`, if it is not prunable."""
    whole += [part for part in found if isinstance(part, str)]
    if len(found) > 1:
        whole.append(f"{len(found)} modules of one kind in a layer")
    return found[0] if len(found) == 1 and not isinstance(found[0], str) else None


def _has_matrix(module: Any) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _of_another_kind(module: Any) -> str:
    kind = type(module).__name__
    if any(name == "experts" or name.endswith(".experts") for name, _ in module.named_modules()):
        return f"{kind} is a mixture of experts of another form"
    children = module._modules
    if "q_proj" in children and "k_proj" not in children:
        return f"{kind} {SHARED}"
    return f"{kind} is neither a gated FFN nor attention with grouped heads"


def _check_linears(model: Any, module: Any, names: tuple[str, ...]) -> None:
    """Raise GraspError if a projection is not a plain linear layer."""
    from torch import nn

    for child in names:
        linear = getattr(module, child)
        # a subclass may compute more, or pack its weight
        if type(linear) is not nn.Linear:
            name = next(name for name, m in model.named_modules() if m is linear)
            raise GraspError(
                f"{type(model).__name__} is not supported: {name} is a {type(linear).__name__},"
                " not a plain nn.Linear: name a model that is neither quantised nor wrapped"
            )


def _ffn(module: Any, names: tuple[str, ...]) -> FFN | str:
    """The FFN, or why it stays whole."""
    *inputs, down = (getattr(module, name) for name in names)
    for name, parameter in _beside(module, names):
        return (
            f"{type(module).__name__}: {name} has {parameter.numel()} values beside the linear "
            "layers, and channels cannot be removed from it"
        )
    channels = down.weight.shape[1]
    gate, up = map(_whole, inputs) if len(inputs) == 2 else _parts(inputs[0], (channels, channels))
    return FFN(module, gate, up, down)


def _attention(module: Any, names: tuple[str, ...]) -> Attention | str:
    """The attention if its heads can be removed one by one, or why it stays whole."""
    *inputs, out = (getattr(module, name) for name in names)
    kind, queries = type(module).__name__, out.weight.shape[1]
    if len(inputs) == 3:
        q, k, v = map(_whole, inputs)
    else:
        keys = (inputs[0].weight.shape[0] - queries) // 2
        q, k, v = _parts(inputs[0], (queries, keys, keys))
    head_dim = getattr(module, "head_dim", None)
    if not isinstance(head_dim, int):
        return f"{kind} does not say its head_dim"
    if q.size != queries or k.size != v.size or q.size % k.size or k.size % head_dim:
        return (
            f"{kind}: {q.size} query, {k.size} key and {v.size} value rows with {queries} output "
            "columns do not form grouped heads"
        )
    for name, parameter in _beside(module, names):
        if parameter.numel() != head_dim or "." not in name:
            return (
                f"{kind}: {name} has {parameter.numel()} values, one head has {head_dim}, so heads "
                "cannot be removed one by one"
            )
    return Attention(module, q, k, v, out)


def _beside(module: Any, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """The parameters of a module, with names, that are outside its linear layers."""
    return [(n, p) for n, p in module.named_parameters() if n.split(".")[0] not in names]


def _keys(module: Any, names: tuple[str, ...]) -> int:
    """Values of K per token that an attention puts into the cache; linear attention puts none."""
    if "k_proj" not in names or any("conv" in name for name, _ in module.named_children()):
        return 0
    return int(module.k_proj.weight.shape[0])


def _whole(linear: Any) -> Rows:
    return Rows(linear, 0, linear.weight.shape[0])


def _parts(linear: Any, sizes: tuple[int, ...]) -> tuple[Rows, ...]:
    return tuple(Rows(linear, sum(sizes[:i]), size) for i, size in enumerate(sizes))


def _layer_units(modules: LayerModules) -> LayerUnits:
    ffn, attention = modules.ffn, modules.attention
    found: dict[str, int] = {"ffn": 0, **ABSENT}
    if ffn is not None:
        biases = sum(rows.bias is not None for rows in (ffn.gate, ffn.up))
        found |= {"ffn": ffn.gate.size, "channel_bias": biases}
    if attention is not None:
        q, k, v, head_dim = attention.q, attention.k, attention.v, attention.module.head_dim
        per_head = (q.size // k.size, q.bias), (1, k.bias), (1, v.bias)
        found |= {
            "kv_groups": k.size // head_dim,
            "group_size": q.size // k.size,
            "head_dim": head_dim,
            "group_bias": head_dim * sum(n for n, bias in per_head if bias is not None),
        }
    if (routed := modules.routed) is not None:
        found |= {
            "experts": routed.count,
            "expert_width": routed.width,
            "experts_per_token": routed.per_token,
            "expert_bias": routed.bias,
        }
    return LayerUnits(**found)
