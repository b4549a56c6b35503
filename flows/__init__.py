"""Prefect flows, and the programs around them: which artifacts are made, in which order, and by whom.

The flows lie here: `finetune` and `retrain` (whole runs), `stages` (one product), `generate`, `reproduce`, `gc` and
`version_flows` (which version serves). `dag` says for all of them what is made from what, `parameters` what a deployment's
form takes, `deployable` what all have in common. The rooms, of which each imports only those after it and `commands` also the
flows: `commands` (the command line), then the flows, `serving` (server and worker), `runs` (what a run holds).
"""
