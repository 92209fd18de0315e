"""A*-PO in one file: a small model learns to divide, on two CPU cores in three and a half minutes.

    python examples/minimal.py --model runs/models/SmolLM2-135M-Instruct

Read it from top to bottom. It uses torch, transformers, PEFT and vLLM; only the loss and the grader come from astarpo. What it leaves out is what
the library is for: pools that survive a kill, resuming, several processes, memory, checks of the engine and of the data.

The algorithm (arXiv 2505.20686) has two stages:

1. Offline. Sample each prompt a few times from the reference, which never changes, and grade. From the rewards r of a prompt follows its value,
   V* = β1 ln mean exp(r / β1): what the best policy near the reference would earn.
2. Online. Sample *one* completion a prompt from the policy, and regress: (β2 · ln π(y)/π_ref(y) + V* − r)². Where the completion earned more than
   V*, it gets likelier; where it earned less, less likely.

The policy is a LoRA adapter on the reference, so one model in memory is both: with its adapter switched off it is the reference.
"""

import argparse
import itertools
import os
import random
import tempfile
import time

# vLLM in this process: no second process that holds memory, and the same order of requests in every run.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from astarpo.trainer.loss import astarpo_loss, sequence_log_ratio
from astarpo.verifier import Verifier

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="folder or hub id")
parser.add_argument("--seed", type=int, default=0, help="of samples, prompts and the adapter")
parser.add_argument("--updates", type=int, default=20, help="of the policy")
parser.add_argument("--prompts", type=int, default=16, help="of an update, with one completion each")
parser.add_argument("--reference_samples", type=int, default=4, help="completions a prompt in stage 1")
parser.add_argument("--learning_rate", type=float, default=3e-4, help="at its highest; it falls to 0")
parser.add_argument("--beta1", type=float, default=0.5, help="temperature of V*")
parser.add_argument("--beta2", type=float, default=0.001, help="temperature of the KL penalty")
options = parser.parse_args()
MAX_COMPLETION, RANK = 24, 8

began = time.perf_counter()
random.seed(options.seed)
torch.manual_seed(options.seed)


def say(text: str) -> None:
    """Print with the seconds since the start."""
    print(f"{time.perf_counter() - began:4.0f} s  {text}", flush=True)


# --- The task: exact divisions. Three worked examples show the form of an answer; what is left to learn is arithmetic.

EXAMPLES = ((132, 12), (45, 9), (56, 7))
pairs = [(a * b, b) for a in range(2, 16) for b in range(2, 16) if (a * b, b) not in EXAMPLES]
random.Random(0).shuffle(pairs)  # the split is the same for every seed
held_out, train = pairs[:100], pairs[100:]

tokenizer = AutoTokenizer.from_pretrained(options.model)


def prompt(dividend: int, divisor: int) -> list[int]:
    """Token ids of a division, up to where the answer begins."""
    chat = [{"role": "system", "content": "Answer in one short sentence."}]
    for a, b in EXAMPLES:
        chat.append({"role": "user", "content": f"What is {a} divided by {b}?"})
        chat.append({"role": "assistant", "content": f"{a} divided by {b} is {a // b}."})
    chat.append({"role": "user", "content": f"What is {dividend} divided by {divisor}?"})
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


# --- The engine samples. A new policy reaches it as an adapter on disk, which it loads in some milliseconds.

on_cpu = not torch.cuda.is_available()
dtype = "bfloat16" if on_cpu or torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
prompts_of = {pair: prompt(*pair) for pair in pairs}
longest = max(map(len, prompts_of.values()))
# On the CPU vLLM cannot split a prompt over two steps and keep its random numbers. It shares whole blocks of prompts that begin alike, and
# its blocks of 128 tokens would be longer than what ours share.
of_device = {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192, "block_size": 32} if on_cpu else {}
engine = LLM(
    options.model,
    dtype=dtype,
    max_model_len=longest + MAX_COMPLETION,
    max_num_seqs=128,
    kv_cache_memory_bytes=2**29,
    gpu_memory_utilization=0.05,  # the line above decides; this one must only be small enough to be granted
    enforce_eager=True,
    enable_lora=True,
    max_lora_rank=RANK,
    **of_device,
)


def sample(prompts: list[list[int]], n: int, adapter: LoRARequest | None, seed: int, temperature: float = 1.0):
    """`n` completions for each prompt: their token ids, and whether they ended by themselves.

    From the whole distribution (no top-p, no top-k): the loss is about the probabilities that the completions were sampled with.
    """
    settings = [
        SamplingParams(n=n, temperature=temperature, max_tokens=MAX_COMPLETION, seed=seed + number)
        for number in range(len(prompts))
    ]
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = engine.generate(requests, settings, lora_request=adapter, use_tqdm=False)
    return [[(list(one.token_ids), one.finish_reason == "stop") for one in output.outputs] for output in outputs]


# --- The grader reads the answer out of a completion. A completion that was cut off earns nothing.

verifier = Verifier(workers=1, timeout_s=5)


