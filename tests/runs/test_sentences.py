"""What Prefect logs of an error that is meant for the user."""

import importlib
import io
import logging
import pkgutil
import re
from collections.abc import Iterator

import pytest
from prefect import Flow, Task
from prefect.states import Failed

import tasks
from deepfloyd_core.errors import DataError
from tasks.sentences import tell_in_sentences


@pytest.fixture
def logs() -> Iterator[tuple[logging.Logger, list[io.StringIO]]]:
    """A logger of the kind that Prefect's engine has, and what its two handlers show."""
    logger, outs = logging.getLogger("prefect.of_a_test"), [io.StringIO(), io.StringIO()]
    handlers = [logging.StreamHandler(out) for out in outs]
    for handler in handlers:
        logger.addHandler(handler)
    yield logger, outs
    for handler in handlers:
        logger.removeHandler(handler)


def fail(logger: logging.Logger, error: Exception) -> None:
    """As the engine tells of a task, its flow, and the process."""
    for level in ("task", "flow", "process"):
        try:
            raise error
        except Exception:
            logger.exception("%s: Encountered exception during execution", level)


def test_an_error_of_ours_is_its_sentence_once_and_any_other_keeps_its_traceback(
    logs: tuple[logging.Logger, list[io.StringIO]],
) -> None:
    logger, outs = logs
    tell_in_sentences()
    fail(logger, DataError("There is no picture."))
    fail(logger, DataError("There is 100 % [x] no {picture}."))
    logger.error("Finished in state Failed")
    shown = "error: There is no picture.\nerror: There is 100 % [x] no {picture}.\nFinished in state Failed\n"
    assert [out.getvalue() for out in outs] == [shown] * 2
    tell_in_sentences()
    tell_in_sentences()
    fail(logger, DataError("There is 100 % [x] no {picture}."))
    assert outs[0].getvalue() == f"{shown}error: There is 100 % [x] no {{picture}}.\n", "of the next run, once"
    fail(logger, KeyError("a fault of ours"))
    assert outs[1].getvalue().count("Traceback") == 3 == outs[1].getvalue().count("KeyError: 'a fault of ours'")


def test_the_state_that_a_run_ended_in_does_not_tell_the_error_again(
    logs: tuple[logging.Logger, list[io.StringIO]],
) -> None:
    logger, outs = logs
    tell_in_sentences()
    error = DataError("2 faults to correct:\n- a's is 'x'.\n- b (c) is unset.")
    told, ended = (
        f"error: {error}\n",
        f"Finished in state {Failed(message=f'Flow run encountered an exception: {error}')}",
    )
    logger.error(ended)
    fail(logger, error)
    logger.error(ended)
    logger.error("Finished in state %s", Failed(message="of another error"))
    shown = f"{ended}\n{told}Finished in state Failed\nFinished in state Failed('of another error')\n"
    assert [out.getvalue() for out in outs] == [shown] * 2


def test_every_task_is_named_as_the_artifact_that_it_makes() -> None:
    """Artifacts have names such as stage1_pixels, which `ls` and the folders of a workspace show as well."""
    found = {}
    for module in pkgutil.iter_modules(tasks.__path__):
        for value in vars(importlib.import_module(f"tasks.{module.name}")).values():
            if isinstance(value, Flow | Task):
                run = value.flow_run_name if isinstance(value, Flow) else value.task_run_name
                found[value.name] = run
    assert {"image_index", "stage_pixels", "stage1_conditioning", "stage_lora", "lora_bundle"} <= found.keys()
    for name, run in found.items():
        assert re.fullmatch("[a-z0-9_]+", name), name
        assert run is None or re.fullmatch(r"([a-z0-9_]|\{[a-z_.]+\})+", str(run)), run
