"""The data file: what is refused and in which words, what is ignored and said, what a disabled entry may hold."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.simpletuner_data import DATA_IGNORED, DATA_REFUSED, our_entry
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.pictures import faces
from deepfloyd_core.preflight.load import load_run


class Files:
    """A run file for both stages and a data file that each test writes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data.json"
        (folder / "pictures").mkdir()
        run = {"workspace": "w", "data_backend_config": str(self.data), "stage1": {"model_flavour": "tiny-i"},
               "stage2": {"model_flavour": "tiny-ii"}}  # fmt: skip
        (folder / "run.json").write_text(json.dumps(run))

    def entry(self, **keys: Any) -> dict[str, Any]:
        return {"id": "set", "type": "local", "instance_data_dir": str(self.folder / "pictures"), **keys}

    def load(self, *entries: dict[str, Any], **keys: Any) -> Run:
        self.data.write_text(json.dumps([self.entry(**keys), *entries]))
        return load_run(self.folder / "run.json")

    def one(self, **keys: Any) -> ImageDataset:
        (dataset,) = self.load(**keys).datasets
        return dataset

    def refusal(self, *entries: dict[str, Any], **keys: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            self.load(*entries, **keys)
        message = str(caught.value)
        assert str(self.data) in message or "No data set" in message
        assert ".." not in message
        return message


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# ---- the file ---------------------------------------------------------------------------------------------------------


def test_a_key_that_is_there_twice_is_an_error_at_any_depth(files: Files) -> None:
    for text, says in (
        ('[{"id": "a", "resolution": 64, "resolution": 128}]', "the key 'resolution' of 'a' occurs 2 times"),
        ('[{"id": "a", "parquet": {"path": "x", "path": "x", "path": "y"}}]', "the key 'path' occurs 3 times"),
    ):
        files.data.write_text(text)
        with pytest.raises(ConfigError, match=says):
            load_run(files.folder / "run.json")
    (files.folder / "run.json").write_text('{"seed": 1, "seed": 2}')
    with pytest.raises(ConfigError, match="the key 'seed' occurs 2 times"):
        load_run(files.folder / "run.json")


def test_half_a_surrogate_pair_in_the_file_is_an_error_of_the_file(files: Files) -> None:
    files.data.write_text(json.dumps([files.entry(instance_prompt="x \ud800")]))
    with pytest.raises(ConfigError, match="is not valid JSON"):
        load_run(files.folder / "run.json")


def test_unknown_keys_name_the_nearest_also_inside_blocks(files: Files) -> None:
    assert "set: maximum_aspect_ration is not a known key. Did you mean maximum_aspect_ratio?" in files.refusal(
        maximum_aspect_ration=2
    )
    table = {"path": "x", "caption_colum": "y"}
    message = files.refusal(caption_strategy="csv", parquet=table)
    assert "set: parquet.caption_colum is not a known key. Did you mean caption_column?" in message
    assert "caption_shuffle.cuont is not a known key. Did you mean count?" in files.refusal(
        caption_shuffle={"cuont": 2}
    )
    assert "x: defualt is not a known key. Did you mean default?" in files.refusal(
        {"id": "x", "dataset_type": "text_embeds", "defualt": True}
    )


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"conditioning": [{"type": "canny"}]}, "controlnet_conditioning sets how"),
        ({"conditioning_type": "controlnet"}, "belongs to an entry of dataset_type conditioning"),
        ({"source_dataset_id": "set"}, "belongs to an entry of dataset_type conditioning"),
        ({"video": {"num_frames": 3}}, "not video"),
        ({"is_regularisation_data": True}, "against the base model"),
        ({"max_upscale_threshold": 0.2}, "nothing is ever upsampled"),
        ({"start_epoch": 2}, "use start_step"),
        ({"end_epoch": 3}, "use end_step"),
        ({"slider_strength": -0.5}, "slider training"),
        ({"timestep_sampling_offset": 0.1}, "IF predicts epsilon"),
        ({"grounding": {"enabled": True}}, "boxes of entities"),
        ({"caption_strategy": "csv", "parquet": {"path": "x", "bbox_column": "b"}}, "bbox_column is set, but boxes"),
        ({"huggingface": {"filter_func": "x"}}, "filters and grids of a saved data set"),
    ],
)
def test_a_refused_key_gives_its_reason_wherever_it_is(files: Files, keys: dict[str, Any], says: str) -> None:
    message = files.refusal(**keys)
    assert says in message
    assert "Remove the key." in message


