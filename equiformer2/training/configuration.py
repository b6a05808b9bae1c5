"""The keys of a training run, from its command line and YAML files."""

import argparse
import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from datasets_oc20 import DataError, OC20DataModule
from datasets_oc20.datamodule import NormalizerValues
from datasets_oc20.untrusted import read_yaml
from equiformer2.adapters import AdapterSettings
from equiformer2.errors import InputError
from equiformer2.experts import ExpertSettings
from equiformer2.model import ModelConfig
from equiformer2.model.config import with_present_keys
from equiformer2.shipped import find_config
from equiformer2.training.config_values import (
    check_arguments,
    check_finite,
    check_no_imports,
    foreign_key_hint,
)
from equiformer2.training.corruption import DensSettings
from equiformer2.training.folder import WandbSettings
from equiformer2.training.optim import OptimSettings
from equiformer2.training.run import RunConfig, RunSettings
from equiformer2.training.task import TaskSettings

#: Trainer arguments that this program decides.
_OWN_TRAINER_KEYS = {
    "logger",
    "default_root_dir",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "enable_checkpointing",
    "use_distributed_sampler",
    "reload_dataloaders_every_n_epochs",
    "barebones",
    "fast_dev_run",
    "inference_mode",
    "model_registry",
    "plugins",
}
#: Those for which Lightning takes objects, too: default and help. As text, nothing is imported for them.
_TEXT_TRAINER_KEYS: dict[str, tuple[str | None, str]] = {
    "accelerator": ("auto", "cpu, gpu, cuda, mps, … or auto for what is there"),
    "strategy": ("auto", "auto, or ddp for several processes"),
    "profiler": (None, "simple, advanced or pytorch"),
}
_GROUPS = {
    "model": ModelConfig,
    "task": TaskSettings,
    "optim": OptimSettings,
    "wandb": WandbSettings,
    "adapter": AdapterSettings,
    "experts": ExpertSettings,
}
#: Keys of a pruned network's parts, each of which holds keys of its own; `[]` stands for the items of a list.
_BLOCKS = ("model.blocks[]", "model.force_head", "model.energy_head")
DEFAULT_CONFIG = "own_data"
"""Shipped configuration of runs that name training data and nothing else."""
#: Keys that are null or hold keys of their own.
_OPTIONAL_GROUPS = {"data.normalizers": NormalizerValues, "task.dens": DensSettings}


@functools.cache
def build_parser() -> ArgumentParser:
    """All keys of a run; the same names in YAML files and on the command line.

    One parser for the process: to read Lightning's signatures takes longer than to parse a command line.
    """
    parser = ArgumentParser(
        prog="equiformer2 train",
        description="Train EquiformerV2. Every key below can stand in a YAML file given with --config and be "
        "changed on the command line, as in --model.num_layers 4.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; later ones win.")
    parser.add_class_arguments(RunSettings, instantiate=False)
    for name, settings in _GROUPS.items():
        parser.add_class_arguments(settings, name, instantiate=False)
    # The older word for `model.forces`, which configurations of earlier runs hold.
    parser.add_argument("--model.regress_forces", type=bool | None, default=None, help=argparse.SUPPRESS)
    parser.add_class_arguments(OC20DataModule, "data", instantiate=False, skip={"seed", "test"})
    own = _OWN_TRAINER_KEYS | set(_TEXT_TRAINER_KEYS)
    parser.add_class_arguments(pl.Trainer, "trainer", instantiate=False, skip=own)
    for name, (default, text) in _TEXT_TRAINER_KEYS.items():
        parser.add_argument(f"--trainer.{name}", type=str | None, default=default, help=text)
    # Configurations of earlier runs hold it, as null.
    parser.add_argument("--trainer.plugins", type=str | None, default=None, help=argparse.SUPPRESS)
    parser.set_defaults(
        {
            "trainer.log_every_n_steps": 20,
            "trainer.num_sanity_val_steps": 0,
            "trainer.enable_model_summary": False,
        }
    )
    return parser


