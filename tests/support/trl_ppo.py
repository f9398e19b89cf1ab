"""TRL's PPOTrainer on the toy task of tests/trainers/ppo/test_ppo_trl.py; runs with trl 1.12.0 on PYTHONPATH.

python trl_ppo.py SETTINGS.json    prints JSON, a line an update
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

warnings.simplefilter("ignore")


def run(settings: dict[str, Any], seed: int, work: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    letters = torch.zeros(len(tokenizer), dtype=torch.float32)
    letters[[tokenizer.convert_tokens_to_ids(c) for c in settings["letters"]]] = 1.0
    ids = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in settings["prompts"]
    ]
    in_prompt = letters[ids[0]].sum()
    assert all(letters[one].sum() == in_prompt for one in ids)

    class Backbone(torch.nn.Module):
        """Counts the letters so far, in place of a hidden state."""

        def forward(self, input_ids: Any, **more: Any) -> Any:
            count = letters[input_ids].cumsum(1) - in_prompt
            return SimpleNamespace(hidden_states=[count[..., None] / settings["max_answer"]])

    class Reward(torch.nn.Module):
        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.score = Backbone(), torch.nn.Identity()

    class Told(TrainerCallback):
        started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if logs and "objective/scores" in logs:
                line = {
                    "seed": seed,
                    "update": state.global_step,
                    "reward": logs["objective/scores"],
                    "kl": logs["objective/kl"],
                    "seconds": time.perf_counter() - self.started,
                    "kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                }
                print(json.dumps(line), flush=True)

    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(work / f"trl-{seed}"),
            seed=seed,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            adam_epsilon=1e-5,
            per_device_train_batch_size=settings["rollout_size"],
            gradient_accumulation_steps=1,
            num_mini_batches=settings["rollout_size"] // settings["batch_size"],
            local_rollout_forward_batch_size=settings["rollout_size"],
            total_episodes=settings["rollout_size"] * settings["updates"],
            num_ppo_epochs=4,
            response_length=settings["max_answer"],
            temperature=1.0,
            stop_token="eos",
            missing_eos_penalty=None,
            kl_coef=settings["kl_coefficient"],
            cliprange=0.2,
            cliprange_value=0.2,
            vf_coef=0.1,
            gamma=1.0,
            lam=0.95,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
        reward_model=Reward(),
        value_model=AutoModelForSequenceClassification.from_pretrained(
            settings["value_model"], num_labels=1, dtype=torch.float32
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        callbacks=[Told()],
    )
    trainer.train()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    told = json.loads(path.read_text(encoding="utf-8"))
    for number in range(told["seeds"]):
        run(told, number, path.parent)
