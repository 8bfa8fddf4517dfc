"""Model -> ordered list of named blocks -> optimizer param groups.

A *block* is one decoder layer, or the embedding, the final norm, the head. Every parameter of a decoder model falls in
exactly one block; tied weights belong to the embedding. One param group per block is what lets ZeRO keep one flat
optimizer partition per block and per rank.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

import torch
from torch import nn

from agsel.errors import UserError

EMBED, FINAL_NORM, HEAD = "embed", "final_norm", "head"


@dataclass(frozen=True, eq=False)
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


class TrainedInPart(nn.Module):
    """A module whose weights are frozen but for some of their elements; layers without any need not be trainable."""


def find_blocks(model: nn.Module) -> list[Block]:
    """Name the blocks of a decoder model in forward order: `embed`, `layers.0` ..., `final_norm`, `head`.

    Works on any Hugging Face decoder (the layer classes are read from `_no_split_modules`), also inside PEFT or another
    wrapper, and on plain modules whose layers are one `nn.ModuleList`. What is used before the layers is in `embed`, a
    norm after them in `final_norm`, anything else after them in `head`: the code of the forward tells, and where it
    does not, the order in which modules are registered. Blocks without parameters (a head tied to the embedding) are
    left out; frozen parameters outside the decoder (a vision tower) are in no block.

    Raises:
        UserError: no decoder layers are found, the model is an encoder-decoder, or a trainable parameter falls in no
            block.
    """
    block_of = _block_names(_language_model(model))
    members: dict[str, list[nn.Parameter]] = {}
    homeless = []
    for name, parameter in model.named_parameters():
        if block := block_of.get(id(parameter)):
            members.setdefault(block, []).append(parameter)
        elif parameter.requires_grad:
            homeless.append(name)
    if homeless:
        raise UserError(
            f"parameters in no block: {', '.join(homeless[:3])}{' ...' if len(homeless) > 3 else ''}; "
            "freeze them with requires_grad_(False) before calling agsel, or train without them"
        )
    return [Block(name, tuple(members[name])) for name in sorted(members, key=_forward_position)]


def taking_part(
    found: Sequence[Block], blocks: Literal["layers", "all"] = "layers", select_from: float = 0
) -> list[Block]:
    """Of a model's blocks, those that take part.

    Args:
        found: of `find_blocks`.
        blocks: `"layers"` leaves out embedding, final norm and head.
        select_from: number of the lowest layer that takes part, or, below 1, the share of the layers below it.

    Raises:
        UserError: `blocks` is neither value, or there is no such layer, or all of the model is to take part.
    """
    require_scope(blocks, select_from)
    layers = [block for block in found if block.is_layer]
    chosen = layers[_lowest_layer(select_from, len(layers)) :]
    return [block for block in found if blocks == "all" or block in chosen]


def require_scope(blocks: str, select_from: float) -> None:
    """Refuse what is wrong for every model.

    Raises:
        UserError: as of `taking_part`.
    """
    if blocks not in ("layers", "all"):
        raise UserError(f"blocks must be 'layers' or 'all', got {blocks!r} (--select_blocks)")
    if not select_from >= 0 or (select_from >= 1 and select_from % 1 != 0):
        raise UserError(
            f"select_from must be the number of a layer, or a share of the layers below 1, got {select_from:g} "
            "(--select_from)"
        )
    if select_from and blocks == "all":
        raise UserError(
            "select_from keeps the backward from the layers below, but the embedding needs it through all of them: "
            "leave it out (--select_from), or select among the layers (--select_blocks layers)"
        )


def _lowest_layer(select_from: float, layers: int) -> int:
    rounding_slack = 1e-9  # 0.29 * 100 is 28.999999999999996, and 29 is meant
    lowest = int(select_from * layers + rounding_slack) if select_from < 1 else int(select_from)
    if lowest >= layers:
        raise UserError(
            f"select_from is {lowest}, and the model has layers 0 to {layers - 1}: choose a lower one (--select_from)"
        )
    return lowest


def block_param_groups(
    model: nn.Module, blocks: Literal["layers", "all"] = "layers", select_from: float = 0
) -> list[dict[str, Any]]:
    """One optimizer param group per block that takes part; everything else is frozen.

    Args:
        model: a decoder model, before `deepspeed.initialize`, with every block trainable.
        blocks: `"layers"` selects among the decoder layers and freezes embedding, final norm and head; `"all"` makes
            those selectable blocks too, as in the AdaGradSelect paper, at the price of a full-depth backward.
        select_from: number of the lowest layer that takes part, or, below 1, the share of the layers below it. These
            are frozen for good: no backward reaches them, and there are no optimizer states of them.

    Returns:
        `[{"params": [...]}, ...]` in forward order, for a `torch.optim.AdamW`.

    Raises:
        UserError: as of `taking_part`, no blocks are found, or a block has no trainable parameter. A PEFT model's
            blocks without adapters, and those without trained elements, are left out instead.
    """
    in_part = hasattr(_language_model(model), "peft_config") or _has_elements(model)
    found = find_blocks(model)
    chosen = taking_part(found, blocks, select_from)
    groups = []
    for block in found:
        if block not in chosen:
            for parameter in block.parameters:
                parameter.requires_grad_(False)
        elif block.trainable:
            groups.append({"params": list(block.trainable)})
        elif not in_part:
            raise UserError(
                f"block {block.name!r} is frozen: every block must be trainable at deepspeed.initialize; "
                "call requires_grad_(True) on it, agsel freezes what is not selected"
            )
    if not groups:
        raise UserError("no block has a trainable parameter: give the PEFT model adapters inside its decoder layers")
    return groups


def _has_elements(model: nn.Module) -> bool:
    return any(isinstance(module, TrainedInPart) for module in model.modules())


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a model, in forward order.

    Raises:
        UserError: none are found.
    """
    language_model = _language_model(model)
    return _layer_stacks(language_model, _decoder(language_model))[0]