def test_a_refused_key_that_says_no_is_no_reason_to_stop(files: Files) -> None:
    run = files.load(conditioning_data=None, video={}, is_regularisation_data=False, max_upscale_threshold=None,
                     start_epoch=1, end_epoch=None, slider_strength=0.0)  # fmt: skip
    assert len(run.datasets) == 1


def test_a_refused_key_of_a_stage_gives_its_reason_too(files: Files) -> None:
    files.load()
    for override in ("stage1.prediction_type=sample", "stage2.lora_type=lycoris"):
        with pytest.raises(ConfigError, match=r" is '\w+', but .* Remove the key"):
            load_run(files.folder / "run.json", (override,))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"id": "x", "dataset_type": "conditioning"}, "type is missing"),
        ({"id": "x", "dataset_type": "video"}, "not video"),
        ({"id": "x", "dataset_type": ["image"]}, "dataset_type is ['image']; it must be image, conditioning"),
        ({"id": "x", "dataset_type": "eval"}, "num_eval_images"),
        ({"id": "x", "dataset_type": "picture"}, "dataset_type is 'picture'"),
        ({"id": "x", "type": "aws"}, "type is 'aws', and aws_bucket_name is missing"),
        ({"id": "x", "type": "huggingface", "image_column": "c"}, "type is 'huggingface', and dataset_name is missing"),
        ({"id": "x", "type": "csv", "csv_file": "a.csv"}, "type is 'csv', and csv_cache_dir is missing"),
        ({"id": "x", "type": "csv", "csv_file": "a.csv", "csv_cache_dir": "c"}, "there is no such file"),
        ({"id": "x", "type": "webdataset", "instance_data_dir": "none"}, "not a folder of .tar files"),
        ({"type": "local"}, "entry 1: id is None; every entry needs a name"),
        ({"id": 3}, "id is 3"),
        ({"id": "set", "disabled": True}, "the id 'set' is used 2 times"),
        ({"id": "x", "disabled": 2}, "disabled is 2; it must be true or false"),
        ({"id": "x", "disabled": True, "disable": False}, "contradict each other"),
        ({"id": "x", "dataset_type": "text_embeds", "caption_filter_list": ["a("]}, "no regular expression"),
        ({"id": "x", "dataset_type": "text_embeds", "caption_filter_list": "f.yaml"}, "ending in .txt or .json"),
        ({"id": "x", "dataset_type": "text_embeds", "caption_filter_list": "f.txt"}, "no such file"),
        ({"id": "x", "dataset_type": "text_embeds", "caption_filter_list": "f.json"}, "no such file"),
    ],
)
def test_another_entry_that_cannot_be_meant_here_is_one_clear_line(
    files: Files, entry: dict[str, Any], says: str
) -> None:
    if entry.get("dataset_type") == "text_embeds":
        entry = {**entry, "default": True}
    if says == "no such file":
        with pytest.raises(ConfigError, match=says):
            files.load(entry)
        return
    message = files.refusal(entry)
    assert says in message
    assert len(message.splitlines()) == 1


def test_a_disabled_entry_is_looked_at_for_its_id_only(files: Files) -> None:
    odd = {
        "type": "carrier pigeon",
        "dataset_type": "video",
        "resolution": "large",
        "conditioning_data": "x",
        "nonsense": 1,
    }
    run = files.load({"id": "a", "disabled": True, **odd}, {"id": "b", "disable": True, **odd})
    assert [dataset.id for dataset in run.datasets] == ["set"]
    assert not run.notes
    assert "every entry needs a name" in files.refusal({"disabled": True})


