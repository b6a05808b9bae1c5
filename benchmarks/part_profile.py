"""Profile one call: the events of torch's profiler, sorted into the parts of the network.

Every module's forward, every other method of the package's modules and every function of its kernels becomes
a named range for the time of the measurement. An operation belongs to the part that its enclosing ranges
name; one of the backward pass to the part of the operation that it differentiates. Nothing in the package
has to be prepared; markers named `equiformer2::…` are used where it sets them.
"""

import functools
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import operation_counts as counting

RANGE = "in:"
ENGINE = "autograd::engine"
BACKWARD = re.compile(rf"{ENGINE}|Backward\d*$")
GEMMS = re.compile(r"aten::(mm|addmm_?|baddbmm)$|mkldnn_linear|linear_pointwise")
MARKERS = {
    "equiformer2::gather_rotate": counting.ROTATE,
    "equiformer2::s2_activation": counting.ACTIVATION,
    "equiformer2::segment_softmax": counting.SOFTMAX,
    "equiformer2::aggregate": counting.AGGREGATE,
    "equiformer2::feed_forward": counting.FEED_FORWARD,
    "equiformer2::radial": counting.RADIAL,
    "equiformer2::norm": counting.NORM,
}
# The first one found in the ranges around an operation.
RULES: tuple[tuple[str, str], ...] = (
    (r"Optimizer\.step", counting.OPTIMIZER),
    (r"\b(energy_block|force_block)\b", counting.HEADS),
    (r"build_graph|radius_graph", counting.GRAPH),
    (r"edge_degree_embedding", counting.EDGE_DEGREE),
    (r"edge_context|distance_basis|[Ww]igner|EdgeFrames|in:\._rotations\b", counting.FRAMES),
    (r"\bffn\b", counting.FEED_FORWARD),
    (r"in:(blocks\.\d+\.)?norm(_\d)?\b", counting.NORM),
    (r"so2_conv_2", counting.CONVOLVE_2),
    (r"softmax|attention_weights|\balpha_", counting.SOFTMAX),
    (r"\.activation\b|grid_activation|separable_activation", counting.ACTIVATION),
    (r"aggregate|Aggregate|in:attend|SumMessages", counting.AGGREGATE),
    (r"\.ga\.proj\b", counting.PROJECT),
    (r"rad_func|radial|element_pairs|(source|target)_embedding", counting.RADIAL),
    (r"[Cc]onvolve|so2_conv_1|rotate", counting.ROTATE),
)


def part_of(ranges: Sequence[str], operation: str, shapes: Sequence[Any], radial_widths: set[int]) -> str:
    """The part of one operation from the names of the ranges around it, outermost first.

    Rotations are batched products; plain products in either half of a message are those of its SO(2) weights
    or, in the first half and recognised by `radial_widths`, the last layer of the radial function.
    """
    path = " ".join((*ranges, operation))
    found = next((part for pattern, part in RULES if re.search(pattern, path)), counting.OTHER)
    if found in (counting.HEADS, counting.OPTIMIZER):
        return found
    for name in reversed(ranges):
        if name == "equiformer2::so2_gemm":
            second = found in (counting.CONVOLVE_2, counting.AGGREGATE)
            return counting.CONVOLVE_2 if second else counting.CONVOLVE_1
        if name in MARKERS:
            return MARKERS[name]
    if GEMMS.search(operation):
        if found == counting.AGGREGATE:
            return counting.CONVOLVE_2
        if found == counting.ROTATE:
            sizes = {size for shape in shapes or () if isinstance(shape, list | tuple) for size in shape}
            return counting.RADIAL if sizes & radial_widths else counting.CONVOLVE_1
    return found


def profile_parts(model: nn.Module, call: Callable[[], Any], device: str) -> dict[str, Any]:
    """Seconds per part of one `call` of the model, after a warm-up.

    Returns:
        `parts` {name: [forward, backward]}, which add up to `total`; on a GPU the time of its kernels.
    """
    call()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with named_ranges(model), profile(activities=activities, record_shapes=True) as profiler:
        call()
    parts: dict[str, list[float]] = {}
    for part, backward, seconds in sort_events(list(profiler.events()), _radial_widths(model), device):
        parts.setdefault(part, [0.0, 0.0])[backward] += seconds
    return {"parts": parts, "total": sum(map(sum, parts.values()))}


def sort_events(events: list[Any], radial_widths: set[int], device: str) -> Iterator[tuple[str, bool, float]]:
    """Part, whether of the backward pass, and own seconds of every event of a profile."""
    forward: dict[tuple[int, int], list[str]] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        # The last operation with a number is the one that made the node of the graph that has it. Backward
        # passes that compute something once more make nodes, too.
        if event.sequence_nr >= 0 and not BACKWARD.search(event.name):
            forward[event.thread, event.sequence_nr] = [*_ranges(event), event.name]
    for event in events:
        ranges: list[str] = []
        backward = False
        for outer in (*_parents(event), event):
            if outer.name.startswith(ENGINE):
                backward = True
                ranges += forward.get((outer.fwd_thread, outer.sequence_nr), [])
            elif outer is not event:
                ranges.append(outer.name)
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if own:
            yield part_of(ranges, event.name, event.input_shapes, radial_widths), backward, own * 1e-6


def _ranges(event: Any) -> list[str]:
    """Names of the events around an event, outermost first."""
    return [parent.name for parent in _parents(event)]


def _parents(event: Any) -> list[Any]:
    parents = []
    parent = event.cpu_parent
    while parent is not None:
        parents.append(parent)
        parent = parent.cpu_parent
    return parents[::-1]


def _radial_widths(model: nn.Module) -> set[int]:
    """Output sizes of the radial functions."""
    widths = {}
    for name, module in model.named_modules():
        if "rad_func" in name and isinstance(module, nn.Linear):
            widths[name.partition("rad_func")[0]] = module.out_features
    return set(widths.values())


@contextmanager
def named_ranges(model: nn.Module) -> Iterator[None]:
    """Make the model's methods and the package's kernels named ranges; nothing is left behind."""
    instances: list[tuple[nn.Module, str]] = []
    functions: list[tuple[types.ModuleType, str, Any]] = []
    try:
        for name, module in model.named_modules():
            for method in _methods(module):
                label = name if method == "forward" else f"{name}.{method}"
                # On the instance, where it hides the class's method.
                module.__dict__[method] = _in_range(getattr(module, method), RANGE + label)
                instances.append((module, method))
        for module_name, holder in list(sys.modules.items()):
            if module_name.startswith("equiformer2."):
                for name, value in list(vars(holder).items()):
                    if _is_kernel(value):
                        functions.append((holder, name, value))
                        setattr(holder, name, _in_range(value, RANGE + name))
        yield
    finally:
        for module, method in instances:
            del module.__dict__[method]
        for holder, name, value in functions:
            setattr(holder, name, value)


def _is_kernel(value: Any) -> bool:
    """Whether it is a public function of the kernels; how they cut their work into chunks is no kernel."""
    if not isinstance(value, types.FunctionType) or value.__name__.startswith("_"):
        return False
    return value.__module__.startswith("equiformer2.kernels") and not value.__module__.endswith(".chunks")


def _methods(module: nn.Module) -> list[str]:
    """`forward`, and what a module of the package defines itself."""
    if not type(module).__module__.startswith("equiformer2."):
        return ["forward"]
    own = [
        name
        for name, value in vars(type(module)).items()
        if isinstance(value, types.FunctionType) and not name.startswith("__") and name != "forward"
    ]
    return ["forward", *own]


def _in_range(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        with record_function(label):
            return function(*arguments, **keywords)

    return wrapped