def hidden_states(*arguments: Any) -> torch.Tensor | None:
    """Among what a layer is called with, the first tensor of floating-point numbers."""
    return next((value for value in arguments if torch.is_tensor(value) and value.is_floating_point()), None)


def _language_model(model: nn.Module) -> nn.Module:
    """The outermost module that tells its embedding, layers and head apart; `model` itself if none does."""
    return next((module for module in model.modules() if hasattr(module, "get_output_embeddings")), model)


def _block_names(model: nn.Module) -> dict[int, str]:
    """Block name by `id(parameter)`, for the parameters of the decoder and its head."""
    decoder = _decoder(model)
    layers, *other_stacks = _layer_stacks(model, decoder)
    in_layers = {id(p): f"layers.{i}" for i, layer in reversed(list(enumerate(layers))) for p in layer.parameters()}
    elsewhere = {id(p) for stack in other_stacks for p in stack.parameters()}
    around = {key: block for key, block in _around(layers, decoder, model).items() if key not in elsewhere}
    head = dict.fromkeys(_ids_of_submodule(model, "get_output_embeddings"), HEAD)
    embedding = dict.fromkeys(_ids_of_submodule(model, "get_input_embeddings"), EMBED)
    return around | in_layers | head | embedding


def _around(layers: nn.ModuleList, decoder: nn.Module, model: nn.Module) -> dict[int, str]:
    """Block name by `id(parameter)` of what is used before and after the layers.

    Around the decoder only what is surely used after it belongs to the language model; a vision tower comes before.
    """
    norms = {id(p) for module in model.modules() if _is_norm(module) for p in module.parameters(recurse=False)}
    inside = {*decoder.modules()}
    found: dict[int, str] = {}
    for outer, inner in _way_to(layers, model):
        names = [name.partition(".")[0] for name, _ in outer.named_parameters()]
        orders = [_in_order_of_use(type(outer)), *([names] if outer in inside else [])]
        after = {name for name in {*names} if _is_after(name, inner, orders)}
        for name, parameter in zip(names, outer.parameters(), strict=True):
            if name in after:
                found[id(parameter)] = FINAL_NORM if id(parameter) in norms else HEAD
            elif outer in inside:
                found[id(parameter)] = EMBED
    return found