def test_caches_of_other_tools_are_accepted_and_said(files: Files) -> None:
    run = files.load(
        {"id": "text", "dataset_type": "text_embeds", "default": True, "type": "aws", "aws_bucket_name": "b",
         "aws_secret_access_key": "hidden", "aws_region_name": None, "cache_dir": "", "write_batch_size": 128},
        {"id": "vae", "dataset_type": "image_embeds", "type": "local"},
        {"id": "clip", "dataset_type": "conditioning_image_embeds", "type": "local", "disabled": False},
        cache_dir_vae="x", text_embeds="text", image_embeds="vae",
    )  # fmt: skip
    notes = "\n".join(run.notes)
    for part in (
        "text: aws_bucket_name, aws_region_name, aws_secret_access_key are ignored; text embeds are in the workspace",
        "vae: dataset_type 'image_embeds' is ignored",
        "set: cache_dir_vae, image_embeds are ignored; nothing is cached there",
    ):
        assert part in notes
    assert "hidden" not in notes


def test_a_text_embeds_entry_must_be_there_and_one_is_the_default(files: Files) -> None:
    text = {"dataset_type": "text_embeds", "default": True}
    assert "text_embeds is 'b'; text embeds entries: 'a'" in files.refusal({"id": "a", **text}, text_embeds="b")
    assert "'a', 'b' are all the default" in files.refusal({"id": "a", **text}, {"id": "b", **text})


