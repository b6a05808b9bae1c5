"""Values and tables of the results files in docs/results, by the names that comments on pages use."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.benchmark_results import memory_ratio, speed_up

GIB = 2**30


def one(rows: Iterable[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    """The only row with these values."""
    found = [row for row in rows if all(row.get(key) == value for key, value in keys.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows have {keys}")
    return found[0]


def names(data: Any) -> dict[str, Any]:
    """Names that an expression may use: the file's content, and functions of it by the kind of file."""
    known = {"data": data, "one": one, "GIB": GIB, "median": statistics.median, "mean": statistics.fmean}
    known |= {"min": min, "max": max, "sum": sum, "len": len, "abs": abs}
    if "units" in data:
        known |= _benchmark(data["units"])
    if "studies" in data:
        known |= _study(data)
    if "loop" in data:
        known["throughput"] = lambda setting: _throughput(data["loop"]["settings"], setting)
    if "runs" in data and all("table" in run for run in data["runs"]):
        known |= _own_data(data["runs"])
    if "shares" in data:
        known["case"] = lambda batch, way="checkpointed": one(data["measured"], batch=batch, way=way)
        known["share"] = lambda batch: one(data["shares"], batch=batch)
    if "familiarity" in str(data.get("schema")):
        known |= _familiarity(data["checkpoints"])
    if "systems" in data:
        known |= _small(data)
    if "rows" in data and "frame_angle_forces" in data["rows"][0]:
        known |= _equivariance(data["rows"])
    return known


