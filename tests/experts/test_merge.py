"""Files of experts: round trip, single experts, damage; merging one task into an ordinary checkpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_command
from model_helpers import slab, water
from safetensors.torch import load_file, save_file
from tiny_experts import KINDS, NORMALIZERS, TASKS, compositions, contents_of, network, write_network

from equiformer2 import load_checkpoint
from equiformer2.checkpoint.expert_files import is_expert_file, read_experts, with_experts, write_experts
from equiformer2.errors import InputError
from equiformer2.experts import ExpertNetwork
from equiformer2.experts.composition import composition_from_formula
from equiformer2.experts.merge import merge_experts


@pytest.fixture(scope="module")
def experts() -> ExpertNetwork:
    return network()


@pytest.fixture(scope="module")
def file(experts: ExpertNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("files") / "tiny.safetensors", experts)


def test_a_file_gives_the_same_network(experts: ExpertNetwork, file: Path) -> None:
    contents = read_experts(file)
    assert list(contents.tasks) == list(TASKS)
    for name, task in contents.tasks.items():
        assert task.normalizers == NORMALIZERS[name]
        assert task.energy_kind == KINDS[name]
        assert torch.equal(task.composition, compositions()[name])
        assert task.provenance == {"frames": 7}
    again = ExpertNetwork.from_contents(contents)
    assert again.settings == experts.settings
    with torch.no_grad():
        for structure, task in ((slab(), "dft"), (water(), "teacher")):
            expected, found = experts(structure, task), again(structure, task)
            assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_some_experts_are_read_without_the_others(experts: ExpertNetwork, file: Path) -> None:
    whole, some = read_experts(file), read_experts(file, only=[2, 0])
    stacks = experts.expert_weights()
    for name, stack in some.weights["raw"].experts.items():
        assert torch.equal(stack, stacks[name][[2, 0]])
    size = sum(4 * stack.numel() for stack in stacks.values())
    assert whole.bytes_read - some.bytes_read == size // 2
    composition = composition_from_formula("Cu12CO", 90)
    cut = ExpertNetwork.from_contents(some)
    expected = experts.merged("teacher", composition, [2, 0]).state_dict()
    for name, value in cut.merged("teacher", composition).state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [3, 1]])
def test_the_order_of_experts_changes_no_answer(
    experts: ExpertNetwork, file: Path, tmp_path: Path, order: list[int]
) -> None:
    """The gate follows the stacks, in memory and in a file that is written of some experts."""
    read = read_experts(file, only=order)
    write_experts(tmp_path / "other.safetensors", read)
    composition = compositions()["dft"]
    expected = experts.merged("dft", composition, order).state_dict()
    for contents in (read, read_experts(tmp_path / "other.safetensors")):
        found = ExpertNetwork.from_contents(contents)
        assert found.settings.num_experts == len(order)
        for name, value in found.merged("dft", composition).state_dict().items():
            torch.testing.assert_close(value, expected[name], msg=name)


def test_a_file_of_some_experts_is_a_file_of_experts(
    experts: ExpertNetwork, file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "half.safetensors"
    write_experts(path, with_experts(read_experts(file), [1, 3]))
    half = read_experts(path)
    assert half.settings["num_experts"] == 2
    assert half.experts == (0, 1)
    composition = compositions()["dft"]
    expected = experts.merged("dft", composition, [1, 3]).state_dict()
    for name, value in ExpertNetwork.from_contents(half).merged("dft", composition).state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("composition", [None, "Cu12CO"])
def test_the_command_writes_an_ordinary_checkpoint(
    experts: ExpertNetwork, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], composition: Any
) -> None:
    out = tmp_path / "merged.pt"
    words = ["--checkpoint", file, "--task", "teacher", "--out", out, "--json"]
    more = [] if composition is None else ["--composition", composition]
    assert run_command("experts merge", *words, *more) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(Path(f"{out}.json").read_text())
    assert record["task"] == "teacher"
    assert record["schema"] == "experts-merge/1"
    assert record["composition_from"] == (composition or "mean of the training data")
    assert sum(record["coefficients"]) == pytest.approx(1.0, abs=1e-6)
    merged = load_checkpoint(out)
    assert merged.energy_kind == "total"
    assert merged.normalizers == NORMALIZERS["teacher"]
    assert merged.provenance["merged_from"]["task"] == "teacher"
    if composition is not None:
        with torch.no_grad():  # 12 Cu, C and O
            expected, found = experts(slab(), "teacher"), merged.model(slab())
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    assert run_command("experts merge", *words, *more) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--task": "pbe"}, "has no task 'pbe': its tasks are dft, teacher"),
        ({"--composition": "Cu3Zz"}, "composition"),
        ({"--composition": "U"}, "knows (atomic numbers 1 to 89)"),
        ({"--weights": "averaged"}, "does not hold 'averaged' weights, only raw ones"),
        ({"--checkpoint": "plain"}, "is no file of an expert network"),
        ({"--checkpoint": "missing.safetensors"}, "missing.safetensors"),
    ],
)
def test_bad_input_gets_one_sentence(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], sentence: str
) -> None:
    words = {"--checkpoint": str(file), "--task": "dft", "--out": str(tmp_path / "out.pt")} | change
    if words["--checkpoint"] == "plain":
        words["--checkpoint"] = str(tmp_path / "plain.pt")
        merge_experts(file, "dft", words["--checkpoint"])
    assert run_command("experts merge", *(word for pair in words.items() for word in pair)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.pt").exists()


def test_elements_that_the_task_has_not_seen_are_told(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", file, "--out", tmp_path / "new" / "out.pt"]
    assert run_command("experts merge", *words, "--task", "pbe") == 2
    assert not (tmp_path / "new").exists()
    assert run_command("experts merge", *words, "--task", "dft", "--composition", "Cu3Au", "--json") == 0
    out, told = capsys.readouterr()
    assert json.loads(out)["unseen_elements"] == ["Au"]
    assert "warning: Au not among the training data of dft" in told
    assert load_checkpoint(tmp_path / "new" / "out.pt").provenance["merged_from"]["unseen_elements"] == ["Au"]
    summary = merge_experts(file, "dft", tmp_path / "some.pt", "Cu3O", experts=[2, 1])
    assert (summary["unseen_elements"], summary["experts"]) == ([], [2, 1])
    assert sum(summary["coefficients"]) == pytest.approx(1.0, abs=1e-6)


def test_a_result_never_replaces_the_experts(file: Path) -> None:
    before = file.read_bytes()
    assert (
        run_command("experts merge", "--checkpoint", file, "--task", "dft", "--out", file, "--overwrite") == 2
    )
    assert file.read_bytes() == before


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]  # type: ignore[no-any-return]


def changed(file: Path, path: Path, tensors: dict[str, Any], **content: Any) -> Path:
    """A copy with other tensors (None to leave one out) and other values of its content."""
    metadata = header_of(file)
    values = {**json.loads(metadata["content"]), **content}
    kept = {**load_file(file), **tensors}
    save_file(
        {name: value for name, value in kept.items() if value is not None},
        path,
        {"format": metadata["format"], "content": json.dumps(values)},
    )
    return path


BIAS = "raw/shared/blocks.0.ga.so2_conv_1.fc_m0.bias"


@pytest.mark.parametrize(
    ("tensors", "content", "sentence"),
    [
        ({BIAS: None}, {}, "do not fit"),
        ({"raw/gate/out.bias": torch.zeros(3)}, {}, "do not fit"),
        ({"raw/gate/out.bias": torch.full((4,), torch.nan)}, {}, "no finite numbers"),
        ({"raw/other/x": torch.zeros(3)}, {}, "unknown group"),
        ({"raw/experts/blocks.0.ffn.so3_linear_1.weight": torch.zeros(2, 3)}, {}, "no stack of 4 experts"),
        ({"raw/heads/energy_block.so3_linear_2.bias": torch.zeros(3, 1)}, {}, "entry for each of the tasks"),
        ({"tasks/dft/composition": None}, {}, "it has no tasks/dft/composition"),
        ({"tasks/dft/composition": torch.full((90,), 0.5)}, {}, "add up to 1"),
        ({"tasks/dft/composition": torch.full((90,), torch.nan)}, {}, "add up to 1"),
        ({"tasks/dft/composition": torch.eye(90)[0] * 2 - torch.eye(90)[1]}, {}, "add up to 1"),
        ({"Averaged/gate/out.bias": torch.zeros(4)}, {}, "it holds Averaged/gate/out.bias"),
        ({}, {"format_version": 2}, "update equiformer2"),
        ({}, {"format_version": "1"}, "no valid format_version"),
        ({}, {"tasks": []}, "list of 1 to"),
        ({}, {"tasks": [{"name": "a"}]}, "must hold"),
        ({}, {"more": 1}, "unknown parts"),
        ({}, {"settings": {"num_experts": -1}}, "num_experts"),
        ({}, {"settings": {"num_experts": 4, "channels": "6"}}, "channels"),
        ({}, {"model_config": {"lmax": 99}}, "model configuration"),
        ({}, {"units": {}}, "units"),
    ],
)
def test_damaged_files_are_named(
    file: Path, tmp_path: Path, tensors: dict[str, Any], content: dict[str, Any], sentence: str
) -> None:
    path = changed(file, tmp_path / "changed.safetensors", tensors, **content)
    with pytest.raises(InputError, match=sentence) as found:
        ExpertNetwork.from_contents(read_experts(path))
    assert "changed.safetensors" in str(found.value)
    assert "\n" not in str(found.value)


def test_cut_and_foreign_files_are_named(file: Path, tmp_path: Path) -> None:
    content, path = file.read_bytes(), tmp_path / "cut.safetensors"
    for size in (0, 4, 100, 2000, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"cut\.safetensors"):
            read_experts(path)
    save_file({"x": torch.zeros(2)}, path)
    assert not is_expert_file(path)
    with pytest.raises(InputError, match="no file of an expert network"):
        read_experts(path)
    with pytest.raises(InputError, match="were asked for"):
        read_experts(file, only=[4])


def test_a_header_that_could_not_be_read_is_not_written(experts: ExpertNetwork, tmp_path: Path) -> None:
    contents = replace(contents_of(experts), provenance={"record": ["x" * 1000] * 17_000})
    with pytest.raises(InputError, match=r"its header of 17,.* bytes is longer than"):
        write_experts(tmp_path / "long.safetensors", contents)
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    spoilt = network()
    with torch.no_grad():
        spoilt.gate.out.bias[0] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        write_experts(tmp_path / "spoilt.safetensors", contents_of(spoilt))
    assert not list(tmp_path.iterdir())
