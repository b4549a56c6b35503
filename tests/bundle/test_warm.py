"""Where a warm retraining starts: planned night after night, without any training."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_world import DataWorld
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from deepfloyd_core.adapters.files import LORA_FILE
from deepfloyd_core.bundle.gate import withdrawn_pictures
from deepfloyd_core.bundle.known_pictures import ledger_now, missing
from deepfloyd_core.bundle.planned import planned, planned_bundle
from deepfloyd_core.bundle.recipe import check_reproduction, check_scratch, recipe_of, scratch_starts, write_scratch
from deepfloyd_core.bundle.waiting import waiting
from deepfloyd_core.bundle.warm import Retraining, retraining
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.eval_choice import choose_held_out
from deepfloyd_core.errors import ArtifactError, ConfigError, DataError
from deepfloyd_core.files import read_sealed, write_sealed
from deepfloyd_core.index.ledger import read_index
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.collected import write_record
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.store.registry import Decision, Outcome, block, news_of, publish, settled
from deepfloyd_core.store.versions import Origin
from deepfloyd_core.training.start import StartSummary, known_pictures, start_weights

RANK = 2
KEYS: dict[str, Any] = {"lora_rank": RANK, "max_train_steps": 6, "train_batch_size": 2, "retrain_mode": "warm"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the tiny Stage I."""
    from deepfloyd_core.adapters.method import base_dtype, method_of
    from deepfloyd_core.config.stage import StageConfig
    from deepfloyd_core.models.unet import load_unet

    config = StageConfig(model_flavour="tiny-i", mixed_precision="no", lora_rank=RANK)
    folder, base = tmp_path_factory.mktemp("lora"), Path(FLAVOURS["tiny-i"].repo)
    unet = load_unet(base, base_dtype(config))
    method_of(config).prepare(unet, config, 1)
    method_of(config).save(unet, 1, base, folder)
    return folder / LORA_FILE


@dataclass
class Nights:
    """A data set, and versions whose LoRAs are named by what they would be trained from."""

    world: DataWorld
    weights: Path
    trained: list[str] = field(default_factory=list)  # the LoRAs, in the order in which they were made

    def add(self, *numbers: int, caption: str = "a star") -> None:
        for number in numbers:
            picture = Image.new("RGB", (64 + number, 64), (number, 2 * number, 255 - number))
            self.world.add(f"{number}.png", picture, caption)

    def remove(self, *numbers: int) -> None:
        for number in numbers:
            for file in self.world.folder.joinpath("pictures").glob(f"{number}.*"):
                file.unlink()

    def plan(self, **keys: Any) -> tuple[Run, Artifact, Retraining]:
        choose_held_out.cache_clear()
        run = self.world.load(stages=(1,), **{**KEYS, **keys})
        index = self.world.index(run)
        return run, index, retraining(run, index)

    def words(self, **keys: Any) -> str:
        return self.plan(**keys)[2].words

    def night(self, then: str = "promoted", **keys: Any) -> Outcome:
        """What `retrain` does, without the training."""
        run, index, plan = self.plan(**keys)
        assert plan.bundle is not None
        if outcome := settled(run.workspace, plan.bundle.fingerprint):
            return outcome
        requests = planned(run, index, plan.starts)
        assert requests is not None
        self.world.eval_set(run, index)
        self._make(run.workspace, requests["cascade_samples"], lambda request, folder: None)
        lora = self._make(run.workspace, requests["stage1_lora"], self._lora)
        bundle = self._make(run.workspace, plan.bundle, lambda request, folder: self._lora(request, folder / "stage1"))
        assert requests["lora_bundle"] == plan.bundle and plan.bundle.inputs["stage1_lora"] == lora.name
        judge = lambda version, champion: Decision(then, "because", None)  # type: ignore[arg-type]  # noqa: E731
        return publish(run.workspace, bundle, index, Origin("", recipe_of(run), plan.words), judge)

    def _make(self, workspace: Path, request: Request, write: Callable[[Request, Path], None]) -> Artifact:
        def build(work: WorkDir) -> Summary:
            write(request, work.path)
            self.trained += [request.name] if request.kind == "stage1_lora" else []
            return Summary()

        return materialise(workspace, request, build)

    def _lora(self, request: Request, folder: Path) -> None:
        """Weights that follow from what the LoRA is made from, and the losses of a picture."""
        folder.mkdir(exist_ok=True)
        of = request.inputs.get("stage1_lora", request.name)
        with safe_open(self.weights, "numpy") as file:
            metadata = {**file.metadata(), "made": of}
        save_file(load_file(self.weights), folder / LORA_FILE, metadata)
        row = {
            "step": 6,
            "model": "trained",
            "part": "held_out",
            "image_id": "x",
            "conditions": of,
            "t": 1,
            "loss": 0.5,
        }
        pq.write_table(pa.Table.from_pylist([row]), folder / "validation.parquet")


