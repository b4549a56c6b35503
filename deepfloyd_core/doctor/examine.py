"""Everything that `deepfloyd doctor` looks at, beside Prefect. What takes seconds is done at once, in threads."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.config.run import Run
from deepfloyd_core.doctor.bucket import bucket_findings
from deepfloyd_core.doctor.embeds import embeds_coming
from deepfloyd_core.doctor.finding import Finding, told
from deepfloyd_core.doctor.hub import HubState, ask_hub, hub_finding, in_seconds
from deepfloyd_core.doctor.installed import (
    compiler_finding,
    extras_finding,
    is_installed,
    package_finding,
    python_finding,
)
from deepfloyd_core.doctor.memory import memory_findings
from deepfloyd_core.doctor.models import ModelState, ask_for, look_here, models_of
from deepfloyd_core.doctor.network import Proxy, clock_finding, proxy_findings, server_ahead
from deepfloyd_core.doctor.places import disk_findings, file_system_findings, places_of
from deepfloyd_core.doctor.run_file import file_findings, read_checked
from deepfloyd_core.doctor.torch_findings import AGAIN, torch_findings
from deepfloyd_core.errors import ConfigError, JobError
from deepfloyd_core.models.torch_facts import TorchFacts, ask_torch
from deepfloyd_core.preflight.check import ask_services


@dataclass(frozen=True)
class Surroundings:
    """What the environment says."""

    proxies: tuple[Proxy, ...] = ()
    no_proxy: str = ""
    prefect: str = ""  # address of a server elsewhere, without user and password


def examine(path: Path | None, overrides: tuple[str, ...], around: Surroundings) -> list[Finding]:
    """Look at this machine, and with a run file at what that needs. Raises nothing that a finding could say."""
    with ThreadPoolExecutor(5) as pool, in_seconds():
        torch = pool.submit(ask_torch) if is_installed("torch") else None
        proxies = pool.submit(proxy_findings, around.proxies, around.no_proxy)
        hub = pool.submit(ask_hub)
        clock = pool.submit(_clock, hub, around.prefect)
        run, found = read_checked(path, overrides) if path else (None, [])
        models = [state for use in models_of(run) if (state := look_here(use))] if run else []
        asked = [state if state.finding else pool.submit(ask_for, state.use) for state in models]
        services = pool.submit(_service_findings, run) if run else None
        found += [python_finding(), package_finding(), extras_finding(), compiler_finding(run)]
        found += [*proxies.result(), clock.result(), *_of_torch(torch, run)]
        found += _of_models([_state(each) for each in asked], hub.result(), run)
        found += services.result() if services else []
        if run and not any(run.config.workspace in each.text for each in found):
            found += bucket_findings(run)
    return list(dict.fromkeys(found))


def _clock(hub: Future[HubState], prefect: str) -> Finding:
    """Compared with the hub's, or where that is away with that of Prefect's server."""
    ahead_s = hub.result().ahead_s
    if ahead_s is None and prefect:
        return clock_finding(server_ahead(prefect), prefect)
    return clock_finding(ahead_s, "the hub's")


def _of_torch(asked: "Future[TorchFacts] | None", run: Run | None) -> list[Finding]:
    """Of torch and of memory. asked: None where torch is not installed, which another finding says."""
    try:
        facts = asked.result() if asked else None
    except JobError as error:
        return [Finding("torch", "fault", str(error), AGAIN), *memory_findings(run, None)]
    return [*(torch_findings(facts, run) if facts else []), *memory_findings(run, facts)]


def _state(asked: "ModelState | Future[ModelState]") -> ModelState:
    return asked if isinstance(asked, ModelState) else asked.result()


def _of_models(models: list[ModelState], hub: HubState, run: Run | None) -> list[Finding]:
    """Of the hub, the models, the other files, and the disks that take them."""
    workspace = run.workspace if run else None
    asked = [state for state in models if state.from_hub]
    # A model that does not come says itself why.
    told_by_model = not hub.login and any(state.finding and state.finding.state == "fault" for state in asked)
    return [
        *([] if told_by_model else [hub_finding(hub, is_needed=run is None or bool(asked))]),
        *(state.finding for state in models if state.finding),
        *(file_findings(run) if run else []),
        *disk_findings(
            places_of(workspace, sum(state.coming for state in models), embeds_coming(run) if run else None)
        ),
        *file_system_findings(workspace or Path.cwd()),
    ]


def _service_findings(run: Run) -> list[Finding]:
    """Of a cluster and of W&B, where the run uses them."""
    try:
        ask_services(run, "lora_bundle", workers=True)
    except ConfigError as error:
        return [told("services", each) for each in error.faults or (error,)]
    return []
