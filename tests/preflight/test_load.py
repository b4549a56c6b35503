"""All faults of a run file and its data file at once, and none that only follows from another."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfloyd_core.errors import ConfigError
from deepfloyd_core.preflight.load import load_run


@dataclass(frozen=True, eq=False)
class Fault:
    """Keys of the run file and of the data file's two entries that are wrong together, and what is said of them."""

    says: str
    run: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)


REFUSED = Fault("run.json: lora_type is 'lycoris', but adapters are", {"lora_type": "lycoris"})
# With one of these the run file makes no configuration, and nothing can be compared with that.
VALUES = (
    Fault("run.json: workers is 0; ", {"workers": 0}),
    Fault("run.json: workerz is not a known key.", {"workerz": 2}),
)
# With this one it is not known what the entry would be, so nothing can be said of all entries together.
ENTRY = Fault("data.json: b: resolution is 'big'; ", second={"resolution": "big"})
ALONE = (
    Fault("data.json: a: instance_data_dir is 'nowhere'", first={"instance_data_dir": "nowhere"}),
    Fault("data.json: a: caption_filter_list: line 1 is no regular", first={"caption_filter_list": ["("]}),
)
SIZE = Fault("a: resolution is 60, 60 px at stage 1; ", first={"resolution": 60})
EVAL = Fault("run.json: eval_dataset_id is 'c'; ", {"eval_dataset_id": "c"})
TEXT = Fault("data.json: b: text_embeds is 'x'; text embeds entries: none.", second={"text_embeds": "x"})
ALL = (REFUSED, *VALUES, ENTRY, *ALONE, SIZE, EVAL, TEXT)


def expected(faults: set[Fault]) -> set[str]:
    """What can be told of faults that a run has together."""
    hidden = {SIZE, EVAL} if faults & set(VALUES) else set()
    hidden |= {EVAL, TEXT} if ENTRY in faults else set()
    return {fault.says for fault in faults - hidden}


@dataclass(frozen=True)
class Files:
    """A run file and a data file of two picture sets."""

    folder: Path

    def refusal(self, *faults: Fault) -> str:
        """The message with which they are refused once they have these; empty where they load."""
        (self.folder / "pictures").mkdir(exist_ok=True)
        run = {"workspace": "w", "data_backend_config": str(self.folder / "data.json"), "model_flavour": "tiny-i"}
        place = {"type": "local", "instance_data_dir": str(self.folder / "pictures")}
        entries: list[dict[str, Any]] = [{"id": "a", **place}, {"id": "b", **place}]
        for fault in faults:
            run |= fault.run
            entries[0] |= fault.first
            entries[1] |= fault.second
        (self.folder / "run.json").write_text(json.dumps(run))
        (self.folder / "data.json").write_text(json.dumps(entries))
        try:
            load_run(self.folder / "run.json")
        except ConfigError as error:
            return str(error)
        return ""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


@settings(max_examples=100, deadline=None)
@given(faults=st.sets(st.sampled_from(ALL)))
def test_any_faults_of_a_run_are_told_at_once_and_no_others(files: Files, faults: set[Fault]) -> None:
    lines, says = files.refusal(*faults).splitlines(), expected(faults)
    if len(says) > 1:
        assert lines.pop(0) == f"{len(says)} faults to correct:"
        assert all(line.startswith("- ") for line in lines)
    assert len(lines) == len(says)
    assert all(len([line for line in lines if text in line]) == 1 for text in says)


def test_faults_come_in_the_order_of_the_files(files: Files) -> None:
    message = files.refusal(REFUSED, *ALONE, SIZE, EVAL, TEXT)
    order = [REFUSED, ALONE[0], TEXT, ALONE[1], EVAL, SIZE]
    places = [message.index(fault.says) for fault in order]
    assert places == sorted(places)


def test_one_fault_is_its_sentence_alone(files: Files) -> None:
    assert files.refusal(VALUES[0]).startswith(f"{files.folder / 'run.json'}: workers is 0; ")


def test_every_contradiction_of_a_run_file_is_told(files: Files) -> None:
    wrong = {"eval_clip_model": "x", "validation_resolution": "63,1000", "task_runner_address": "tcp://here:1"}
    lines = files.refusal(Fault("", wrong)).splitlines()
    assert lines[0] == "3 faults to correct:"
    keys = ["eval_clip_model", "task_runner_address", "validation_resolution"]
    assert [line.split()[2] for line in lines[1:]] == keys
    assert all(line.startswith(f"- {files.folder / 'run.json'}: ") and line.endswith(".") for line in lines[1:])


def test_a_run_file_that_does_not_say_its_stage_hides_no_fault_of_the_data_file(files: Files) -> None:
    message = files.refusal(Fault("", {"model_flavour": "tiny-x", "base_model_precision": "int4-quanto"}), *ALONE)
    assert message.startswith("4 faults to correct:\n")
    assert "model_flavour is 'tiny-x', which is none of DeepFloyd's" in message and "Set the nearest, nf4." in message
    assert all(fault.says in message for fault in ALONE)


def test_a_file_that_is_none_ends_it(files: Files) -> None:
    files.refusal(*ALONE)
    (files.folder / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON") as caught:
        load_run(files.folder / "run.json")
    assert len(str(caught.value).splitlines()) == 1


def test_overrides_are_told_together(files: Files) -> None:
    files.refusal()
    for overrides in (("seed", "=3"), ("lora_rank=", "workers=")):
        with pytest.raises(ConfigError) as caught:
            load_run(files.folder / "run.json", overrides)
        count, *lines = str(caught.value).splitlines()
        assert count == "2 faults to correct:"
        assert [line.startswith(f"- --set {text!r}") for line, text in zip(lines, overrides, strict=True)] == [True] * 2


@pytest.mark.parametrize(
    ("workspace", "refused"),
    [("pictures", True), ("pictures/a/../work", True), ("link/work", True), ("pictures/.work", False),
     ("pictures-work", False), ("", False), ("loop/work", False)],
)  # fmt: skip
def test_a_workspace_among_the_pictures_is_refused_for_its_sheets_would_be_trained_on(
    tmp_path: Path, workspace: str, refused: bool
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "link").symlink_to("pictures")
    (tmp_path / "loop").symlink_to("loop")
    entry = {"id": "cats", "type": "local", "instance_data_dir": str(tmp_path / "pictures"), "resolution": 64}
    (tmp_path / "data.json").write_text(json.dumps([entry]))
    place = str(tmp_path / workspace)
    run = {"workspace": place, "data_backend_config": str(tmp_path / "data.json"), "model_flavour": "tiny-i"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    if not refused:
        assert load_run(tmp_path / "run.json").workspace == Path(place)
        return
    said = (
        rf"^workspace is {place}, in the folder of cats's pictures, {entry['instance_data_dir']}: the artifacts in it "
    )
    with pytest.raises(ConfigError, match=said):
        load_run(tmp_path / "run.json")