@pytest.fixture
def nights(world: DataWorld, weights: Path) -> Nights:
    """Four pictures, of which version 1 was made and serves."""
    nights = Nights(world, weights)
    nights.add(*range(4))
    outcome = nights.night()
    assert outcome.version.start == "from the base, because no version served"
    return nights


def test_a_warm_chain_ends_a_night_without_changes_at_once(nights: Nights) -> None:
    for number in (4, 5, 6):
        nights.add(number)
        outcome = nights.night()
        assert outcome.is_new and outcome.version.start == f"from version {number - 3}"
        assert outcome.version.number == number - 2
        for _ in range(2):
            again = nights.night()
            assert not again.is_new and (again.state, again.version.number) == ("champion", number - 2)
    assert len(nights.trained) == 4
    run, _, plan = nights.plan()
    start = plan.starts[1]
    assert start.summary(StartSummary) == StartSummary(version=3, pictures=5), "of 6 pictures one is held out"
    known = known_pictures(start)
    assert known is not None and len(known) == 5
    (bundle,) = (run.workspace / "lora_bundle").glob(f"{_bundle_of(run, 3)}/stage1")
    assert start_weights(start).checked("x").read_bytes() == (bundle / LORA_FILE).read_bytes()


def _bundle_of(run: Run, number: int) -> str:
    record = json.loads((run.workspace / "versions" / f"{number:04d}.json").read_text())
    return str(record["bundle"])


def test_a_blocked_candidate_is_not_made_again_until_something_changes(nights: Nights) -> None:
    nights.add(4)
    blocked = nights.night("blocked")
    assert blocked.state == "blocked" and blocked.version.start == "from version 1" and len(nights.trained) == 2
    again = nights.night()
    assert (again.state, again.version.number, again.is_new) == ("blocked", 2, False) and len(nights.trained) == 2
    news = news_of(nights.world.folder / "workspace", again)
    assert news == "no change: version 2 (from version 1) is blocked (because); version 1 serves"
    nights.remove(4)
    assert (nights.night().state, len(nights.trained)) == ("champion", 2), "the champion's own data: nothing to do"
    nights.add(4, 5)
    assert nights.night().version.start == "from version 1" and len(nights.trained) == 3
    block(nights.plan()[0].workspace, 3, "no", "a test")
    assert nights.night().state == "blocked" and len(nights.trained) == 3, "what was rolled back is not made again"


def test_another_setting_goes_on_from_the_version_that_serves_and_new_prompts_train_nothing(nights: Nights) -> None:
    assert nights.night(learning_rate=1e-3).version.start == "from version 1" and len(nights.trained) == 2
    assert nights.night(learning_rate=1e-3).is_new is False
    more = nights.night(learning_rate=1e-3, validation_prompt="another")
    assert more.is_new and len(nights.trained) == 2 and more.version.start == "from version 1", "as its LoRA did"
    assert nights.night(learning_rate=1e-3, validation_prompt="another").is_new is False
    shared = nights.night(learning_rate=1e-3, warm_new_share=0.25)
    assert shared.is_new and len(nights.trained) == 3, "the share decides the draws of a warm training"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda nights: nights.remove(2), "2.png was removed"),
        (lambda nights: nights.add(2, caption="a moon"), "2.png was changed"),
        (lambda nights: nights.world.add("2.png", b"no picture any more"), "2.png was rejected"),
        (lambda nights: nights.remove(0, 2, 3, 14), "0.png, 14.png, 2.png and 1 more were removed"),
    ],
)
def test_a_picture_that_an_earlier_version_of_the_chain_knows_is_honoured_when_it_goes(
    nights: Nights, change: Callable[[Nights], None], reason: str
) -> None:
    """Version 3 starts from 2, which starts from 1: all three know picture 2, which is none of those that came last."""
    for number in (14, 15):
        nights.add(number)
        nights.night()
    change(nights)
    nights.add(16)
    with pytest.raises(DataError) as caught:
        nights.words(honour_removals="refuse", max_rejected_share=0.9)
    words = nights.words(max_rejected_share=0.9)
    assert words == f"from the base, because {reason}"
    told = str(caught.value)
    assert told.startswith(words.removeprefix("from the base, because ")) and "version 3, which serves" in told
    outcome = nights.night(max_rejected_share=0.9)
    assert outcome.version.start == words and outcome.is_new
    assert "start" not in (json.loads(_manifest(nights, nights.trained[-1]).read_text())["inputs"])
    assert nights.night(max_rejected_share=0.9).is_new is False
    nights.add(17)
    assert nights.words(honour_removals="refuse", max_rejected_share=0.9) == "from version 4", "which never knew it"