# ---- what does not fit together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"crop_aspect": "closest"}, "crop_aspect_buckets is empty. List the shapes"),
        ({"crop_aspect": "random", "crop_aspect_buckets": []}, "crop_aspect_buckets is empty"),
        ({"crop_aspect": "closest", "crop_aspect_buckets": [1.0, 0.0]}, "crop_aspect_buckets has 0; an aspect is"),
        ({"crop_aspect": "closest", "crop_aspect_buckets": ["16:9"]},
         "crop_aspect_buckets.0 is '16:9'; input should be a table or a valid number."),
        ({"crop_aspect": "closest", "crop_aspect_buckets": [{"aspect_bucket": 1.0, "wight": 1}]},
         "crop_aspect_buckets.0.wight is not a known key. Did you mean weight?"),
        ({"instance_prompt": 3}, "instance_prompt is 3; input should be a valid string or a list."),
        ({"instance_prompt": ["a", 3]}, "instance_prompt.1 is 3; input should be a valid string."),
        ({"crop_aspect": "random", "crop_aspect_buckets": [{"aspect_bucket": 1.0, "weight": 0}]},
         "crop_aspect_buckets.0.weight is 0;"),
        ({"minimum_aspect_ratio": 2.0, "maximum_aspect_ratio": 1.0}, "no picture is left"),
        ({"crop_aspect": "preserve", "minimum_aspect_ratio": 5.0, "maximum_aspect_ratio": 4.0},
         "minimum_aspect_ratio 5 is above maximum_aspect_ratio 4"),
        ({"resolution": 64.5}, "resolution is 64.5; with pixel it is whole px"),
        ({"resolution": 4}, "a square of 4 px; it must be 8 to 2048 px"),
        ({"resolution": 64, "resolution_type": "area"}, "a square of 8000 px; it must be 8 to 2048 px. For 64 px set"),
        ({"resolution": 0.004096, "resolution_type": "area", "maximum_image_size": 0.0655, "target_downsample_size": 0.001},
         "target_downsample_size is 0.001, below resolution 0.004096"),
        ({"resolution": 64, "resolution_type": "megapixel"}, "resolution_type is 'megapixel'"),
        ({"caption_strategy": "parquet"}, "there is no parquet block. Add one with path"),
        ({"caption_strategy": "huggingface"}, "with type 'local' it is one of"),
        ({"caption_strategy": "instanceprompt", "instance_prompt": [" ", ""]}, "instance_prompt is missing"),
        ({"start_step": 10, "end_step": 10}, "no step is left"),
        ({"start_step": 1}, "No data set is active in step 1 of stage 1"),
        ({"end_step": 500}, "No data set is active in step 501 of stage 1"),
        ({"probability": 0}, "probability is 0"),
        ({"max_num_samples": 0}, "max_num_samples is 0"),
        ({"caption_shuffle": {"enable": True, "split_on": ";"}}, "caption_shuffle.split_on is ';'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_with_the_remedy(files: Files, keys: dict[str, Any], says: str) -> None:
    assert says in files.refusal(**keys)


def test_windows_that_leave_no_gap_pass_and_a_set_that_never_comes_is_said(files: Files) -> None:
    other = {**files.entry(), "id": "later"}
    run = files.load({**other, "start_step": 300}, end_step=300)
    assert [(dataset.start_step, dataset.end_step) for dataset in run.datasets] == [(0, 300), (300, None)]
    run = files.load({**other, "start_step": 1000})
    assert any("later: start_step is 1000, and stage 1 has 1000 steps: it is never used" in n for n in run.notes)


def test_keys_that_others_leave_without_effect_are_said(files: Files) -> None:
    notes = files.load(crop=False, crop_aspect="square", crop_style="random", maximum_image_size=256,
                       target_downsample_size=128, crop_aspect_buckets=[1.0], parquet={"path": "x"},
                       caption_shuffle={"enable": True, "count": 3}).notes  # fmt: skip
    for part in ("crop_aspect has no effect: crop is false", "maximum_image_size has no effect", "crop_aspect_buckets has",
                 "parquet has no effect: caption_strategy is filename", "repeats = 0 uses 1 captions"):  # fmt: skip
        assert any(part in note for note in notes), part
    assert not files.load(crop=True, crop_aspect="square", crop_style="random").notes


@pytest.mark.parametrize(
    ("keys", "edge"),
    [({"resolution": 64}, 64), ({"resolution": 64, "resolution_type": "pixel_area"}, 64),
     ({"resolution": 0.004096, "resolution_type": "area"}, 64), ({"resolution": 0.065536, "resolution_type": "area"}, 256)],
)  # fmt: skip
def test_every_measure_knows_which_stages_it_feeds(files: Files, keys: dict[str, Any], edge: int) -> None:
    if edge == 256:
        with pytest.raises(ConfigError, match="No data set feeds stage 1"):
            files.load(**keys)
        return
    dataset = files.one(**keys)
    assert dataset.edge_px == pytest.approx(edge)
    assert (dataset.factor(1), dataset.factor(2)) == (1, 4)


# ---- faces ------------------------------------------------------------------------------------------------------------


def test_crops_by_faces_without_opencv_name_the_extra(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = files.refusal(crop_style="face")
    assert "crop_style is 'face', and OpenCV is not installed. Install the extra: pip install" in message
    assert "[face]" in message
    assert files.one(crop_style="face", crop=False).crop_style == "face", "without a crop nothing is looked for"


def test_an_opencv_without_cascades_is_named(files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[tmp_path])
    )
    assert "this OpenCV has no cascades" in files.refusal(crop_style="face")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / faces.CASCADE).write_text("")
    assert files.one(crop_style="face").crop_style == "face"


# ---- keys that stand in other people's files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train_batch_size": 2}, "train_batch_size is ignored; every data set has the run file's train_batch_size"),
        ({"ignore_epochs": True}, "ignore_epochs is ignored"),
        ({"_comment": "mine", "//": 3}, "//, _comment are ignored; read as comments"),
        ({"target_downsample_size": 128}, "target_downsample_size has no effect: maximum_image_size is not set"),
        ({"is_regularisation_data": "false"}, "is_regularisation_data is ignored; off, or always done here"),
        ({"max_upscale_threshold": "0.0", "start_epoch": "1"}, "max_upscale_threshold, start_epoch are ignored"),
        ({"grounding": {"enabled": False, "max_entities": 4}}, "grounding is ignored"),
        ({"huggingface": {"caption_column": "text", "width_column": "w"}}, "width_column is ignored"),
    ],
)
def test_a_key_that_is_harmless_here_is_said(files: Files, keys: dict[str, Any], said: str) -> None:
    run = files.load(**keys)
    assert len(run.datasets) == 1
    assert any(said in note for note in run.notes), run.notes