def rewards(completions: list[tuple[list[int], bool]], divisions: list[tuple[int, int]]) -> list[float]:
    """1 for a right answer, else 0."""
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in completions]
    grades = verifier.grade_batch(texts, [str(a // b) for a, b in divisions])
    return [float(grade.correct and ended) for grade, (_, ended) in zip(grades, completions, strict=True)]


def accuracy(adapter: LoRARequest | None) -> float:
    """Greedy accuracy on the divisions that are held out."""
    found = sample([prompts_of[pair] for pair in held_out], 1, adapter, 0, temperature=0.0)
    return sum(rewards([one for (one,) in found], held_out)) / len(held_out)


# --- Stage 1, offline: what can the reference do? One number for each prompt, computed once.

before = accuracy(None)
say(f"accuracy of the reference on {len(held_out)} held-out divisions: {before:.2f}")
N = options.reference_samples
values: dict[tuple[int, int], float] = {}
for pair, completions in zip(
    train, sample([prompts_of[pair] for pair in train], N, None, options.seed << 20), strict=True
):
    rewards_N = torch.tensor(rewards(completions, [pair] * N))
    mean_exp = torch.exp(rewards_N / options.beta1).mean()
    values[pair] = float(options.beta1 * mean_exp.log())
say(f"V* of {len(values)} prompts from {N} samples each, on average {sum(values.values()) / len(values):.2f}")

# --- The policy: the same weights with a LoRA adapter, which begins as no change at all.

device = "cpu" if on_cpu else "cuda"
base = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype), attn_implementation="eager")
lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
policy = get_peft_model(base.to(device), lora)
trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
for parameter in trained:
    parameter.data = parameter.data.float()  # steps of 1e-4 would be lost in 16 bits
optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
# Up over three updates, then down to 0 at the end.
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min((done + 1) / 3, 1 - done / options.updates))


# The worked examples, which every prompt begins with: 115 of its 129 tokens.
same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*prompts_of.values(), strict=False))
beginning = [column[0] for column in same]


def log_probs(ids_BT: torch.Tensor, mask_BT: torch.Tensor, length: int) -> torch.Tensor:
    """Log-probs of the last `length` tokens of each row, of shape (B, `length`). Rows go on where `beginning` ends.

    What all rows begin with is computed once and its keys and values are shared; gradients flow through them as through each row's own.
    """
    mask_BT = torch.cat([mask_BT.new_ones(len(mask_BT), len(beginning)), mask_BT], 1)
    positions_BT = mask_BT.cumsum(1)[:, len(beginning) :] - 1  # the rest of a prompt is padded on the left
    with torch.autocast(device, dtype=getattr(torch, dtype)):
        shared = policy(torch.tensor([beginning], device=device), use_cache=True, logits_to_keep=1).past_key_values
        shared.batch_repeat_interleave(len(ids_BT))
        # The logits at a token say how likely the *next* one is.
        output = policy(
            ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=shared,
            logits_to_keep=length + 1,
        )
    logps_BTV = output.logits[:, :-1].float().log_softmax(-1)
    return logps_BTV.gather(-1, ids_BT[:, -length:, None]).squeeze(-1)


def padded(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one length, and 1 where a token is no padding."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row if left else row + [0] * (longest - len(row)) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    mask = mask if left else [row[::-1] for row in mask]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# --- Stage 2, online: one completion a prompt, one regression.

folder = tempfile.TemporaryDirectory()
scaler = torch.amp.GradScaler(device, enabled=dtype == "float16")
order: list[tuple[int, int]] = []
adapter: LoRARequest | None = None  # the first update samples the reference, which the policy still is
for update in range(1, options.updates + 1):
    while len(order) < options.prompts:
        order += random.sample(train, len(train))
    batch, order = order[: options.prompts], order[options.prompts :]

    # Sample the policy as it is now, and grade.
    prompts = [prompts_of[pair] for pair in batch]
    completions = [one for (one,) in sample(prompts, 1, adapter, (options.seed << 20) + update * 1000)]
    rewards_B = torch.tensor(rewards(completions, batch), device=device)
    values_B = torch.tensor([values[pair] for pair in batch], device=device)

    # Score the completions under the policy and under the reference. The token that ends a completion counts: to stop is a choice, too.
    prompt_ids_BP, prompt_mask_BP = padded([ids[len(beginning) :] for ids in prompts], left=True)
    completion_ids_BC, completion_mask_BC = padded([ids for ids, _ in completions], left=False)
    ids_BT = torch.cat([prompt_ids_BP, completion_ids_BC], 1)
    mask_BT = torch.cat([prompt_mask_BP, completion_mask_BC], 1)
    length = completion_ids_BC.shape[1]
    with torch.no_grad(), policy.disable_adapter():
        ref_logps_BC = log_probs(ids_BT, mask_BT, length)
    logps_BC = log_probs(ids_BT, mask_BT, length)

    # (β2 · ln π/π_ref + V* − r)², with the log-ratio summed over a completion's tokens.
    log_ratio_B = sequence_log_ratio(logps_BC, ref_logps_BC, completion_mask_BC)
    loss = astarpo_loss(log_ratio_B, values_B, rewards_B, torch.ones_like(rewards_B), options.beta2).mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    optimizer.zero_grad()

    # Hand the new policy to the engine: under a name of its own, else vLLM would go on with what it remembers of the old one.
    path = os.path.join(folder.name, str(update))
    policy.save_pretrained(path)
    adapter = LoRARequest(f"update-{update}", update, path)
    kl = log_ratio_B.mean().item()
    say(f"update {update:2d}  reward {rewards_B.mean():.2f}  ln π/π_ref {kl:6.2f}  loss {loss.item():8.2f}")

after = accuracy(adapter)
say(f"accuracy: {before:.2f} before, {after:.2f} after {options.updates} updates")