def _manifest(nights: Nights, name: str) -> Path:
    return nights.world.folder / "workspace" / name / "manifest.json"


def test_a_new_name_for_a_known_picture_removes_nothing(nights: Nights) -> None:
    for file in sorted(nights.world.folder.joinpath("pictures").glob("2.*")):
        file.rename(file.with_name(f"renamed{file.suffix}"))
    nights.add(4)
    assert nights.words(honour_removals="refuse") == "from version 1"


def test_data_that_went_back_beyond_a_warm_version_publishes_the_bundle_of_that_time(nights: Nights) -> None:
    nights.add(4)
    second = nights.night()
    nights.remove(4)
    third = nights.night()
    assert (
        second.version.start == "from version 1" and third.version.start == "from the base, because 4.png was removed"
    )
    assert third.version.number == 3 and len(nights.trained) == 2, "version 1 was made of just that"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora_rank": 3}, "the settings do not fit Stage I of version 1, a LoRA of rank 2; lora_rank is 3"),
        ({"use_bitfit": True, "lora_rank": 16}, "Stage I of version 1, which is a LoRA; the settings train biases"),
        ({"num_eval_images": 3}, "png were held out of training, or left out of it"),
    ],
)
def test_what_does_not_fit_the_weights_begins_from_the_base(nights: Nights, keys: dict[str, Any], words: str) -> None:
    assert nights.words(**keys).startswith("from the base, because ") and words in nights.words(**keys)
    assert nights.words(**keys, honour_removals="refuse") == nights.words(**keys), "no picture was removed"


def test_weights_for_another_base_model_begin_from_that(nights: Nights, tmp_path: Path) -> None:
    base = shutil.copytree(FLAVOURS["tiny-i"].repo, tmp_path / "base")
    with (base / "unet" / "config.json").open("a") as file:
        file.write("\n")
    words = nights.words(pretrained_model_name_or_path=str(base))
    assert words == "from the base, because Stage I of version 1 belongs to another base model"


def test_a_pair_that_was_replaced_is_another_picture(world: DataWorld) -> None:
    follow = {"model_flavour": "tiny-i", "controlnet": True, "controlnet_conditioning": "paired"}
    pairs = {"id": "pairs", "dataset_type": "conditioning", "instance_data_dir": str(world.folder / "pairs")}
    for number in range(4):
        world.add(f"{number}.png", Image.new("RGB", (64, 64), (number, 0, 0)))
        world.add(f"../pairs/{number}.png", Image.new("RGB", (64, 64), (0, number, 0)), None)
    run = world.load({"conditioning_data": "pairs"}, pairs, stages=(1,), stage1=follow)
    before = ledger_now(run, world.index(run))
    out = before.held_out.to_pylist()
    number = next(row["source"] for row in before.rows.to_pylist() if row["image_id"] not in out)
    assert missing(before, before, (1,)) is None
    world.add(f"../pairs/{number}", Image.new("RGB", (64, 64), (0, 0, 200)), None)
    gone = missing(before, ledger_now(run, world.index(run)), (1,))
    assert gone is not None and gone.taken_out == f"{number} was changed"


def test_weights_of_another_program_have_unknown_pictures(nights: Nights) -> None:
    nights.night(retrain_mode="scratch", stage1={"model_flavour": "tiny-i", "init_lora": str(nights.weights)})
    nights.add(4)
    assert "version 2 started from weights of init_lora, whose pictures are not known" in nights.words()


