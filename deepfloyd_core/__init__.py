"""The pipeline itself as plain functions: no Prefect, no argument parsing, no environment.

The rooms, in the order of the data. A room imports those before it and none after it (import-linter holds that):

    errors, types, hashing, files, arrow    words and names, durable bytes
    config        what a run is asked to do; reads its files, touches nothing else
    store         finished things: requests, manifests, locks, reuse, versions
    processes     code that may crash: the fork server, the pool for hostile pictures, jobs
    sources       where pictures lie
    pictures      one picture: bytes -> upright RGB -> a crop
    index         a data set: every file is one row of the ledger, with captions
    crops         the ledger -> shards of crops, the list of live rows, the held-out pictures
    diffusion     pure tensor functions: a UNet's inputs, and its losses
    models        UNets and their folders: found, loaded, quantised, identified
    text          captions -> T5's hidden states -> a stage's projected text
    adapters      the trainable parts of a UNet: added, saved, loaded again, removed
    measures      pictures in, quality figures out
    sampling      with diffusers' pipelines: samples, `generate`, Stage I's remakes for Stage II
    training      order, draws, forward pass, optimizer, checkpoints, validation
    bundle        what is published: files, model card, the plan of a bundle, `verify`
    preflight     everything that is checked before anything is made
    planning      what a run would do, before it does: artifacts, steps, memory, disk, time
    doctor        what a machine lacks, and what a run file needs of it, each with what mends it
    project       a new run file and data file, from what a folder of pictures and this machine show
    drawing       with a version: from checked options to finished pictures
    tiny          the shipped weights; `tiny/make` is the workshop that trained them

`api` is the public interface for scripts and model cards. A room's `__init__` says what the room is for and where to start
reading; it exports nothing, so that reading a configuration never loads torch.

Words. Ledger: one row for each input file. Verdict: whether a file can be used, and why not. Crop: a picture at a training
size. Row: a crop in a shard. Text: a caption as it is trained on. Hint: the conditioning picture of a ControlNet. Remake: a
low-res picture that Stage I sampled again. Stage: 1 makes 64 px from text, 2 upscales these to 256 px; `config.stages` has
what differs between them, `config.stage3` a third one, which is sampled and not trained. Upscaler: a stage that upscales
another one's pictures, its low-res pictures. Shapes: see `types`.
"""