def _own_data(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of the networks of a fine-tuning by its name; `old` for those on the checkpoint's own data."""

    def of(key: str) -> Callable[..., float]:
        def error(run: str, *networks: str, old: bool = False) -> tuple[float, ...]:
            table = one(runs, run=run)["table"]
            return tuple(one(table, data="old" if old else "new", network=name)[key] for name in networks)

        return error

    return {name: of(f"{name}_eV{unit}") for name, unit in (("energy_mae", ""), ("force_mae", "_A"))}


def _throughput(settings: dict[str, Any], setting: str) -> tuple[float, ...]:
    """Seconds of a setting alone, speed over one thread, seconds beside a busy process, how much slower."""
    alone, busy = (statistics.median(settings[setting][kind]) for kind in ("alone", "busy"))
    return alone, statistics.median(settings["one thread"]["alone"]) / alone, busy, busy / alone


def _benchmark(units: dict[str, Any]) -> dict[str, Any]:
    def call(unit: str, **keys: Any) -> dict[str, Any]:
        keys = {"precision": "float32", "backend": "auto", "implementation": "ours"} | keys
        return one(units[unit]["record"]["calls"], **keys)

    def speed(size: str, batch: str = "B1", operation: str = "forward", **keys: Any) -> float:
        unit = f"timings/{size}/{batch}/default"
        found = speed_up(units[unit]["record"]["calls"], call(unit, operation=operation, **keys))
        assert found is not None
        return found

    def step(size: str, **keys: Any) -> float:
        found = speed_up(units[f"relaxation/{size}"]["record"]["calls"], call(f"relaxation/{size}", **keys))
        assert found is not None
        return found

    def seconds(unit: str, **keys: Any) -> float:
        record = units[unit]["record"]
        return statistics.median(call(unit, **keys)["seconds"] if "calls" in record else record["seconds"])

    def training_flop(size: str) -> float:
        """Operations of a training step on the first slab: a backward pass counts twice its forward."""
        return 3.0 * sum(counted for counted, _ in units[f"breakdown/{size}/B1"]["record"]["parts"].values())

    def floor(size: str, operation: str, precision: str = "float32") -> float:
        """Percent of a plain call that the matrix products take at the measured rate."""
        record = units[f"breakdown/{size}/B1"]["record"]
        plain = one(record["calls"], operation=operation, precision=precision)["seconds"]
        work = training_flop(size) / (1 if operation == "training_step" else 3)
        return 100 * work / record["rates"][precision]["rate"] / statistics.median(plain)

    def parts(size: str, operation: str, precision: str, *wanted: str) -> float:
        """Percent of a profiled call that these parts of the network take."""
        call = one(units[f"breakdown/{size}/B1"]["record"]["calls"], operation=operation, precision=precision)
        found = call["breakdown"]
        return 100 * sum(sum(found["parts"][name]) for name in wanted) / found["total"]

    return {
        "units": units,
        "speed": speed,
        "step": step,
        "seconds": seconds,
        "training_flop": training_flop,
        "floor": floor,
        "parts": parts,
        "memory": lambda size, batch="B1": memory_ratio(units[f"memory/{size}/{batch}"]["record"]),
        "peak": lambda unit: units[unit]["record"]["peak"] / GIB,
    }


def _familiarity(checkpoints: Any) -> dict[str, Any]:
    def usual(name: str) -> Any:
        return checkpoints[name]["kinds"]["mean of the element"]

    def over(name: str, group: str | None = None) -> float:
        """Share over the limit, of a group or of the familiar structures."""
        kind = usual(name)
        return kind["familiar_over_limit"] if group is None else kind["groups"][group]["over_limit"]

    return {"area": lambda name, group: usual(name)["groups"][group]["area"], "over": over}


def _study(data: dict[str, Any]) -> dict[str, Any]:
    def row(study: str, method: str, keep: float, trained: str = "cut") -> dict[str, Any]:
        return one(data["studies"][study], method=method, keep=keep, trained=trained)

    def mae(
        study: str, method: str, keep: float, trained: str = "cut", on: str = "teacher", to: str = "to_dense"
    ) -> float:
        return row(study, method, keep, trained)["errors"][on][to]["force_mae"]["mean"]

    def energy(study: str, method: str, keep: float, on: str = "teacher") -> float:
        """Error of the energy per atom against labels, eV."""
        return row(study, method, keep)["errors"][on]["to_labels"]["energy_per_atom"]["mean"]

    def worse(study: str, method: str, keep: float, trained: str = "cut", on: str = "teacher") -> float:
        """Percent."""
        dense = mae(study, "dense", 1.0, "cut", on, "to_labels")
        return 100 * (mae(study, method, keep, trained, on, "to_labels") / dense - 1)

    def macs(study: str, method: str, keep: float, trained: str = "cut", on: str = "teacher") -> float:
        """Percent."""
        return 100 * row(study, method, keep, trained)["macs_on"][on]

    def fast(name: str) -> float:
        """Times as fast as dense: the mean of the seeds that were timed."""
        return statistics.fmean(fast_by_seed(name))

    def fast_by_seed(name: str) -> list[float]:
        found = [
            data["speed"][key] for key in (name, f"{name}_seed1", f"{name}_seed2") if key in data["speed"]
        ]
        return [1 / record["latency"]["ratio"] for record in found]

    def five(study: str, method: str, keep: float, trained: str = "cut") -> tuple[float, ...]:
        """Operations, change of the forces on both held-out sets, how much worse on both."""
        of = (study, method, keep, trained)
        sets = ("teacher", "dft")
        return (macs(*of), *(mae(*of, on=on) for on in sets), *(worse(*of, on=on) for on in sets))

    def two(study: str, first: str, second: str, keep: float) -> tuple[float, ...]:
        """`five` of two methods in one row of a table."""
        a, b = five(study, first, keep), five(study, second, keep)
        return (a[0], *a[1:3], *b[1:3], *a[3:], *b[3:])

    def others(keep: float) -> list[float]:
        """Changes of the forces by the baselines of `multi`, blocks included where they reach the budget."""
        return [mae("small_cuts", name, keep) for name in ("magnitude", "random", "uniform", "block")]

    def lossless(model: str, name: str) -> dict[str, Any]:
        return next(item for item in data["lossless"][model]["savings"] if item["name"].startswith(name))

    return {
        "row": row,
        "mae": mae,
        "energy": energy,
        "worse": worse,
        "macs": macs,
        "fast": fast,
        "fast_by_seed": fast_by_seed,
        "lossless": lossless,
        "five": five,
        "two": two,
        "others": others,
    }


def _small(data: dict[str, Any]) -> dict[str, Any]:
    def over_frames(part: str, key: str) -> float:
        """Mean over frames; of forces, too, where systems of one part have about the same size."""
        found = data["systems"][part].values()
        return sum(item[key] * item["frames"] for item in found) / sum(item["frames"] for item in found)

    return {"over_frames": over_frames, "systems": data["systems"], "runs": data["runs"]}


def _equivariance(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def rotation(
        lmax: int, grid: list[int], varied: str, weights: str = "random", dtype: str = "float64"
    ) -> float:
        row = one(rows, lmax=lmax, grid=grid, varied=varied, weights=weights)
        return statistics.median(row["rotation_forces"][dtype])

    def turned(lmax: int, grid: list[int], weights: str = "random", dtype: str = "float64") -> float:
        row = one(rows, lmax=lmax, grid=grid, varied="attention", weights=weights)
        return statistics.median(row["frame_angle_forces"][dtype])

    return {"rotation": rotation, "turned": turned, "rows": rows}


def _batches(data: dict[str, Any]) -> list[str]:
    def percent(found: dict[str, float]) -> str:
        return f"{100 * found['mean']:.2f} % ({100 * found['worst']:.1f} %)"

    return [
        f"| {'1 structure' if row['limit'] == '1 structures' else row['limit']} "
        f"| {percent(row['random'])} | {percent(row['balanced'])} |"
        for row in data["rows"]
    ]


def _lossless(data: dict[str, Any]) -> list[str]:
    rows = []
    for saving in data["lossless"]["oc20_small"]["savings"]:
        time, force = saving["latency"], saving["force_deviation"]
        rows.append(
            f"| {saving['name'].replace('orders |m| > 1', 'orders beyond ±1')} "
            f"| {saving['macs'] / saving['macs_without_cut']:.3f} "
            f"| {time['ratio']:.2f} ({time['low']:.2f} to {time['high']:.2f}) "
            f"| {'none' if not force else f'{force:.1e} eV/Å'} |"
        )
    return rows


def _speed(data: dict[str, Any]) -> list[str]:
    """Ratios to the reference by network and batch, for the README."""
    known = _benchmark(data["units"])

    rows = []
    for size, batch in (("31M", "B1"), ("31M", "B4"), ("83M", "B1"), ("153M", "B1")):
        on = (size, batch)
        single = batch == "B1"
        cells = [
            size,
            str(data["units"][f"memory/{size}/{batch}"]["record"]["atoms"]),
            f"{known['speed'](*on):.1f} x",
            f"{known['speed'](*on, precision='bf16'):.1f} x",
            f"{known['speed'](*on, 'training_step'):.1f} x",
            f"{100 * known['memory'](*on):.0f} %",
            f"{known['step'](size):.1f} x" if single else "not measured",
            f"{known['step'](size, precision='bf16'):.1f} x" if single else "not measured",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _grid(data: dict[str, Any]) -> list[str]:
    def size(grid: list[int]) -> str:
        return f"{grid[0]} x {grid[1]}"

    # The last row is the choice, once more.
    return [
        f"| {size(row['resolution']['attn'])} | {size(row['resolution']['ffn'])} | {row['drift']:.1e} "
        f"| {row['rotation']:.1e} | {row['macs']:.3f} |"
        for row in data["rows"][:-1]
    ]


def _sites(data: dict[str, Any]) -> list[str]:
    return [
        f"| {row['structure']} | {row['way']} | {row['force_of_symmetry_zero']:.3f} "
        f"| {row['energy_moved_1e-07_A_milli']:.2f} | {row['energy_moved_0.0001_A_milli']:.2f} "
        f"| {row['energy_displaced_and_moved_0.0001_A_milli']:.2f} |"
        for row in data["sites"]
        if row["network"] == "oc20_small"
    ]


def _sites_reference(data: dict[str, Any]) -> list[str]:
    rows = {(row["structure"], row["way"]): row for row in data["sites"] if row["network"] == "random"}

    def share(row: dict[str, Any], key: str) -> str:
        value = row[key] / row["rms_force_rattled"]
        return "0" if value == 0 else f"{value:.0e}" if value < 0.001 else f"{value:.3f}"

    lines = []
    for name in dict.fromkeys(structure for structure, _ in rows):
        ours, theirs = rows[name, "strict"], rows[name, "reference"]
        keys = ("force_of_symmetry_zero", "force_images", "force_moved_1e-07_A")
        cells = [f"{share(ours, key)} | {share(theirs, key)}" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _better_network(data: dict[str, Any]) -> list[str]:
    """Methods of the study of `study_teacher`, by budget and distance from the dense network."""
    known = _study(data)
    rows = [
        (study, row["keep"], known["mae"](study, row["method"], row["keep"], on="test"), row["method"])
        for study in ("routers", "cuts")
        for row in data["studies"][study]
        if row["method"] != "dense"
    ]
    lines = []
    for study, keep, change, method in sorted(rows, key=lambda row: (row[0] == "cuts", -row[1], row[2])):
        macs = known["macs"](study, method, keep, on="test")
        worse = known["worse"](study, method, keep, on="test")
        lines.append(f"| `{method.removeprefix('route_')}` | {macs:.0f} % | {change:.3f} | {worse:.1f} % |")
    return lines


TABLES: dict[str, Callable[[Any], list[str]]] = {
    "batches": _batches,
    "better_network": _better_network,
    "grid": _grid,
    "lossless": _lossless,
    "sites": _sites,
    "speed": _speed,
    "sites_reference": _sites_reference,
}