def test_a_champion_that_is_not_complete_or_a_list_that_is_lost_begins_from_the_base(nights: Nights) -> None:
    nights.add(4)
    run, _, _ = nights.plan()
    (index,) = (run.workspace / "image_index").glob(f"{_index_of(run, 1)}/index.parquet")
    index.rename(index.with_name("away"))
    assert nights.words().startswith("from the base, because version 1 cannot be started from: ")
    index.with_name("away").rename(index)
    assert nights.words() == "from version 1"
    for file in (index, run.workspace / "lora_bundle" / _bundle_of(run, 1) / "stage1" / LORA_FILE):
        whole = file.read_bytes()
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        assert "has other bytes than its manifest says" in nights.words()
        file.write_bytes(whole)
    assert nights.words() == "from version 1"
    (run.workspace / "lora_bundle" / _bundle_of(run, 1) / "stage1" / LORA_FILE).unlink()
    assert "because version 1 cannot be started from: Version 1 cannot be used" in nights.words()
    (run.workspace / "versions" / "0001.json").write_bytes(b"garbage")
    assert nights.words().startswith("from the base, because ") and "0001.json" in nights.words()


def _index_of(run: Run, number: int) -> str:
    return str(json.loads((run.workspace / "versions" / f"{number:04d}.json").read_text())["image_index"])


def test_scratch_plans_as_before_and_a_run_file_with_both_is_refused(nights: Nights) -> None:
    nights.add(4)
    run, index, plan = nights.plan(retrain_mode="scratch")
    requests = planned(run, index)
    assert requests is not None and plan == Retraining(requests["lora_bundle"], {}, "")
    with pytest.raises(ConfigError, match=r"stage1\.init_lora is '3', and retrain_mode is warm, which itself chooses"):
        nights.words(init_lora="3")
    with pytest.raises(ConfigError, match="honour_removals is refuse, without effect while retrain_mode is scratch"):
        nights.words(retrain_mode="scratch", honour_removals="refuse")


def test_it_waits_for_more_pictures_in_a_chain_too(nights: Nights) -> None:
    nights.add(4)
    nights.night()
    nights.add(5)
    run, index, _ = nights.plan(retrain_min_new_pictures=2)
    waits = waiting(run, index)
    assert waits is not None and waits.reason == "waiting, 1 new picture of 2 (retrain_min_new_pictures)"


# ---- made again ---------------------------------------------------------------------------------------------------------


def _again(nights: Nights, number: int, folder: Path) -> Run:
    """The run of a version's scratch folder, after everything that `reproduce` checks before it trains."""
    workspace = nights.world.folder / "workspace"
    found = check_reproduction(workspace, number)
    run = load_run(write_scratch(workspace, found.version, folder))
    choose_held_out.cache_clear()
    index = nights.world.index(run)
    check_scratch(folder, index)
    again = planned_bundle(run, index, scratch_starts(run))
    assert again is not None and again.fingerprint == _bundle_of(run_of(nights), number)
    return run


def run_of(nights: Nights) -> Run:
    return nights.world.load(stages=(1,), **KEYS)


def test_a_warm_version_is_made_again_from_its_start_also_when_the_version_before_it_is_gone(
    nights: Nights, tmp_path: Path
) -> None:
    nights.add(4)
    nights.night()
    workspace = run_of(nights).workspace
    shutil.rmtree(workspace / "lora_bundle" / _bundle_of(run_of(nights), 1))
    nights.add(5)
    _again(nights, 2, tmp_path / "again")
    (start,) = (workspace / "stage1_start").iterdir()
    manifest = Artifact("stage1_start", start.name, start).manifest
    (start / LORA_FILE).write_bytes(b"garbage")
    with pytest.raises(
        ArtifactError, match=r"Version 2 cannot be made again: the weights that its Stage I starts from are"
    ):
        check_reproduction(workspace, 2)
    shutil.rmtree(start)
    write_record(workspace, f"stage1_start/{start.name}", datetime(2026, 11, 29, tzinfo=UTC), manifest)
    with pytest.raises(
        ArtifactError, match="starts from, those of version 1, were collected on 2026-11-29 by `deepfloyd gc`"
    ):
        check_reproduction(workspace, 2)


def test_a_caption_that_was_rewritten_ends_a_reproduction_before_it_trains(nights: Nights, tmp_path: Path) -> None:
    nights.add(2, caption="a moon")
    with pytest.raises(DataError) as caught:
        _again(nights, 1, tmp_path / "again")
    assert str(caught.value) == (
        "Version 1 cannot be made again: its pictures or captions are not as they were. 1 caption changed: 2.png."
    )


