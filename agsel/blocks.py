"""Model -> ordered list of named blocks -> optimizer param groups.

A *block* is one decoder layer, or the embedding, the final norm, the head. Every parameter of a decoder model falls in
exactly one block; tied weights belong to the embedding. One param group per block is what lets ZeRO keep one flat
optimizer partition per block and per rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

EMBED, FINAL_NORM, HEAD = "embed", "final_norm", "head"


@dataclass(frozen=True)
class Block:
    """A named set of parameters that is selected, updated and moved as one."""

    name: str
    parameters: tuple[nn.Parameter, ...]

    @property
    def trainable(self) -> tuple[nn.Parameter, ...]:
        """The parameters that require a gradient now."""
        return tuple(parameter for parameter in self.parameters if parameter.requires_grad)

    @property
    def is_layer(self) -> bool:
        """Whether this is a decoder layer, not the embedding, the final norm or the head."""
        return self.name.startswith("layers.")


def find_blocks(model: nn.Module) -> list[Block]:
    """Name the blocks of a decoder model in forward order: `embed`, `layers.0` ..., `final_norm`, `head`.

    Works on any Hugging Face decoder (the layer class is read from `_no_split_modules`), on PEFT models and on plain
    modules whose layers are one `nn.ModuleList`. Blocks without parameters (a head tied to the embedding) are left out.

    Raises:
        ValueError: no decoder layers are found, or a trainable parameter falls in no block.
    """
    layers, decoder = _decoder_layers(model)
    embedding = {id(p) for p in _submodule_parameters(model, "get_input_embeddings")}
    head = {id(p) for p in _submodule_parameters(model, "get_output_embeddings")} - embedding
    names_of_layers = {
        id(p): f"layers.{index}" for index, layer in reversed(list(enumerate(layers))) for p in layer.parameters()
    }
    norms = {id(p) for module in model.modules() if _is_norm(module) for p in module.parameters()}
    own = {id(p) for p in decoder.parameters()}

    def block_of(name: str, key: int) -> str | None:
        if key in embedding:
            return EMBED
        if key in head:
            return HEAD
        if key in names_of_layers:
            return names_of_layers[key]
        if key in norms and "emb" not in name:
            return FINAL_NORM
        return EMBED if key in own else None

    members: dict[str, list[nn.Parameter]] = {EMBED: []}
    members |= {f"layers.{index}": [] for index in range(len(layers))} | {FINAL_NORM: [], HEAD: []}
    homeless = []
    for name, parameter in model.named_parameters():
        block = block_of(name, id(parameter))
        if block is not None:
            members[block].append(parameter)
        elif parameter.requires_grad:
            homeless.append(name)
    if homeless:
        raise ValueError(
            f"parameters in no block: {', '.join(homeless[:3])}{' ...' if len(homeless) > 3 else ''}; "
            "freeze them with requires_grad_(False) before calling agsel, or train without them"
        )
    return [Block(name, tuple(parameters)) for name, parameters in members.items() if parameters]


def block_param_groups(model: nn.Module, blocks: Literal["layers", "all"] = "layers") -> list[dict[str, Any]]:
    """One optimizer param group per block that takes part; everything else is frozen.

    Args:
        model: a decoder model, before `deepspeed.initialize`, with every block trainable.
        blocks: `"layers"` selects among the decoder layers and freezes embedding, final norm and head; `"all"` makes
            those selectable blocks too, as in the AdaGradSelect paper, at the price of a full-depth backward.

    Returns:
        `[{"params": [...]}, ...]` in forward order, for a `torch.optim.AdamW`.

    Raises:
        ValueError: `blocks` is neither value, no blocks are found, or a block has no trainable parameter. A PEFT
            model's blocks without adapters are left out instead.
    """
    if blocks not in ("layers", "all"):
        raise ValueError(f"blocks must be 'layers' or 'all', got {blocks!r} (--select_blocks)")
    is_peft = hasattr(model, "peft_config")
    groups = []
    for block in find_blocks(model):
        if blocks == "layers" and not block.is_layer:
            for parameter in block.parameters:
                parameter.requires_grad_(False)
        elif block.trainable:
            groups.append({"params": list(block.trainable)})
        elif not is_peft:
            raise ValueError(
                f"block {block.name!r} is frozen: every block must be trainable at deepspeed.initialize; "
                "call requires_grad_(True) on it, agsel freezes what is not selected"
            )
    if not groups:
        raise ValueError("no block has a trainable parameter: give the PEFT model adapters inside its decoder layers")
    return groups


def global_numel(parameters: Iterable[nn.Parameter]) -> int:
    """Number of elements of the whole parameters, also when ZeRO-3 has partitioned them."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def _decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """The list of decoder layers and the module around it."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    root = decoder if isinstance(decoder, nn.Module) and _outermost_layer_lists(decoder) else model
    found = _outermost_layer_lists(root)
    declared = set(getattr(model, "_no_split_modules", None) or ())
    candidates = [pair for pair in found if type(pair[0][0]).__name__ in declared] or found
    if not candidates:
        raise ValueError(
            f"no decoder layers found in {type(model).__name__}: agsel needs an nn.ModuleList of layers of one class"
        )
    longest = max(len(layers) for layers, _ in candidates)
    best = [pair for pair in candidates if len(pair[0]) == longest]
    if len(best) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(best)} stacks of {longest} layers: agsel selects among the layers of "
            "decoder-only models; use one of those"
        )
    return best[0]


def _outermost_layer_lists(root: nn.Module) -> list[tuple[nn.ModuleList, nn.Module]]:
    """Every `nn.ModuleList` of one class with parameters that is not inside another, with the module that holds it.

    The experts of a mixture-of-experts layer are a longer list than the layers themselves, hence "outermost".
    """
    if isinstance(root, nn.ModuleList):
        return []
    found: list[tuple[nn.ModuleList, nn.Module]] = []
    for child in root.children():
        if isinstance(child, nn.ModuleList) and len(child) and len({type(layer) for layer in child}) == 1:
            if any(True for _ in child.parameters()):
                found.append((child, root))
        else:
            found += _outermost_layer_lists(child)
    return found


def _submodule_parameters(model: nn.Module, getter: str) -> list[nn.Parameter]:
    """Parameters of `model.<getter>()`, or none where the model has no such method or no such module."""
    method = getattr(model, getter, None)
    try:
        module = method() if callable(method) else None
    except (AttributeError, NotImplementedError):
        module = None
    return list(module.parameters()) if isinstance(module, nn.Module) else []


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