def _way_to(layers: nn.ModuleList, model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """From the model inward: a module, and the name of that in it which holds the layers."""
    path = next(name for name, module in model.named_modules() if module is layers)
    for name in filter(None, path.split(".")):
        yield model, name
        model = getattr(model, name)


def _is_after(name: str, layers: str, orders: list[list[str]]) -> bool:
    """Whether the last mention of a name comes after that of the layers, in the first of the orders with both."""
    for order in orders:
        places = {known: place for place, known in enumerate(order)}
        if {name, layers} <= places.keys():
            return places[name] > places[layers]
    return False


def _in_order_of_use(kind: type[nn.Module], method: str = "forward", callers: tuple[str, ...] = ()) -> list[str]:
    """What the forward of a module reads of the module, by name, itself or in methods that it calls."""
    code = getattr(inspect.unwrap(getattr(kind, method)), "__code__", None)
    order = []
    for name in _read_of_self(code) if code else ():
        order.append(name)
        if name not in callers and inspect.isfunction(getattr(kind, name, None)):
            order += _in_order_of_use(kind, name, (*callers, name))
    return order


def _read_of_self(code: CodeType) -> Iterator[str]:
    loaded = ""
    for instruction in dis.get_instructions(code):
        if inspect.iscode(instruction.argval):  # a comprehension
            yield from _read_of_self(instruction.argval)
        elif loaded == "self" and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield instruction.argval
        loaded = instruction.argrepr.split(", ")[-1]  # newer Pythons load two variables at once


def _decoder(model: nn.Module) -> nn.Module:
    """The model without its head; all of it where it does not tell."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(f"{type(model).__name__} is an encoder-decoder: agsel needs a decoder-only language model")
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) and _outermost_lists(decoder) else model


def _layer_stacks(model: nn.Module, decoder: nn.Module) -> list[nn.ModuleList]:
    """The stacks of layers inside the decoder, its own layers first."""
    found = _outermost_lists(decoder)
    declared = set(getattr(model, "_no_split_modules", None) or ())
    stacks = [layers for layers in found if _classes(layers) <= declared]
    stacks = stacks or [layers for layers in found if len(_classes(layers)) == 1]
    if not stacks:
        raise UserError(
            f"no decoder layers found in {type(model).__name__}: agsel needs an nn.ModuleList of layers of one class"
        )
    stacks.sort(key=lambda layers: (len(layers) == _configured_layers(model), len(layers)), reverse=True)
    longest = sum(len(layers) == len(stacks[0]) for layers in stacks)
    if longest > 1:
        raise UserError(
            f"{type(model).__name__} has {longest} stacks of {len(stacks[0])} layers: agsel selects among the layers "
            "of decoder-only models; use one of those"
        )
    return stacks


def _configured_layers(model: nn.Module) -> int | None:
    """How many layers the language model has, if it says so."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(text, "num_hidden_layers", None)


def _outermost_lists(root: nn.Module) -> list[nn.ModuleList]:
    """Every `nn.ModuleList` with parameters that is not inside another one.

    The experts of a mixture-of-experts layer can be a longer list than the layers themselves, hence "outermost".
    """
    if isinstance(root, nn.ModuleList):
        return [root] if any(True for _ in root.parameters()) else []
    return [layers for child in root.children() for layers in _outermost_lists(child)]


def _forward_position(block: str) -> tuple[int, int]:
    kind, _, index = block.partition(".")
    return (EMBED, "layers", FINAL_NORM, HEAD).index(kind), int(index or 0)


def _ids_of_submodule(model: nn.Module, getter: str) -> list[int]:
    """`id` of the parameters of `model.<getter>()`; none where the model has no such method or no such module."""
    method = getattr(model, getter, None)
    try:
        module = method() if callable(method) else None
    except (AttributeError, NotImplementedError):
        module = None
    return [id(parameter) for parameter in module.parameters()] if isinstance(module, nn.Module) else []


def _classes(modules: nn.ModuleList) -> set[str]:
    return {type(module).__name__ for module in modules}


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
