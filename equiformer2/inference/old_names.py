"""Arguments of other packages' calculators, answered with the name that they have here."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from equiformer2.errors import InputError

_P = ParamSpec("_P")
_R = TypeVar("_R")

_CHECKPOINT = "is checkpoint= here (a path)"
_IN_CHECKPOINT = "is not needed: the checkpoint holds its own settings"
OLD_NAMES = {
    "checkpoint_path": _CHECKPOINT,
    "checkpoints": _CHECKPOINT,
    "model": _CHECKPOINT,
    "model_path": _CHECKPOINT,
    "model_paths": _CHECKPOINT,
    "name_or_path": _CHECKPOINT,
    "predict_unit": _CHECKPOINT,
    "potential": _CHECKPOINT,
    "weights_path": _CHECKPOINT,
    "model_name": "is checkpoint= here: give the path of the downloaded file, names are not looked up",
    "local_cache": "is not needed: checkpoint= takes the path of the downloaded file",
    "cpu": 'is device= here: "cpu" for cpu=True, "cuda" for cpu=False',
    "use_device": "is device= here",
    "config_yml": _IN_CHECKPOINT,
    "config": _IN_CHECKPOINT,
    "cutoff": _IN_CHECKPOINT,
    "max_neighbors": _IN_CHECKPOINT,
    "max_neigh": _IN_CHECKPOINT,
    "trainer": "is not needed: whether there are forces is known from the checkpoint",
    "only_output": "is not needed: whether there are forces is known from the checkpoint",
    "task": "is energy_kind= here, for a file that does not say it",
    "task_name": "is energy_kind= here, for a file that does not say it",
    "seed": "is not needed: nothing is drawn at random, two calls give the same bits",
    "amp": 'is precision= here: "bf16" for amp=True',
    "disable_amp": 'is precision= here: "float32" is the default',
    "dtype": 'is precision= here: "float32", "tf32" or "bf16"',
    "default_dtype": 'is precision= here: "float32", "tf32" or "bf16"',
    "inference_settings": "is precision= and backend= here",
    "compile": 'is backend="compile" here',
    "ema": 'is weights= here: "averaged" or "raw"',
}
"""Names of arguments of fairchem's, OCP's and other calculators -> the rest of a sentence about them."""


def answering_old_names(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function that has none of `OLD_NAMES`: a call with one raises an explaining `InputError`."""

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        old = [name for name in kwargs if name in OLD_NAMES]
        if old:
            raise InputError("; ".join(f"the argument {name}= {OLD_NAMES[name]}" for name in old))
        return function(*args, **kwargs)

    return checked
