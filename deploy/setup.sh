#!/bin/sh
# Makes the work pools and the deployments of prefect.yaml on the server that PREFECT_API_URL names:
#     setup.sh process       workers that start runs as processes: compose, SLURM, machines by hand
#     setup.sh kubernetes    workers that start each run as a Kubernetes job
# A project without a prefect.yaml gets the one beside this file. Again after an upgrade or an edit of it: deployments follow the
# file, and pools, queues and automations that are there stay as they are.
set -eu
: "${PREFECT_API_URL:?}" "${DEEPFLOYD_PROJECT:?}" "${DEEPFLOYD_CONFIG:?}"
kind=${1:?process or kubernetes}
here=$(cd "$(dirname "$0")" && pwd)
cd "$DEEPFLOYD_PROJECT"
[ -e prefect.yaml ] || cp "$here/prefect.yaml" .

# In one sentence, what Prefect's commands would tell by a traceback: no server, a wrong password or none, a file that is no YAML.
python -P - <<'CHECK'
import os, sys
import yaml
from deepfloyd_core.errors import DeepFloydError
from flows.serving.api import check_api, check_guarded
try:
    for check in (check_api, check_guarded):
        check(os.environ["PREFECT_API_URL"])
    with open("prefect.yaml", encoding="utf-8") as file:
        yaml.safe_load(file)["deployments"]
except (DeepFloydError, OSError) as error:
    sys.exit(f"setup.sh: {error}")
except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
    sys.exit(f"setup.sh: {os.getcwd()}/prefect.yaml lists no deployments: {' '.join(str(error).split())}")
CHECK

for pool in data gpu; do
  if ! prefect work-pool inspect "$pool" >/dev/null 2>&1; then
    case $kind in
      process) prefect work-pool create "$pool" --type process ;;
      kubernetes)
        prefect work-pool create "$pool" --type kubernetes --base-job-template "$here/kubernetes/pool-$pool.json" ;;
      *) echo "$0: $kind is neither process nor kubernetes" >&2; exit 2 ;;
    esac
  fi
done
if ! prefect work-queue inspect training --pool gpu >/dev/null 2>&1; then
  prefect work-queue create training --pool gpu --limit 1
fi
if ! prefect automation inspect "deepfloyd: run lost" >/dev/null 2>&1; then
  prefect automation create --from-file "$here/automations.yaml"
fi
prefect --no-prompt deploy --all
