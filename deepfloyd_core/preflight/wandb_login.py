"""Checks before anything is made that W&B can be written to, so that no training fails at a missing key or waits for one.

The library itself looks for the key, in its environment variables, in `~/.netrc` and in its files; this package reads
none of them. The check runs in its own process, because the library starts a server, changes its process, and takes
seconds to import.
"""

import subprocess
import sys

from deepfloyd_core.errors import ConfigError

_REACHED, _NO_KEY = 0, 3  # exit codes; 1 is Python's own for an error
_WITHOUT_KEY = ("offline", "dryrun", "disabled")  # of WANDB_MODE
_TIMEOUT_S = 120.0


def check_wandb() -> None:
    """Raise ConfigError when a training could not be shown in W&B: no key is known and WANDB_MODE is not offline."""
    # -P: the current directory may hold a folder `wandb`, which the library makes there, and one called `datasets`.
    command = [sys.executable, "-P", "-m", "deepfloyd_core.preflight.wandb_login"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"report_to has wandb, and wandb has not answered in {_TIMEOUT_S:g} s.") from None
    if done.returncode == _REACHED:
        return
    why = (
        "no key of W&B is known" if done.returncode == _NO_KEY else (done.stderr.strip() or "it ended").splitlines()[-1]
    )
    raise ConfigError(
        f"report_to has wandb, and {why.rstrip('.')}. Set WANDB_API_KEY or run `wandb login`; WANDB_MODE=offline "
        "keeps the metrics on this machine, for `wandb sync`."
    )


def main() -> int:
    """The other process. Returns its exit code. The key is not tried, so that a run can begin without a network."""
    import wandb

    # Silent: otherwise it asks the network for the name of the key's owner, only to print it, and waits minutes for it.
    if wandb.setup(wandb.Settings(silent=True)).settings.mode in _WITHOUT_KEY:
        return _REACHED
    return _REACHED if wandb.login(prompt=False, verify=False) else _NO_KEY


if __name__ == "__main__":
    sys.exit(main())
