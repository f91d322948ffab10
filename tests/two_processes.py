"""Each process of a test under torchrun runs this: it trains a tiny policy with the JSON settings in sys.argv."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import lora, tiny_tokenizer, trainer

from rlhf_pipeline.processes import agree, connect, end_at_once


def main() -> None:
    """Train; process 0 writes the weights, the log and the model to the folder."""
    connect()
    asked: dict[str, Any] = json.loads(sys.argv[1])
    folder = Path(asked["folder"])
    given: dict[str, Any] = {}
    if asked.get("lora"):
        given["peft_config"] = lora()
    if asked.get("ptx"):
        given["ptx_dataset"] = [[i, i + 1, i + 2, i + 3][: 2 + i % 3] for i in range(2, 40)]
    if asked.get("evaluate"):
        given["eval_dataset"] = [[5, 9], [7], [8, 9, 10]]
    dtype = getattr(torch, asked.get("dtype", "float64"))
    ppo = trainer(tiny_tokenizer(), folder, dtype, given, **asked["options"])
    ppo.train(asked.get("resume"))
    ppo.save_model(str(folder / "model"))
    with ppo.learner.whole():
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save({n: p.detach().clone() for n, p in ppo.model.named_parameters()}, folder / "weights.pt")
            (folder / "log.json").write_text(json.dumps(ppo.state.log_history))
    agree(lambda: None)  # wait: a process that exits first would end the other


if __name__ == "__main__":
    end_at_once(main)
