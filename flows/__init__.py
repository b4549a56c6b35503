"""Prefect flows, and the programs around them: which artifacts are made, in which order, and by whom.

The flows lie here: `finetune` and `retrain` (whole runs), `stages` (one product), `generate`, `reproduce`, `gc` and
`version_flows` (which version serves). `dag` says for all of them what is made from what, `parameters` what a deployment's
form takes, `deployable` what all have in common. The rooms: `commands` (the command line) imports the flows, these import
`serving` (server and worker), and that `runs` (what a run holds).
"""
