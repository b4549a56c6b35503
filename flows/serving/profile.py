"""The profile of a home for the user's own `prefect` command: the address of the home's server, and its password.

`PREFECT_HOME=HOME prefect ...` then works without a password on the command line, which other users could read.
"""

import os
import shlex
from pathlib import Path

from deepfloyd_core.errors import ConfigError
from flows.serving.home import PRIVATE, PROFILE
from tasks.prefect_settings import changed_settings


def write_profile(home: Path, url: str, login: str) -> None:
    """Write the profile to `profiles.toml` of a home; other profiles stay. It becomes active if there was no such file.

    Raises ConfigError for a `profiles.toml` that is not valid.
    """
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL
    from prefect.settings.profiles import load_profiles, save_profiles

    path = home / "profiles.toml"
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with changed_settings({"profiles_path": path}):
            profiles = load_profiles(include_defaults=False)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid: {error}. Correct or remove it.") from None
    before = profiles.to_dict()
    profiles.update_profile(PROFILE, {PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: login}, source=path)
    if not path.exists():
        profiles.set_active(PROFILE)
    if profiles.to_dict() == before:
        return
    with changed_settings({"profiles_path": beside}):
        os.close(PRIVATE(beside, os.O_WRONLY | os.O_CREAT))
        save_profiles(profiles)
    beside.replace(path)


def prefect_command(home: Path, url: str) -> str:
    """How a user in another terminal calls `prefect` for a server: with the profile of a home, if it has that server."""
    from prefect.settings import PREFECT_API_URL
    from prefect.settings.profiles import load_profiles

    with changed_settings({"profiles_path": home / "profiles.toml"}):
        profiles = load_profiles()
    if PROFILE not in profiles.names or profiles[PROFILE].settings.get(PREFECT_API_URL) != url:
        return f"PREFECT_API_URL={url} .venv/bin/prefect"
    option = "" if profiles.active_name == PROFILE else f" --profile {PROFILE}"
    return f"PREFECT_HOME={shlex.quote(str(home))} .venv/bin/prefect{option}"