def test_text_is_read_as_what_the_key_takes(files: Files) -> None:
    dataset = files.one(crop="true", repeats="3", resolution="64", probability="0.5", prepend_instance_prompt="False",
                        caption_shuffle={"enable": "True", "count": "2"}, conditioning_data="None")  # fmt: skip
    assert (dataset.crop, dataset.repeats, dataset.resolution, dataset.probability) == (True, 3, 64.0, 0.5)
    assert (dataset.prepend_instance_prompt, dataset.conditioning_data) == (False, None)
    assert dataset.caption_shuffle is not None and (dataset.caption_shuffle.enable, dataset.caption_shuffle.count) == (
        True,
        2,
    )
    assert not files.load({**files.entry(), "id": "b", "disabled": "true"}).datasets[1:]


def test_a_set_of_conditioning_may_be_a_list_of_one(files: Files) -> None:
    pairs = {"id": "edges", "dataset_type": "conditioning", "type": "local", "instance_data_dir": str(files.folder),
             "conditioning_type": "controlnet", "crop": True, "resolution": 64}  # fmt: skip
    run = files.load(pairs, conditioning_data=["edges"])
    assert run.datasets[0].conditioning_data == "edges"
    assert "conditioning_data has 2 sets" in files.refusal(pairs, conditioning_data=["edges", "more"])


def test_an_entry_without_pictures_is_a_cache(files: Files) -> None:
    run = files.load({"id": "image-embeds", "type": "local"}, {"id": "vae", "type": "local", "cache_dir_vae": "x"})
    assert [dataset.id for dataset in run.datasets] == ["set"]
    assert [note for note in run.notes if "image-embeds: it has no pictures, and is ignored" in note]
    assert "x: type is 'local', and instance_data_dir is missing" in files.refusal(
        {"id": "x", "type": "local", "resolution": 64}
    )


def test_columns_may_stand_in_a_block_of_their_own() -> None:
    block = {
        "caption_column": ["text", "tags"],
        "fallback_caption_column": "alt",
        "image_column": "picture",
        "num_proc": 4,
    }
    entry = {"id": "a", "type": "huggingface", "dataset_name": "some/set", "split": "train", "revision": "v2"}
    rest, notes = our_entry({**entry, "huggingface": block, "metadata_backend": "huggingface"}, ImageDataset, "a", [])
    dataset = ImageDataset.model_validate(rest)
    assert (dataset.caption_column, dataset.fallback_caption_column) == (("text", "tags"), "alt")
    assert (dataset.image_column, dataset.revision) == ("picture", "v2")
    assert notes == ["metadata_backend, num_proc are ignored; pictures are listed and read in this pipeline's own way"]
    with pytest.raises(ConfigError, match=r"huggingface\.colour is not a known key"):
        our_entry({**entry, "huggingface": {"colour": "red"}}, ImageDataset, "a", [])
    with pytest.raises(ConfigError, match="caption_column is 'x' and in the block huggingface 'y'"):
        our_entry({**entry, "caption_column": "x", "huggingface": {"caption_column": "y"}}, ImageDataset, "a", [])


TEXTS = st.text(st.characters(codec="utf-8", min_codepoint=1))  # a zero byte is refused in any value


@settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(st.sampled_from(sorted(DATA_IGNORED)), st.one_of(st.none(), st.integers(), TEXTS, st.booleans())),
    st.dictionaries(
        st.sampled_from(sorted(DATA_REFUSED)), st.sampled_from([None, False, "false", 0, "0.0", "", [], {}])
    ),
)
def test_keys_that_are_off_or_harmless_never_stop_a_run(
    files: Files, ignored: dict[str, Any], refused: dict[str, Any]
) -> None:
    assert len(files.load(**ignored, **refused).datasets) == 1


@pytest.mark.parametrize("name", sorted(DATA_REFUSED))
def test_a_refused_key_of_a_data_set_gives_its_reason(files: Files, name: str) -> None:
    assert f"{name} is set, but {DATA_REFUSED[name].reason}. Remove the key." in files.refusal(**{name: "x"})