def parse(arguments: Sequence[str]) -> RunConfig:
    """The settings of a run from command-line arguments.

    Raises:
        InputError: an unknown key (the nearest known one is named), a value of the wrong type or out of
            range, an unreadable file. One sentence.
    """
    arguments = list(_with_paths(_with_default(arguments)))
    parser = build_parser()
    known = {action.dest for action in parser._actions if action.dest}
    known |= {
        f"{group}.{field.name}" for group, values in _OPTIONAL_GROUPS.items() for field in fields(values)
    }
    given = list(_options(arguments))
    for key, _ in given:
        _check_key(key.removesuffix("+"), known, "command line")
    holders = {*_GROUPS, "data", "trainer", *_OPTIONAL_GROUPS, *_BLOCKS}
    for file in [Path(value) for name, value in given if name == "config" and value is not None]:
        content = _read_yaml(file)
        for key in _flatten(content):
            _check_key(key, known, str(file))
        check_no_imports("", content, holders, str(file))
    check_arguments(given, holders)
    try:
        parsed = parser.parse_args(list(arguments))
        check_finite({name: value for name, value in parsed.as_dict().items() if name != "config"}, "")
        instantiated = parser.instantiate(parsed)
    except (argparse.ArgumentError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"configuration: {_reason(str(error))}") from error
    for group, settings in _GROUPS.items():
        if not isinstance(parsed[group], Namespace):
            raise InputError(f"configuration: {group} is {parsed[group]!r}; it must hold keys and values")
        for field in fields(settings):
            if parsed[group][field.name] is None and "None" not in str(field.type):
                raise InputError(f"configuration: {group}.{field.name} is null; it needs a value")
    _check_trainer(parsed.trainer)
    parsed.model = Namespace(with_present_keys(vars(parsed.model)))

    def plain(value: Any) -> Any:
        if isinstance(value, Namespace):
            return {name: plain(item) for name, item in vars(value).items()}
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value

    groups = {name: settings(**plain(parsed[name])) for name, settings in _GROUPS.items()}
    top = {name: parsed[name] for name in RunSettings.__dataclass_fields__}
    run = RunSettings(**top)
    if run.name is None and parsed.config:
        run = replace(run, name=Path(str(parsed.config[-1])).stem)
    data = {**plain(parsed.data), "seed": run.seed}
    if data["train"] is None and data["tasks"] is None:
        raise InputError("data.train is not set: name the data to train on")
    if data["normalizers"] is not None:
        data["normalizers"] = NormalizerValues(**data["normalizers"])
    # All keys with their values, null where nothing is set, so that later defaults cannot change the run.
    values = {key: value for key, value in parsed.as_dict().items() if key != "config"}
    values = json.loads(
        json.dumps(values, default=lambda v: v.as_dict() if isinstance(v, Namespace) else str(v))
    )
    return RunConfig(
        run=run,
        data=data,
        trainer=dict(vars(instantiated.trainer)),
        text=yaml.safe_dump({**values, "name": run.name}, sort_keys=False),
        **groups,
    )


def _with_default(arguments: Sequence[str]) -> Sequence[str]:
    """The command line, with the shipped configuration for own data where it names training data alone."""
    given = {key for key, _ in _options(arguments)}
    if "config" in given or "data.val" in given or "data.train" not in given:
        return arguments
    return ["--config", DEFAULT_CONFIG, *arguments]


