"""MultiPruner and BlockPruner: which cuts a greedy search may make, in which sequence.

MultiPruner (arXiv 2501.09949) cuts one dimension after another, each to a fixed part of the target; its parts
for language models (44 % blocks, 52 % feed-forward widths, 4 % heads) follow where their parameters are. Here
nearly all multiply-accumulates are in the messages, so the parts are others. `multi` lets all dimensions
compete in every step instead. BlockPruner (arXiv 2406.10594) removes residual branches alone, always the one
whose removal hurts least, whatever it saves.
"""

from typing import Any, Literal

from equiformer2.errors import InputError
from equiformer2.pruning.search import SearchSettings, Stage

#: All dimensions but the sphere channels, whose removal changes what the norms see.
JOINT = ("block", "order", "attn_hidden", "head", "value", "ffn")
_STAGED = (("block", 0.2), ("order", 0.5), ("attn_hidden", 0.75), ("head", 0.9))
_LAST = ("attn_hidden", "head", "value", "ffn")

SEARCHES = ("multi", "multi_staged", "block")


def search_settings(
    method: str,
    tries: int = 8,
    seed: int = 0,
    sphere: bool = False,
    importance: Literal["michel", "taylor"] = "michel",
) -> SearchSettings:
    """How `method` searches.

    Args:
        method: `multi` (all dimensions at once), `multi_staged` (MultiPruner's sequence of dimensions) or
            `block` (BlockPruner).
        tries: cuts tried per step.
        seed: of the draws.
        sphere: also cut channels of the atoms' features; recover by training afterwards.
        importance: by which units are ranked before any cut is tried.

    Raises:
        InputError: an unknown method.
    """
    if method not in SEARCHES:
        raise InputError(f"the search {method!r} is not known: use one of {', '.join(SEARCHES)}")
    common: dict[str, Any] = {"tries": tries, "seed": seed, "importance": importance}
    if method == "block":
        return SearchSettings((Stage(("block",)),), per_cost=False, **common)
    if method == "multi":
        return SearchSettings((Stage((*JOINT, "sphere") if sphere else JOINT),), **common)
    stages = [Stage((dimension,), share) for dimension, share in _STAGED]
    # Feed-forward widths alone cost too little to close the gap.
    stages.append(Stage((*_LAST, "sphere") if sphere else _LAST))
    return SearchSettings(tuple(stages), **common)
