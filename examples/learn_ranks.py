"""Learn the rank of every LoRA while training, then train the configuration that came out, from scratch.

python examples/learn_ranks.py                          # after `make demo` has prepared model and data
python examples/learn_ranks.py training.epochs=1        # overrides of configs/demo.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

from autopeft.callbacks import IncreLoRA
from autopeft.core.configuration import Configuration
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import attach
from autopeft.methods.ranks_to_configuration import attachment_tensors, configuration_from_ranks
from autopeft.training.trainer import build_trainer, quiet_lightning
from autopeft.yaml_config import load_config

CONFIG = Path("configs/demo.yaml")
LARGEST_RANK = 8
MEAN_RANK = 3


def learn(evaluator: Evaluator, start: Configuration) -> tuple[Configuration, dict[str, Tensor]]:
    """Train with growing ranks; return the configuration they ended with and its trained tensors."""
    backbone = evaluator.backbone
    steps = evaluator.plan.total_steps
    growths = MEAN_RANK * 2
    growth = IncreLoRA(
        budget=MEAN_RANK * len(start),
        every_n_steps=max(1, steps // (growths + 2)),
        modules_per_growth=len(start) // 2,
    )
    with attach(backbone, start, evaluator.seed) as attachment:
        module = evaluator.module(start)
        with quiet_lightning():
            trainer = build_trainer(evaluator.training, [growth], monitor=evaluator.monitor)
            trainer.fit(module.train(), evaluator.data.train_dataloader(), evaluator.data.val_dataloader())
        module.eval()
        head = {name: tensor for name, tensor in attachment.state_dict().items() if name.startswith("head.")}
    learned = configuration_from_ranks(backbone, start, growth.ranks())
    return learned, attachment_tensors(backbone, growth.truncated_state()) | head


def main() -> None:
    """Run the example."""
    evaluator = load_config(CONFIG, sys.argv[1:]).search.open().evaluator
    sites = [site for site, shape in evaluator.backbone.sites.items() if shape.kind == "linear"]
    lora = {"method": "lora", "size": LARGEST_RANK}
    start = Configuration.from_dict({"sites": {str(site): lora for site in sites}, "learning_rate": 2e-3})
    learned, state = learn(evaluator, start)
    print(learned.grid())
    print("as it was learned, on the test split:", evaluator.test(learned, state))
    again = evaluator.train(learned)
    assert again.state is not None, again.evaluation.reason
    print("trained from scratch, on the test split:", evaluator.test(learned, again.state))


if __name__ == "__main__":
    main()
