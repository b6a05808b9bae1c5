"""Check configurations before anything is built of them and before any module is imported."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from datasets_oc20 import DataError
from datasets_oc20.untrusted import load_yaml
from equiformer2.errors import InputError

_LIGHTNING = "pytorch_lightning.callbacks"
#: Classes that `trainer.callbacks` may name: to name a class imports its module, which runs what is in it.
#: None of them takes a function or an object, which would be named, and imported, in the same way.
CALLBACKS = (
    "equiformer2.pruning.recovery.callbacks.DenseTeacher",
    "equiformer2.pruning.recovery.callbacks.GradualPruning",
    "equiformer2.pruning.recovery.router_callback.TrainRouter",
    f"{_LIGHTNING}.DeviceStatsMonitor",
    f"{_LIGHTNING}.EarlyStopping",
    f"{_LIGHTNING}.LearningRateMonitor",
    f"{_LIGHTNING}.ModelSummary",
    f"{_LIGHTNING}.RichModelSummary",
    f"{_LIGHTNING}.Timer",
    f"{_LIGHTNING}.TQDMProgressBar",
)

_CALLBACK_NAMES = ", ".join(path.rsplit(".", 1)[-1] for path in CALLBACKS)

#: Keys of fairchem and OCP, which users know, and the key, or the advice, that stands for them here.
FOREIGN_KEYS = {
    "amp": "trainer.precision: bf16-mixed",
    "checkpoint": "init_from (start from its weights) or ckpt_path (resume)",
    "checkpoint_every": "checkpoint_every_n_steps",
    "checkpoint_path": "init_from (start from its weights) or ckpt_path (resume)",
    "clip_grad_norm": "optim.clip_grad_norm",
    "cpu": "trainer.accelerator: cpu",
    "cutoff": "model.max_radius",
    "dataset": "data.train and data.val",
    "device": "trainer.accelerator",
    "ema_decay": "task.ema_decay",
    "energy_coefficient": "task.energy_coefficient",
    "epochs": "trainer.max_epochs",
    "eval_batch_size": "data.batch_size",
    "eval_every": "trainer.val_check_interval",
    "force_coefficient": "task.force_coefficient",
    "grad_accumulation_steps": "trainer.accumulate_grad_batches",
    "grad_target_std": "data.normalizers.forces_std",
    "identifier": "name",
    "learning_rate": "optim.lr",
    "logger": "wandb.project",
    "lr_initial": "optim.lr",
    "max_num_neighbors": "model.max_neighbors",
    "num_gpus": "trainer.devices",
    "num_gaussians": "model.num_distance_basis",
    "primary_metric": "task.monitor",
    "print_every": "trainer.log_every_n_steps",
    "regress_forces": "model.forces",
    "run_dir": "runs_dir",
    "run-dir": "runs_dir",
    "scheduler": "optim.schedule",
    "src": "data.train, data.val",
    "target_mean": "data.normalizers.energy_mean",
    "target_std": "data.normalizers.energy_std",
    "val_dataset": "data.val",
    "weight_decay": "optim.weight_decay",
}
#: Keys of theirs that have no counterpart, with the reason.
_WITHOUT_COUNTERPART = {
    "grad_target_mean": "the mean force is 0 here, as in OC20: leave it out",
    "load_balancing": "batches are always balanced: leave it out",
    "loss_energy": "the energy's loss is the mean absolute error: leave it out",
    "loss_force": "the forces' loss is the mean norm of the error: leave it out",
    "normalize_labels": "targets are always normalised: leave it out",
    "optimizer": "the optimizer is AdamW: leave it out",
    "otf_graph": "graphs are always made on the fly: leave it out",
    "use_pbc": "periodicity is a field of every structure: leave it out",
}


def foreign_key_hint(key: str) -> str | None:
    """The end of a message about an unknown key, if fairchem or OCP have one of that name."""
    last = key.rsplit(".", 1)[-1]
    if last in FOREIGN_KEYS:
        return f"fairchem's {last} is {FOREIGN_KEYS[last]} here"
    if last in _WITHOUT_COUNTERPART:
        return f"{last}: {_WITHOUT_COUNTERPART[last]}"
    return None


def check_finite(value: Any, where: str) -> None:
    """Raise `InputError`, naming the key, for a number in `value`, at any depth, that is not finite."""
    for key, number in _leaves(value):
        if isinstance(number, float) and not math.isfinite(number):
            name = ".".join(part for part in (where, key) if part)
            raise InputError(f"{name} is {number}; give a finite number")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, key)
    else:
        yield key, value


def check_no_imports(key: str, value: Any, groups: set[str], where: str) -> None:
    """Raise `InputError` for a value that would make the parser import a module which nobody has allowed.

    Args:
        key: dotted key; `""` for a whole configuration.
        value: of the key, as YAML gives it.
        groups: keys that hold keys of their own and are no classes to choose from.
        where: the file, or the command line.
    """
    if f"{key}[]" in groups and value is not None and not isinstance(value, list | tuple):
        raise InputError(f"{where}: {key} is {value!r}; it must be a list of keys and values")
    if key in groups and value is not None and not isinstance(value, Mapping):
        file = "; for a file use --config" if where == "command line" else ""
        raise InputError(f"{where}: {key} is {value!r}; it must hold keys and values{file}")
    if key == "trainer.callbacks" or key.startswith("trainer.callbacks."):
        _check_callbacks(key.removeprefix("trainer.callbacks").removeprefix("."), value, where)
    elif isinstance(value, Mapping):
        if "class_path" in value:
            raise InputError(
                f"{where}: {key or 'the top level'} names a class_path, which only "
                "trainer.callbacks may: leave it out"
            )
        for name, item in value.items():
            check_no_imports(f"{key}.{name}" if key else str(name), item, groups, where)
    elif isinstance(value, list | tuple):
        for item in value:
            check_no_imports(f"{key}[]", item, groups, where)


def _check_callbacks(inside: str, value: Any, where: str) -> None:
    """Check `trainer.callbacks`, or the value at the key `inside` of its last entry."""

    def check_allowed(name: str) -> None:
        if name not in CALLBACKS and name not in _CALLBACK_NAMES.split(", "):
            raise InputError(
                f"{where}: trainer.callbacks names {name!r}, and a configuration may name only "
                f"{_CALLBACK_NAMES}; add a callback of yours in Python (docs/training.md)"
            )

    def check_no_class(arguments: Any) -> None:
        if any("class_path" in key.split(".") for key, _ in _leaves(arguments)):
            raise InputError(f"{where}: a class_path inside another one's init_args is not allowed")

    if inside not in ("", "class_path", "help"):
        check_no_class(value)
        return
    for entry in value if isinstance(value, list | tuple) else [value]:
        if isinstance(entry, str):
            check_allowed(entry)
        elif isinstance(entry, Mapping):
            if not isinstance(entry.get("class_path"), str):
                raise InputError(
                    f"{where}: an entry of trainer.callbacks has no class_path: give one of {_CALLBACK_NAMES}"
                )
            check_allowed(entry["class_path"])
            check_no_class(entry.get("init_args"))
            check_no_class(entry.get("dict_kwargs"))
        elif entry is not None:
            raise InputError(f"{where}: trainer.callbacks holds {entry!r}; give class_path and init_args")


def ignored_settings(config: Any) -> list[str]:
    """Sentences about settings of a `RunConfig` that something else makes meaningless."""
    model, task, optim, data = config.model, config.task, config.optim, config.data
    experts = config.experts
    rules = (
        (task.ema_decay == 0 and not task.ema_warmup, "task.ema_warmup", "task.ema_decay is 0"),
        (
            task.non_finite == "stop" and task.max_skipped_steps != type(task).max_skipped_steps,
            "task.max_skipped_steps",
            "task.non_finite is stop",
        ),
        (
            model.forces == "none" and task.monitor not in ("energy_mae", type(task).monitor),
            "task.monitor",
            "without forces (model.forces) the energy decides",
        ),
        (
            model.forces == "none" and task.force_coefficient not in (0, type(task).force_coefficient),
            "task.force_coefficient",
            "model.forces is none",
        ),
        (
            optim.schedule == "constant" and optim.lr_min_factor != type(optim).lr_min_factor,
            "optim.lr_min_factor",
            "optim.schedule is constant",
        ),
        (
            optim.warmup_epochs == 0 and optim.warmup_factor != type(optim).warmup_factor,
            "optim.warmup_factor",
            "optim.warmup_epochs is 0",
        ),
        (
            data.get("max_edges") is None and data.get("max_neighbors", 20) != 20,
            "data.max_neighbors",
            "it counts edges for data.max_edges, which is not set (the network's is model.max_neighbors)",
        ),
        (
            experts.num_experts == 0 and experts != type(experts)(),
            "experts",
            "experts.num_experts is 0",
        ),
        (
            experts.num_experts > 0 and config.run.refit_normalizers,
            "refit_normalizers",
            "experts always take the normalizers of the training data of their tasks",
        ),
    )
    return [f"{key} has no effect: {reason}" for applies, key, reason in rules if applies]


def check_arguments(arguments: list[tuple[str, str | None]], groups: set[str]) -> None:
    """Check the command line in the same way.

    Args:
        arguments: key and text of its value of every option.
        groups: as for `check_no_imports`.

    Raises:
        InputError: as `check_no_imports`, or a value nested too deep.
    """
    for key, text in arguments:
        name = key.removesuffix("+")
        holds_more = {name, f"{name}[]"} & groups or name.startswith("trainer.callbacks")
        if text is None or not (holds_more or "class_path" in text):
            continue
        try:
            value = load_yaml(text, f"command line: --{key}")
        except DataError as error:
            raise InputError(str(error)) from error
        check_no_imports(name, value, groups, "command line")
