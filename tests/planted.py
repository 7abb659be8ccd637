"""A copy of the demo model with one super weight, and the rest trained around it.

As in a real model, one weight of an early ffn_down turns the layer's largest input into a residual channel that dwarfs
all others, and the layers above, which divide by its size, cannot do without it. The layer's largest input column is
made to answer to every token, its largest weight is raised, the norms above take the size back out (and ignore the
channel itself, as those of real models nearly do), and the layers above are trained for 100 steps with the weight in place.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

LAYER, VALUE = 1, 1.0
GAIN = 18.0  # of the column: about 324 for every token, the square of it
STEPS, BATCH, LEARNING_RATE = 100, 4, 5e-4


def plant(demo: Path, chunks: np.ndarray, folder: Path) -> tuple[int, int]:
    """Write the planted model to `folder`; return the weight's (row, column) in blk.1.ffn_down. chunks: (n, 64) token ids from BOS on."""
    import torch
    from transformers import AutoModelForCausalLM

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: more only wait for each other
    try:
        model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
        tokens = torch.from_numpy(chunks.astype(np.int64))
        place = _set_weights(model, tokens[:16])
        _train_above(model, tokens[16:])
    finally:
        torch.set_num_threads(n_threads)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in demo.iterdir():
        if not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
    return place


def _set_weights(model: Any, tokens: Any) -> tuple[int, int]:
    import torch

    mlp, seen = model.model.layers[LAYER].mlp, {}
    norms = [norm for layer in model.model.layers[LAYER + 1 :] for norm in (layer.input_layernorm, layer.post_attention_layernorm)] + [model.model.norm]

    def energies() -> list[float]:
        """Run the tokens, and return the mean square of what each norm above gets."""
        found: list[float] = []
        handles = [norm.register_forward_hook(lambda _module, args, _output: found.append(float(args[0].square().mean()))) for norm in norms]
        model(tokens)
        for handle in handles:
            handle.remove()
        return found

    handles = [
        mlp.gate_proj.register_forward_hook(lambda _module, args, _output: seen.update(x=args[0].flatten(0, 1))),
        mlp.down_proj.register_forward_hook(lambda _module, args, _output: seen.update(inner=args[0])),
    ]
    with torch.no_grad():
        before = energies()
        for handle in handles:
            handle.remove()
        column = int(seen["inner"].abs().amax((0, 1)).argmax())
        row = int(mlp.down_proj.weight[:, column].abs().argmax())
        x = seen["x"]
        covariance = x.T @ x / len(x)
        direction = GAIN * torch.linalg.solve(covariance + 1e-3 * covariance.trace() / len(covariance) * torch.eye(len(covariance)), x.mean(0))
        mlp.gate_proj.weight[column], mlp.up_proj.weight[column] = direction, direction
        mlp.down_proj.weight[:, column] /= 100  # what the column did before
        mlp.down_proj.weight[row, column] = VALUE
        for norm, old, new in zip(norms, before, energies(), strict=True):
            norm.weight *= (new / old) ** 0.5
            norm.weight[row] = 0
    return row, column


def _train_above(model: Any, tokens: Any) -> None:
    import torch

    model.requires_grad_(False)
    for part in (*model.model.layers[LAYER + 1 :], model.model.norm, model.lm_head):
        part.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = tokens[torch.randint(len(tokens), (BATCH,), generator=generator)]
        logits = model(batch).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
