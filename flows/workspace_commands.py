"""The commands that look at a workspace. None starts a Prefect server."""

from typing import Annotated

import typer

from deepfloyd_core.errors import ConfigError
from flows.arguments import Workspace, need_workspace
from tasks.terminal import console

out = console()


def verify(workspace: Workspace) -> None:
    """Re-hash every artifact and version of a workspace, and all that a version needs; exit 1 on any fault."""
    from deepfloyd_core.bundle.verify import verify_workspace
    from flows.report import print_verified

    need_workspace(workspace)
    found = verify_workspace(workspace)
    print_verified(out, found)
    if found.faults:
        raise typer.Exit(1)


def list_artifacts(workspace: Workspace) -> None:
    """List the artifacts and versions of a workspace."""
    from flows.report import print_artifacts

    need_workspace(workspace)
    print_artifacts(out, workspace)


def show(
    workspace: Workspace,
    fingerprint: Annotated[str, typer.Argument(help="Fingerprint of an artifact, or its first digits.")],
) -> None:
    """Print the manifest of an artifact: spec, inputs, summary, files."""
    from deepfloyd_core.store.artifacts import all_artifacts
    from deepfloyd_core.store.versions import bundle_of, readable_versions

    need_workspace(workspace)
    for version in readable_versions(workspace)[0]:
        if version.bundle.startswith(fingerprint):
            bundle_of(workspace, version)  # one that is lost is an error of its own
    found = [artifact for artifact in all_artifacts(workspace) if artifact.fingerprint.startswith(fingerprint)]
    if len(found) != 1:
        raise ConfigError(f"{fingerprint!r} names {len(found)} artifacts of {workspace}; `deepfloyd ls` lists them.")
    out.print_json(found[0].manifest.model_dump_json())