def _with_paths(arguments: Sequence[str]) -> Iterator[str]:
    """The command line with the paths of shipped configurations in place of their names."""
    previous = ""
    for argument in arguments:
        if previous == "--config":
            yield str(find_config(argument))
        elif argument.startswith("--config="):
            yield f"--config={find_config(argument.removeprefix('--config='))}"
        else:
            yield argument
        previous = argument


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(key, text of its value) of the command line, in order."""
    for position, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, is_joined, value = argument[2:].partition("=")
            following = arguments[position + 1] if position + 1 < len(arguments) else None
            yield name, value if is_joined else following


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = read_yaml(path)
    except FileNotFoundError as error:
        raise InputError(f"there is no config file {path}") from error
    except DataError as error:
        raise InputError(f"{error}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds no configuration: it must be a mapping of keys to values")
    return content


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{name}.")
        else:
            yield name


def _check_trainer(trainer: Namespace) -> None:
    """Raise `InputError` for numbers that Lightning takes and that would fail in the first step."""

    def is_nothing(value: Any) -> bool:
        """Tell whether a length of training is zero: a number, a time (00:00:00:00), or its parts by name."""
        if isinstance(value, Mapping | Namespace):
            value = list(dict(value if isinstance(value, Mapping) else vars(value)).values())
            return bool(value) and not any(value)
        if isinstance(value, timedelta):
            return value <= timedelta(0)
        if isinstance(value, str):
            return bool(value.strip()) and not value.strip(" 0:")
        return value is not None and value == 0

    if trainer.plugins is not None:
        raise InputError("trainer.plugins is decided by this program and cannot be set")
    for name in ("accumulate_grad_batches", "log_every_n_steps"):
        if trainer[name] is not None and trainer[name] < 1:
            raise InputError(f"trainer.{name} must be at least 1, not {trainer[name]}")
    for name in ("max_epochs", "max_steps", "limit_train_batches", "max_time"):
        value = trainer[name]
        if is_nothing(value):
            raise InputError(
                f"trainer.{name} is {value!r}, so that nothing would be trained; to judge a checkpoint use "
                "equiformer2 evaluate"
            )
        if isinstance(value, int | float) and value < 0 and (value != -1 or name == "limit_train_batches"):
            raise InputError(f"trainer.{name} must not be negative, it is {value}")
    for name in ("limit_val_batches", "overfit_batches"):
        if isinstance(trainer[name], int | float) and trainer[name] < 0:
            raise InputError(f"trainer.{name} must not be negative, it is {trainer[name]}")
    interval = trainer.val_check_interval
    if isinstance(interval, int | float) and interval == 0:
        raise InputError(
            "trainer.val_check_interval is 0; to validate never, set trainer.limit_val_batches: 0"
        )


def _reason(message: str) -> str:
    """Shorten a message of jsonargparse to one line; for a key that may be null, to the other reason."""
    line = " ".join(message.split())
    found = re.match(r'(?:Parser key "(\S+)": )?Does not validate against any .*? Errors: (.*)', line)
    if found is None:
        return line
    reasons, _, given = found[2].partition(" Given value type: ")
    told = []
    for reason in re.split(r"(?:^| )- ", reasons.rstrip(".")):
        if reason and "NoneType" not in reason:
            reason = re.sub(r"Problem with given class_path '\S+': ", "", reason)
            told.append("Expected keys and values" if "dot import path" in reason else reason)
    if given.startswith("<class 'str'>"):
        told.append(f"got {given.partition('Given value: ')[2]}")
    return (f"{found[1]}: " if found[1] else "") + "; ".join(told)


def _check_key(key: str, known: set[str], where: str) -> None:
    parts = key.split(".")
    prefixes = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    # A known key with something below it is a value that jsonargparse checks itself (a callback, say);
    # a group as a whole has no dot and stands for the keys inside it, as do optional groups.
    values = {name for name in known if "." in name and name not in _OPTIONAL_GROUPS}
    if key in known | {"help", "print_config"} or prefixes & values:
        return
    own = key.removeprefix("trainer.")
    if key.startswith("trainer.") and own in _OWN_TRAINER_KEYS:
        raise InputError(f"{where}: '{key}' is decided by this program and cannot be set")
    foreign = foreign_key_hint(key)
    if foreign is not None:
        raise InputError(f"{where}: unknown key '{key}'; {foreign}")
    hint = _nearest(key, known)
    raise InputError(f"{where}: unknown key '{key}'" + (f"; did you mean '{hint}'?" if hint else ""))


def _nearest(key: str, known: set[str]) -> str | None:
    # the right name in the wrong group, or without its group
    last = key.rsplit(".", 1)[-1]
    by_name = {name.rsplit(".", 1)[-1]: name for name in sorted(known)}
    if last in by_name:
        return by_name[last]
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
    if near:
        return near[0]
    near = difflib.get_close_matches(last, list(by_name), n=1, cutoff=0.6)
    return by_name[near[0]] if near else None
