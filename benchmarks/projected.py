"""What storing a stage's text saves, at the sizes of IF-I-M: `OMP_NUM_THREADS=1 python -P benchmarks/projected.py`.

Its two text modules with random weights in bf16, read out of a model folder as the job reads them, over random rows of
T5-XXL's width. Prints bytes a caption, captions/s of CPU time, and what a training step no longer computes.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from deepfloyd_core.config.flavours import FLAVOURS, TEXT_MODULES
from deepfloyd_core.models.unet import load_text_modules
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.text.projection import Projected, projector, store
from deepfloyd_core.types import no_report

TOKENS, WIDTH, BATCH = 77, 4096, 4
I_M = {
    "block_out_channels": [192, 384, 576, 768], "layers_per_block": 3, "norm_num_groups": 32, "attention_head_dim": 64,
    "encoder_hid_dim": WIDTH, "cross_attention_dim": 768, "addition_embed_type_num_heads": 64,
}  # fmt: skip


def write_model(folder: Path) -> int:
    """A folder with the UNet's config and its text modules' weights alone. Returns the parameters of the whole UNet."""
    shipped = json.loads((Path(FLAVOURS["tiny-i"].repo) / "unet/config.json").read_text())
    config = {**shipped, **I_M}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    (folder / "unet").mkdir()
    (folder / "unet/config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5).bfloat16()
        for name, tensor in unet.state_dict().items()
        if name.split(".")[0] in TEXT_MODULES
    }
    save_file(weights, folder / "unet/diffusion_pytorch_model.safetensors")
    return sum(param.numel() for param in unet.parameters())


def seconds(action: Callable[[], object], rounds: int) -> float:
    """CPU time, median of several rounds."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        action()
        taken.append(time.process_time() - start)
    return sorted(taken)[rounds // 2]


def main() -> None:
    """Project, store and read back; print one line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn((BATCH, TOKENS, WIDTH), generator=generator).bfloat16()
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        whole = write_model(folder)
        modules = load_text_modules(folder, torch.bfloat16)
        project = projector(modules, "bf16")
        names = [f"{number:016x}" for number in range(arguments.captions)]
        start = time.process_time()
        store(folder, names, lambda name: project(raw[int(name, 16) % BATCH]), no_report)
        took = time.process_time() - start
        (file,) = folder.glob("*.arrow")
        texts = Projected(Artifact("stage1_text", "benchmark", folder))
        batch = texts.batch(names[:BATCH])
        hidden, added = (modules[name] for name in TEXT_MODULES)
        assert batch.pooled is not None
        in_batch = torch.equal(hidden(raw), batch.rows), torch.equal(added(raw), batch.pooled)
        rows, pooled = batch.rows[0].nbytes, batch.pooled[0].nbytes
        saved = sum(param.numel() for param in modules.parameters())
        computed = seconds(lambda: (hidden(raw), added(raw)), arguments.rounds)
        read = seconds(lambda: texts.batch(names[:BATCH]), arguments.rounds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        kept = f"{rows:,} + {pooled:,}, {file.stat().st_size / len(names):,.0f} in the file"
        print(f"bytes a caption       {kept}; T5's rows {raw[0].nbytes:,}")
        print(f"parameters            {saved:,} of {whole:,} are not in the trainer")
        print(f"projecting            {len(names) / took:.1f} captions/s of CPU time; peak {peak} MiB")
        print(f"text of a batch of {BATCH}  {computed * 1e3:,.1f} ms computed, {read * 1e3:.2f} ms read")
        print(f"same bits in a batch  rows {in_batch[0]}, pooled {in_batch[1]}")


if __name__ == "__main__":
    main()