def test_what_started_from_a_version_or_a_file_by_init_lora_is_made_again_while_that_is_there(
    nights: Nights, tmp_path: Path
) -> None:
    workspace = run_of(nights).workspace
    file = shutil.copy(nights.weights, tmp_path / "own.safetensors")
    for number, parent in ((2, "1"), (3, str(file))):
        nights.night(retrain_mode="scratch", stage1={"model_flavour": "tiny-i", "init_lora": parent})
        run = _again(nights, number, tmp_path / f"again-{number}")
        assert Path(str(run.config.stage(1).init_lora)).is_absolute()
    shutil.rmtree(workspace / "lora_bundle" / _bundle_of(run_of(nights), 1))
    with pytest.raises(ArtifactError, match=r"Version 1 cannot be used: .* is missing"):
        check_reproduction(workspace, 2)
    Path(file).write_bytes(b"other")
    with pytest.raises(DataError, match=r"its stage1.init_lora is .*own.safetensors has other bytes than it had"):
        check_reproduction(workspace, 3)


def test_what_is_read_again_from_elsewhere_is_said_beforehand(nights: Nights) -> None:
    workspace = run_of(nights).workspace
    record = workspace / "versions" / "0001.json"
    version = read_sealed(record, "")
    pairs = {"id": "depth", "type": "local", "dataset_type": "conditioning", "instance_data_dir": "/depth"}
    urls = {"id": "web", "type": "csv", "dataset_type": "image", "csv_file": "urls.csv"}
    version["recipe"]["data"] += [pairs, urls]
    write_sealed(record, {key: value for key, value in version.items() if key != "seal"})
    ends = "as they are now. If any is not as it was, the run ends before it trains"
    assert check_reproduction(workspace, 1).notes == (
        f"depth: its files are read again from /depth, {ends}", f"web: its files are read again from urls.csv, {ends}",
    )  # fmt: skip


def test_a_block_says_that_the_version_which_serves_knows_a_picture_that_was_taken_out(nights: Nights) -> None:
    nights.add(4)
    run, _, _ = nights.plan()
    assert withdrawn_pictures(run, 1, nights.night("blocked").version) == ""
    nights.remove(2)
    told = withdrawn_pictures(run, 1, nights.night("blocked").version)
    assert told == "but version 1 was trained on pictures that are no longer in the data: 2.png was removed"


SPARES: dict[str, Any] = {"num_eval_images": None}  # as many as the data set can spare


def held_out(nights: Nights, **keys: Any) -> set[str]:
    """The names of the pictures that the next training holds out."""
    run, index, _ = nights.plan(**{**SPARES, **keys})
    ids = {one for choice in choose_held_out(run, index) for one in choice.ids}
    return {row.source for row in read_index(index) if row.image_id in ids}


def test_a_picture_that_the_version_which_serves_was_trained_on_is_not_held_out_later(nights: Nights) -> None:
    nights.add(*range(4, 19))  # 19 pictures spare one, and 20 two
    (first,) = held_out(nights)
    nights.night(**SPARES)
    nights.add(19)
    assert held_out(nights) == {first, "19.png"} and nights.words(**SPARES) == "from version 2"
    nights.night(**SPARES)
    nights.remove(19)
    nights.add(*range(20, 22))
    second = held_out(nights) - {first}
    assert second < {"20.png", "21.png"} and len(second) == 1


def test_without_a_new_picture_fewer_are_held_out_but_not_none_and_as_many_as_a_person_asks_for(nights: Nights) -> None:
    nights.add(*range(4, 22))
    first, second = sorted(held_out(nights))
    nights.night(**SPARES)
    nights.remove(int(first.removesuffix(".png")))
    assert held_out(nights) == {second}, "21 pictures spare two, and the other 20 were trained on"
    assert len(held_out(nights, num_eval_images=3)) == 3
    nights.remove(int(second.removesuffix(".png")))
    assert len(held_out(nights)) == 2


def test_a_version_of_which_fewer_were_held_out_is_made_again_with_the_same(nights: Nights, tmp_path: Path) -> None:
    nights.add(*range(4, 22))
    first, _ = sorted(held_out(nights))
    nights.night(**SPARES)
    nights.remove(int(first.removesuffix(".png")))
    assert nights.night(**SPARES).version.number == 3
    _again(nights, 3, tmp_path / "again")
