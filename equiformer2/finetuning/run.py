"""Fine-tune: read and divide, choose, train, judge, and tell everything in one table."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch.utils.data import ConcatDataset

from datasets_oc20 import OC20Lmdb
from equiformer2.adapters.attach import choose_weights
from equiformer2.checkpoint import Normalizers, load_checkpoint
from equiformer2.checkpoint.adapted import AdaptedNetwork
from equiformer2.checkpoint.adapter_files import read_adapter, write_adapter
from equiformer2.checkpoint.checkpoint import read_contents
from equiformer2.checkpoint.native import write_native
from equiformer2.checkpoint.surroundings import Surroundings
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.devices import usable_device
from equiformer2.errors import InputError
from equiformer2.files import read_json, write_json
from equiformer2.finetuning import data_curve, parity
from equiformer2.finetuning.folder import FineTuneSettings, OutFolder
from equiformer2.finetuning.judging import (
    AFTER,
    BEFORE,
    NEW,
    OLD,
    SCRATCH,
    TRIVIAL,
    Errors,
    judge,
    judge_trivial,
    over_seeds,
    row_of,
    to_text,
)
from equiformer2.finetuning.parity import ParityPairs
from equiformer2.finetuning.parts import Parts, divide_data, write_parts
from equiformer2.finetuning.schedule import (
    DEFAULT_MINUTES,
    STARTUP_SECONDS,
    UNLIMITED,
    Schedule,
    Speed,
    choose_schedule,
    divide_time,
    measure_speed,
)
from equiformer2.finetuning.start import Start, prepare_start
from equiformer2.finetuning.trained_part import FrozenBlocks, spoken, trained_part
from equiformer2.finetuning.training import Case, Trainer
from equiformer2.inference import Predictor
from equiformer2.inference.seen_data import fit_surroundings, judge_dataset
from equiformer2.model import EquiformerV2
from equiformer2.script import header
from equiformer2.shipped import find_checkpoint
from equiformer2.training.adapter_part import check_start

Say = Callable[[str], None]
_FAMILIAR_STRUCTURES = 100
"""Structures of the training data, and of those to judge by, whose surroundings a tuned network is given."""


@dataclass(frozen=True)
class Prepared:
    """Decisions that are made once, before the first training, and kept for a continued call.

    Attributes:
        files: names of the parts of the data.
        keeps_zero: whether the tuned network's energies have the zero of the original data.
        schedules: settings of the trainings by share of the data, in plain values.
        speed: measured.
        sentences: what was found and chosen.
    """

    files: dict[str, list[str]]
    keeps_zero: bool
    schedules: dict[str, dict[str, Any]]
    speed: dict[str, float]
    sentences: list[str]

    def schedule(self, share: float) -> Schedule:
        """Settings of the training on a share of the data."""
        return Schedule(**self.schedules[f"{share:g}"])


def fine_tune(settings: FineTuneSettings, say: Say = print) -> dict[str, Any]:
    """Fine-tune a checkpoint on own data.

    Stopped at any moment, the same call continues.

    Args:
        settings: what to do.
        say: called with every line for people.

    Returns:
        The content of `finetune.json`, which is written last.

    Raises:
        InputError, datasets_oc20.DataError: wrong settings or data; file and frame are named.
        OSError: something cannot be read or written.
    """
    usable_device(settings.device)
    settings = replace(settings, checkpoint=str(find_checkpoint(settings.checkpoint)))
    contents = read_contents(settings.checkpoint)
    if settings.freeze is not None:
        FrozenBlocks(settings.freeze, contents.config.num_layers)
    if settings.adapter is not None:
        choose_weights(EquiformerV2(contents.config, device="meta"), settings.adapter.weights)
    folder = OutFolder(settings)
    with folder.open() as continues:
        if continues:
            say(f"continuing the fine-tuning in {folder.path}")
        parts = divide_data(settings, contents.config.max_num_elements - 1, contents.energy_kind)
        kind = parts.frames.energy_kind
        if contents.energy_kind is None:
            say(f"the checkpoint does not state its kind of energy: taken to be {kind}, as the data are")
        checkpoint = load_checkpoint(settings.checkpoint, settings.weights, contents.energy_kind or kind)
        if settings.adapter is not None and settings.adapter.start is not None:
            start = read_adapter(settings.adapter.start)
            AdaptedNetwork(checkpoint, checkpoint.model).check(start)
            check_start(start)
        tuning = _FineTuning(settings, folder, parts, Predictor(checkpoint, settings.device), say)
        return tuning.run()


class _FineTuning:
    """One call, from divided data to the table.

    Args:
        settings: what to do.
        folder: for the results, open.
        parts: division of the data.
        before: the checkpoint's predictor.
        say: prints a line.
    """

    def __init__(
        self, settings: FineTuneSettings, folder: OutFolder, parts: Parts, before: Predictor, say: Say
    ) -> None:
        self.settings, self.folder, self.parts, self.before, self.say = settings, folder, parts, before, say
        self.begin = time.monotonic()
        self.starts: dict[tuple[float, int], Start] = {}
        networks = [AFTER, *([SCRATCH] if settings.scratch else [])]
        seeds = range(settings.seed, settings.seed + settings.seeds)
        # The whole data first: what is wanted most is there soonest.
        shares = sorted(parts.train, reverse=True)
        self.cases = [
            Case(network, share, seed) for share in shares for seed in seeds for network in networks
        ]

    def run(self) -> dict[str, Any]:
        """Prepare, train every case, judge, and write the results."""
        kind = self.before.energy_kind
        self.say(
            f"checkpoint: {self.settings.checkpoint}, {kind} energies, {self.before.checkpoint.weights} "
            "weights"
        )
        for sentence in self.parts.sentences:
            self.say(sentence)
        prepared = self._prepare()
        self.say("")
        rows = self._rows_before(prepared)
        paths = {part: self._paths(prepared, part) for part in prepared.files}
        trainer = Trainer(
            self.settings, self.before.checkpoint, self.folder.runs, paths, self.parts.frames.energy_kind
        )
        results = {case: self._result(case, trainer, prepared) for case in self.cases}
        return self._finish(prepared, rows, results)

    def _paths(self, prepared: Prepared, part: str) -> list[str]:
        """Paths of the files of a part of the data."""
        return [str(self.folder.data / name) for name in prepared.files[part]]

    def _start(self, case: Case) -> Start:
        """Start of a training; that of the case before is kept, which is mostly the same."""
        key = case.share, case.seed
        if key not in self.starts:
            start = prepare_start(
                self.before,
                self.parts.frames,
                self.parts.train[case.share],
                self.parts.isolated,
                self.settings.reset_head,
                case.seed,
                check=case.share == 1.0,
            )
            before, after = self.before.checkpoint.config.forces, start.checkpoint.config.forces
            if self.settings.adapter is not None and before != after:
                what = "has none to adapt" if before == "none" else "predicts forces"
                raise InputError(
                    f"the data have {'no ' if after == 'none' else ''}forces and the checkpoint {what}: an "
                    "adapter keeps the heads of its network, so leave --adapter out"
                )
            self.starts = {key: start}
        return self.starts[key]

    def _prepare(self) -> Prepared:
        """Decide, once, and write the parts of the data."""
        file = self.folder.file("prepared.json")
        if file.exists():
            prepared = Prepared(**read_json(file))
            for sentence in prepared.sentences:
                self.say(sentence)
            return prepared
        start = self._start(self.cases[0])
        files = write_parts(self.parts, self.folder, start.keeps_zero)
        sentences = list(start.sentences)
        if self.parts.replay:
            used = (
                "energies and forces"
                if files["replay-1"]
                else "forces alone, because energies have another zero"
            )
            sentences.append(f"replay: {used}")
        part = trained_part(self.settings.freeze, self.settings.adapter, start.checkpoint.config.num_layers)
        sentences.append(f"trained: {part.describe()}")
        speed = measure_speed(start.checkpoint.model, self.parts.frames, self.parts.all, self.settings.device)
        start.checkpoint.model.cpu()
        schedules = self._schedules(start, speed, sentences)
        prepared = Prepared(files, start.keeps_zero, schedules, asdict(speed), sentences)
        for sentence in sentences:
            self.say(sentence)
        write_json(file, asdict(prepared))
        return prepared

    def _schedules(self, start: Start, speed: Speed, sentences: list[str]) -> dict[str, dict[str, Any]]:
        """Divide the time over the trainings."""
        settings, count = self.settings, len(self.cases)
        watched, judged = len(self.parts.watched[1]), len(self.parts.judged[1])
        minutes = settings.max_minutes
        if minutes is None:
            minutes = DEFAULT_MINUTES * settings.seeds * len(self.parts.train)
        spent = time.monotonic() - self.begin
        on_old = 1 + sum(case.is_result for case in self.cases)
        passes = (count + 1) * judged + on_old * sum(len(rows) for _, rows in self.parts.old)
        familiar = sum(min(_FAMILIAR_STRUCTURES, number) for number in (self.parts.count(1.0), judged))
        passes += 0 if settings.adapter is not None else familiar * settings.seeds
        judging = passes * speed.evaluation
        choose = {
            share: partial(
                choose_schedule,
                start.checkpoint.config,
                self.parts.count(share),
                watched,
                speed,
                steps=settings.steps,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                adapts=settings.adapter is not None,
            )
            for share in self.parts.train
        }
        wanted = [choose[case.share](UNLIMITED).seconds for case in self.cases]
        each = divide_time(60 * minutes - spent - judging - count * STARTUP_SECONDS, wanted)
        schedules = {share: choose_one(each) for share, choose_one in choose.items()}
        total = sum(schedules[case.share].seconds + STARTUP_SECONDS for case in self.cases) + judging
        plural = f"{count} trainings take" if count > 1 else "one training takes"
        sentences += [
            f"schedule: {schedules[1.0].describe()}",
            f"speed: {speed.training:.2g} s per frame in training, {speed.evaluation:.2g} s otherwise; "
            f"{plural} "
            f"about {spoken(total)} in all",
        ]
        return {f"{share:g}": asdict(schedule) for share, schedule in schedules.items()}

    def _judge(
        self,
        predictor: Predictor,
        prepared: Prepared,
        is_new: bool,
        pairs: ParityPairs | None = None,
        on_old: bool = True,
    ) -> dict[str, Errors | None]:
        """Errors on new and, with `on_old`, old data; `is_new` for networks with the zero of the new data."""
        frames = self.parts.frames
        kept = prepared.keeps_zero
        new = judge(
            predictor,
            OC20Lmdb(self._paths(prepared, "judged")),
            is_new or self._same_kind(frames.energy_kind),
            pairs,
        )
        old = None
        if on_old and prepared.files["old"]:
            data = OC20Lmdb(self._paths(prepared, "old"))
            same = kept if is_new else self._same_kind(str(data.energy_kind))
            old = judge(predictor, data, same)
        return {NEW: new, OLD: old}

    def _same_kind(self, kind: str) -> bool:
        return self.before.energy_kind == kind

    def _rows_before(self, prepared: Prepared) -> list[dict[str, Any]]:
        """Rows of the checkpoint as it is, and of trivial answers."""
        file = self.folder.file("before.json")
        if file.exists():
            rows: list[dict[str, Any]] = read_json(file)["rows"]
            return rows
        pairs = self._pairs()
        found = self._judge(self.before, prepared, False, pairs)
        start = self._start(self.cases[0])
        trivial = judge_trivial(start.own, OC20Lmdb(self._paths(prepared, "judged")))
        rows = [row_of(data, BEFORE, errors) for data, errors in found.items() if errors is not None]
        rows.append(row_of(NEW, TRIVIAL, trivial))
        known = judge_dataset(self.before, self.parts.frames.dataset)
        write_json(file, {"rows": rows, "familiarity": known, "parity": pairs.to_dict()})
        for sentence in known["sentences"]:
            self.say(f"the checkpoint and these data: {sentence}")
        return rows

    def _pairs(self) -> ParityPairs:
        """Collect what the figure shows of one network."""
        total = self.parts.frames.energy_kind == "total"
        return ParityPairs(self._start(self.cases[0]).own if total else None)

    def _result(self, case: Case, trainer: Trainer, prepared: Prepared) -> dict[str, Any]:
        """Train a case and judge it, or read what an earlier call has found."""
        file = self.folder.runs / f"{case.name}.json"
        if file.exists():
            return read_json(file)
        self.say(f"{case.title}:")
        schedule = prepared.schedule(case.share)
        following = self.cases[self.cases.index(case) + 1 :]
        after = sum(prepared.schedule(other.share).seconds + STARTUP_SECONDS for other in following)
        start = self._start(case)
        best = trainer.run(case, start, schedule, after)
        predictor = self._predictor(case, best)
        pairs = self._pairs() if case == self.cases[0] else None
        found = self._judge(predictor, prepared, True, pairs, case.is_result)
        step = predictor.checkpoint.provenance.get("step", 0)
        last = self._predictor(case, best.with_name("last.pt")).checkpoint.provenance.get("step", 0)
        result = {
            **{data: None if errors is None else errors.to_dict() for data, errors in found.items()},
            "frames": len(self.parts.train[case.share]),
            "best_step": step,
            "steps": last,
            "planned_steps": schedule.steps,
        }
        if pairs is not None:
            result["parity"] = pairs.to_dict()
        write_json(file, result)
        (self.folder.runs / f"{case.name}.start.pt").unlink(missing_ok=True)
        return result

    def _adapts(self, case: Case) -> bool:
        return self.settings.adapter is not None and case.network == AFTER

    def _predictor(self, case: Case, file: Path) -> Predictor:
        """Predictor of a checkpoint, or of the command's checkpoint with an adapter."""
        if self._adapts(case):
            return Predictor(self.before.checkpoint, self.settings.device, adapter=file)
        return Predictor(file, self.settings.device)

    def _finish(
        self, prepared: Prepared, rows: list[dict[str, Any]], results: dict[Case, dict[str, Any]]
    ) -> dict[str, Any]:
        """Write the models and the table."""
        table = (
            rows[:1] + self._rows_of(AFTER, NEW, results) + self._rows_of(SCRATCH, NEW, results) + rows[-1:]
        )
        if prepared.files["old"]:
            table += rows[1:-1] + self._rows_of(AFTER, OLD, results)
        models = [
            self._write_model(case, number, prepared)
            for number, case in enumerate(case for case in self.cases if case.is_result)
        ]
        first = Path(models[0]["file"])
        adapted = self.settings.adapter is not None
        normalizers = (read_adapter(first) if adapted else load_checkpoint(first)).normalizers
        per_atom = self.parts.frames.energy_kind == "total"
        text = to_text(table, per_atom)
        notices = self._notices(table)
        record = {
            **header("finetune/1", self.settings.checkpoint),
            "table": table,
            "references_eV": _references(normalizers, self.parts),
            "energy_kind": self.parts.frames.energy_kind,
            "models": models,
            "adapter": None if self.settings.adapter is None else self.settings.adapter.to_dict(),
            "decisions": [*self.parts.sentences, *prepared.sentences],
            "notices": notices,
            "familiarity": read_json(self.folder.file("before.json"))["familiarity"],
            "schedule": prepared.schedules["1"],
            "speed_s": prepared.speed,
            "trainings": {
                case.title: {name: value for name, value in result.items() if name != "parity"}
                for case, result in results.items()
            },
            "parity": str(self._draw_parity(table, results)),
        }
        self.say(f"\n{text}\n")
        if len(self.parts.train) > 1:
            record["curve"] = self._curve(results, table)
        for notice in notices:
            self.say(notice)
        seconds = round(time.monotonic() - self.begin)
        self.say(f"predictions beside labels: {record['parity']}")
        word = "adapter" if adapted else "model"
        size = f"{models[0]['trainable_parameters']:,} trained numbers, {models[0]['bytes'] / 1e6:.2f} MB"
        self.say(f"{word}: {', '.join(model['file'] for model in models)} ({size}, {spoken(seconds)})")
        write_json(self.folder.file("finetune.json"), record)
        return record

    @staticmethod
    def _rows_of(network: str, data: str, results: dict[Case, dict[str, Any]]) -> list[dict[str, Any]]:
        """The row of a network on new or old data, over its seeds; none where it was not trained."""
        rows = [
            {"data": data, "network": network, **result[data], "seed": case.seed}
            for case, result in results.items()
            if case.network == network and case.share == 1.0 and result[data] is not None
        ]
        return [over_seeds(rows)] if rows else []

    def _write_model(self, case: Case, number: int, prepared: Prepared) -> dict[str, Any]:
        """Copy the best weights of a training to the folder of results, with their origin.

        A network also gets the surroundings of the atoms that it was tuned on.
        """
        word = "adapter" if self._adapts(case) else "model"
        target = self.folder.file(f"{word}.pt" if number == 0 else f"{word}_{number}.pt")
        best = self.folder.runs / case.name / "checkpoints" / "best.pt"
        origin = {
            "init_from": Path(self.settings.checkpoint).name,
            "init_from_sha256": sha256(Path(self.settings.checkpoint)),
            "seed": case.seed,
        }
        written: dict[str, Any] = {"file": str(target), "seed": case.seed}
        if self._adapts(case):
            adapter = read_adapter(best)
            write_adapter(target, replace(adapter, provenance=adapter.provenance | origin))
            written |= adapter.describe()
        else:
            contents = read_contents(best)
            contents = replace(contents, provenance=contents.provenance | origin)
            write_native(target, replace(contents, surroundings=self._surroundings(best, prepared)))
            part = trained_part(self.settings.freeze, None, contents.config.num_layers)
            shapes = EquiformerV2(contents.config, device="meta").named_parameters()
            written["trainable_parameters"] = sum(
                p.numel() for name, p in shapes if p.requires_grad and not part.holds(name)
            )
        return {**written, "bytes": target.stat().st_size, "sha256": sha256(target)}

    def _surroundings(self, best: Path, prepared: Prepared) -> Surroundings | None:
        """Fit the surroundings of training atoms (replayed ones, too), calibrated on the frames to judge by.

        Returns:
            None if all frames to judge by have elements that the training frames lack.
        """
        parts = [f"{part}-1" for part in ("train", "replay", "forces_only")]
        training = [path for part in parts for path in self._paths(prepared, part)]
        judged = self._paths(prepared, "judged")
        predictor = Predictor(best, self.settings.device)
        try:
            return fit_surroundings(
                predictor,
                ConcatDataset[Any]([OC20Lmdb(path) for path in training]),
                OC20Lmdb(judged),
                _FAMILIAR_STRUCTURES,
                {"training": [Path(path).name for path in training], "held_out": ["judged.lmdb"]},
            )
        except InputError as error:
            self.say(f"surroundings of atoms will not be compared with these data: {error}")
            return None

    def _draw_parity(self, table: list[dict[str, Any]], results: dict[Case, dict[str, Any]]) -> Path:
        """Draw predictions of the frames to judge by, of the checkpoint and of the first tuned network."""
        first = self.cases[0]
        networks = {
            BEFORE: read_json(self.folder.file("before.json"))["parity"],
            AFTER: results[first]["parity"],
        }
        errors = {BEFORE: table[0], AFTER: results[first][NEW]}
        figure = self.folder.file("parity.png")
        parity.draw(networks, errors, self.parts.frames.energy_kind == "total", figure)
        return figure

    def _curve(self, results: dict[Case, dict[str, Any]], table: list[dict[str, Any]]) -> dict[str, Any]:
        """Points, sentences and figure of the learning curve."""
        points = [
            {
                "network": case.network,
                "seed": case.seed,
                "frames": result["frames"],
                **{name: result[NEW][name] for name in data_curve.UNITS},
            }
            for case, result in results.items()
        ]
        told = data_curve.sentences(points)
        trivial = next(row for row in table if row["network"] == TRIVIAL)
        figure = self.folder.file("curve.png")
        data_curve.draw(points, trivial, figure)
        for sentence in told:
            self.say(sentence)
        self.say(f"learning curve: {figure}\n")
        return {"points": points, "sentences": told, "figure": str(figure)}

    def _notices(self, table: list[dict[str, Any]]) -> list[str]:
        """Say where the tuned network is no better than others."""
        new = {row["network"]: row for row in table if row["data"] == NEW}
        after, told = new[AFTER], []
        for key, (label, unit) in data_curve.UNITS.items():
            others = {
                BEFORE: "the checkpoint before",
                SCRATCH: "the network trained from scratch",
                TRIVIAL: "a trivial answer",
            }
            for network, name in others.items():
                other = new.get(network, {}).get(key)
                if other is not None and after[key] is not None and after[key] >= other:
                    told.append(
                        f"warning: the {label} of the tuned network is {after[key]:.4f} {unit} and that of "
                        f"{name} {other:.4f}, so nothing was gained there"
                    )
        return told


def _references(normalizers: Normalizers, parts: Parts) -> dict[str, float]:
    """References of the elements of the training data, eV by symbol; empty for adsorption energies."""
    if normalizers.linear_references is None:
        return {}
    numbers: list[int] = sorted({*parts.frames.elements(parts.all), *parts.isolated})
    table = normalizers.linear_references.to(torch.float64).numpy()
    return {chemical_symbols[number]: float(np.round(table[number], 9)) for number in numbers}
