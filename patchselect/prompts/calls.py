"""What stands in for `forward` and `generate` of a host whose prompts hold the tokens of images."""

from __future__ import annotations

import copy
import inspect
from contextvars import ContextVar
from typing import Any, Mapping, NamedTuple

import torch
from torch import Tensor

from ..calls import bound
from ..wiring.state import Wiring
from .columns import rows_of_images
from .encoded import ENCODED, cache_in, call_encoded, length_of, prompt_of
from .host import Prompted
from .shorten import Short, shorten_call

CACHE = "_patchselect_removed"
"""On a cache of keys: a `Removed`."""
LENGTHS = ("max_length", "min_length")
_generating: ContextVar[bool] = ContextVar("patchselect_generating", default=False)
"""Whether the steps of a `generate` are running, which may go through a prompt in chunks that cut images apart."""


class Removed(NamedTuple):
    """What is missing in the prompt that a cache holds."""

    columns: int
    """By how many columns it is shorter than the caller's."""
    padded: bool
    """Whether rows were padded again."""
    ahead: Tensor | None
    """As of `Short`."""


def call_prompted(module: Any, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `forward`: with pixels the prompt is cut to the tokens that their images have left."""
    wiring: Wiring = module._patchselect
    host: Prompted = wiring.towers[0].adapter  # type: ignore[assignment]
    core = host.core(wiring.model)
    prompt = prompt_of(core)
    if prompt is not None:
        return original(**prompt.step(_bound(original, args, kwargs)))
    if not wiring.plan.selects and not kwargs.get(ENCODED):
        return original(*args, **kwargs)
    given = _bound(original, args, kwargs)
    if given.get(host.image_arguments[0]) is None:
        if not _generating.get():
            _check_encoded(wiring, given)
        return call_encoded(original, host, core, _continued(host, core, given))
    _refuse_filled(cache_in(given))
    _refuse_both(given)
    short = shorten_call(wiring, given)
    output = call_encoded(original, host, core, encoded_call(short))
    _remember(output, given, short)
    return output


def generate_prompted(module: Any, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `generate`: the prompt is cut first, and stands whole in front of what is generated.

    Lengths that count the prompt (`max_length`, `min_length`) go on counting the whole one.
    """
    wiring: Wiring = module._patchselect
    host: Prompted = wiring.towers[0].adapter  # type: ignore[assignment]
    given = _bound(original, args, kwargs)
    if given.get("inputs") is not None and given.get("input_ids") is None:
        given["input_ids"] = given.pop("inputs")
    if wiring.plan.selects:
        _refuse_continuation(cache_in(given))
    if not wiring.plan.selects or given.get(host.image_arguments[0]) is None:
        if wiring.plan.selects:
            _check_encoded(wiring, given)
        return _in_steps(original, host, wiring, given)
    _refuse_filled(cache_in(given))
    _refuse_both(given)
    short = shorten_call(wiring, given, host.counted(module, given, counted_positions(module, given)))
    ids = given.get("input_ids")
    cut = {**encoded_call(short), **_lengths(module, given, short.removed)}
    found = _in_steps(original, host, wiring, cut)
    _remember(found, given, short)
    if ids is None:
        return found
    if isinstance(found, Tensor):
        return _with_whole_prompt(found, ids, short)
    found.sequences = _with_whole_prompt(found.sequences, ids, short)
    return found


def _in_steps(original: Any, host: Prompted, wiring: Wiring, given: Mapping[str, Any]) -> Any:
    token, core = _generating.set(True), host.core(wiring.model)
    try:
        return call_encoded(original, host, core, given, host.first_position(core))
    finally:
        _generating.reset(token)


def _bound(original: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(original).parameters.values()
    return bound([each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD], args, kwargs)


def encoded_call(short: Short) -> dict[str, Any]:
    """Return the arguments of a call that takes encoded images."""
    return {**short.given, ENCODED: {"image": short.encoded}}


def _with_whole_prompt(sequences: Tensor, ids: Tensor, short: Short) -> Tensor:
    """Put the caller's prompt `(B, L)` in the place of the short one, in front of `(B * R, L' + new)`."""
    prompt = ids.to(sequences.device).repeat_interleave(len(sequences) // len(ids), dim=0)
    return torch.cat([prompt, sequences[:, ids.shape[1] - short.removed :]], dim=1)


def counted_positions(model: Any, given: dict[str, Any]) -> Tensor | None:
    """Count positions `(B, L)` as `generate` does, where padding has none; put in the mask that it would take."""
    if given.get("attention_mask") is None and given.get("input_ids") is not None:
        given["attention_mask"] = _mask_of(model, given)
    mask: Tensor | None = given.get("attention_mask")
    if mask is None:
        return None
    return (mask.long().cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)


def _mask_of(model: Any, given: Mapping[str, Any]) -> Tensor:
    """Return the mask that `generate` takes where none is given: padding is seen where its token ends no answer."""
    ids, config = given["input_ids"], given.get("generation_config") or model.generation_config
    pad, end = (given.get(name, getattr(config, name, None)) for name in ("pad_token_id", "eos_token_id"))
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return (ids != pad).to(torch.long)


def _lengths(model: Any, given: dict[str, Any], removed: int) -> dict[str, Any]:
    """Return the arguments that say lengths of the whole sequence, less what was removed."""
    found: dict[str, Any] = {name: given[name] - removed for name in LENGTHS if given.get(name) is not None}
    config = given.get("generation_config")
    own = model.generation_config if config is None else config
    said = {name: getattr(own, name, None) for name in LENGTHS if name not in found}
    if config is not None:
        config = found["generation_config"] = copy.deepcopy(config)
        for name, value in said.items():
            if value:
                setattr(config, name, value - removed)
    elif "max_new_tokens" not in given and own.max_new_tokens is None:
        found.update({name: value - removed for name, value in said.items() if value})
    return found


# What must not pass unseen.


def _check_encoded(wiring: Wiring, given: Mapping[str, Any]) -> None:
    """Raise a ValueError if a row has another number of placeholders than the images that come encoded."""
    if (given.get(ENCODED) or {}).get("image") is None:
        return
    host: Prompted = wiring.towers[0].adapter  # type: ignore[assignment]
    core = host.core(wiring.model)
    lengths = [len(each) for each in host.tokens_of(given[ENCODED]["image"])]
    counts = host.placeholders(core, given).sum(dim=1).tolist()
    if sum(counts) == 0 and cache_in(given) is not None:
        return
    try:
        rows_of_images(counts, lengths)
    except ValueError as error:
        raise ValueError(
            f"{error}. These images come encoded in mm_encoder_outputs: give their pixels, and the prompt is cut with "
            "them, or cut it with patchselect.shorten(model, **inputs)"
        ) from None


def _refuse_both(given: Mapping[str, Any]) -> None:
    if given.get(ENCODED):
        raise ValueError("give pixel_values or mm_encoder_outputs, not both")
    if given.get("input_ids") is None and given.get("inputs") is None and given.get("inputs_embeds") is None:
        raise ValueError("pixel_values came without a prompt: give input_ids or inputs_embeds")


def _refuse_filled(cache: Any) -> None:
    if length_of(cache):
        raise ValueError(
            f"past_key_values holds {length_of(cache)} tokens already, and this call brings images: a prompt with "
            "images starts a new cache; give the whole conversation without past_key_values"
        )


def _refuse_continuation(cache: Any) -> None:
    if length_of(cache) and getattr(cache, CACHE, None) is not None:
        raise ValueError(
            f"past_key_values holds a prompt of which {getattr(cache, CACHE).columns} image placeholders are gone, so "
            "its columns are not those of input_ids: generate from prompts that patchselect.shorten(model, **inputs) "
            "made, whose sequences stay short, or give the whole conversation without past_key_values"
        )


def _remember(output: Any, given: Mapping[str, Any], short: Short) -> None:
    """Note on the cache that a call filled, which it returned or was given, what is missing in its prompt."""
    parts = output if isinstance(output, tuple) else [cache_in(output)]
    for cache in (*parts, cache_in(given)):
        if short.removed and hasattr(cache, "get_seq_length"):
            setattr(cache, CACHE, Removed(short.removed, short.padded, short.ahead))


def _continued(host: Prompted, core: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a step that goes on from a cache of a prompt that was cut, with its positions and mask.

    Raises:
        ValueError: the mask is that of the whole prompt, and has padding.
    """
    cache = cache_in(given)
    found = getattr(cache, CACHE, None)
    if found is None:
        if given.get("position_ids") is not None and given.get("attention_mask") is None and cache is None:
            positions = given["position_ids"]
            rows = len(given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"])
            seen = torch.ones(rows, positions.shape[-1], dtype=torch.long, device=positions.device)
            return {**given, "attention_mask": seen}  # else jumps between positions are read as packed sequences
        return given
    (removed, padded, ahead), length = found, length_of(cache)
    if length == 0:
        delattr(cache, CACHE)
        return given
    tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    width: int = tokens.shape[1]
    mask: Any = given.get("attention_mask")
    asked = given.get("position_ids") is None
    if asked and ahead is None:
        start = length + removed + host.first_position(core)
        given = {**given, "position_ids": torch.arange(start, start + width, device=tokens.device).unsqueeze(0)}
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length + width + removed:
        if padded or not bool(mask.all()):
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns, and the cache holds {length} tokens of a prompt of which "
                f"{removed} placeholders were removed: with padding it must be cut alike; start from "
                "patchselect.shorten(model, **inputs), which returns the short mask"
            )
        mask = mask[:, removed:]
        given = {**given, "attention_mask": mask}
    if asked and ahead is not None:
        seen = torch.ones(len(tokens), length + width, device=tokens.device) if mask is None else mask
        ahead = ahead.repeat_interleave(len(tokens) // len(ahead), dim=0).to(tokens.device)
        given = {**given, "position_ids": (seen.long().cumsum(dim=-1) - 1)[:, -width:] + ahead}
    return given
