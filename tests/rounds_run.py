"""A small run in rounds as a program: `python rounds_run.py '{"model": ..., "output_dir": ..., "rounds": {...}}'`.

With `kill_after_s` it kills itself after so many seconds from the moment that its model is loaded; a sampler, from its start.
"""

import json
import os
import signal
import sys
import threading

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import torch
from helpers import LORA, toy_rows
from peft import LoraConfig
from train_run import parity
from transformers import AutoTokenizer

from astarpo.rollout.episode import SINGLE
from astarpo.rollout.options import EngineOptions, ModelOptions
from astarpo.rollout.rewards import RewardFunctions
from astarpo.rollout.rounds import RoundFolder
from astarpo.trainer import AStarPOConfig, AStarPOTrainer, RoundOptions, ValueOptions
from astarpo.trainer.dataset import prompt_ids
from astarpo.trainer.round_job import RoundJob, sample_rounds


def main() -> None:
    options = json.loads(sys.argv[1])
    rounds = RoundOptions(**{"rounds": 4, "updates_per_round": 3, "least_effective_share": 0.0, **options["rounds"]})
    args = AStarPOConfig(
        options["output_dir"],
        bf16=False,
        max_completion_length=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        require_eos=False,
    )
    engine = EngineOptions(engine=options.get("engine", "transformers"), kv_cache_gb=0.05, max_num_seqs=8)

    def arm() -> None:
        if options.get("kill_after_s") is not None:
            timer = threading.Timer(options["kill_after_s"], lambda: os.kill(os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()

    if rounds.part == "sampler":
        tokenizer = AutoTokenizer.from_pretrained(options["model"])
        rows = toy_rows().remove_columns(["reference_rewards"]).to_list()
        functions = RewardFunctions([parity], None, None, None, None, torch.device("cpu"))
        job = RoundJob(
            rows,
            rounds.prompts_per_round(4),
            rounds,
            args,
            ModelOptions(options["model"], dtype="float32"),
            engine,
            tokenizer,
            lambda prompts: prompt_ids(prompts, tokenizer, {}),
            SINGLE,
            functions,
        )
        arm()
        sample_rounds(RoundFolder(Path(str(rounds.rounds_dir))), job)
        return
    trainer = AStarPOTrainer(
        options["model"],
        parity,
        args,
        toy_rows(),
        peft_config=LoraConfig(**LORA),
        engine_options=engine,
        value_options=ValueOptions(solved_between=[0, 4]),
        round_options=rounds,
    )
    arm()
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(options["output_dir"])
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    (Path(options["output_dir"]) / "result.json").write_text(json.dumps([entry["loss"] for entry in log]))
    trainer.close()


if __name__ == "__main__":
    main()
