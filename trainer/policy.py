"""The models of a run: the policy that is trained, and the frozen reference."""

import copy
import logging
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .attention import suit_attention
from .config import AStarPOConfig

logger = logging.getLogger(__name__)


def load_policy(
    model: "str | PreTrainedModel | PeftModel",
    args: AStarPOConfig,
    peft_config: PeftConfig | None,
    quantization_config: Any,
) -> Any:
    """Load the model to train, and put an adapter on it.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id or folder, or a loaded model.
        args ([`AStarPOConfig`]):
            `model_init_kwargs`, `gradient_checkpointing`, precision.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter; without one all weights are trained.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            How to quantise a model given by name.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: The policy, without dropout.
    """
    if isinstance(model, str):
        init = options_of(args.model_init_kwargs)
        init.setdefault("dtype", "float32")  # as TRL's trainers load a model by name
        if quantization_config is not None:
            init["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            init["device_map"] = None  # a device map and several processes exclude each other
        policy: Any = AutoModelForCausalLM.from_pretrained(model, **init)
        suit_attention(policy, init.get("attn_implementation"))
    else:
        policy = model
        if quantization_config is not None:
            logger.warning("quantization_config is ignored: the model is loaded already.")
    is_quantized = bool(getattr(policy, "is_loaded_in_4bit", False) or getattr(policy, "is_loaded_in_8bit", False))
    if peft_config is not None:
        policy = _with_adapter(policy, args, peft_config, is_quantized)
        if args.gradient_checkpointing:
            # Without an input that needs a gradient, checkpointed blocks of a frozen model have none
            # (huggingface/transformers#42489).
            policy.enable_input_require_grads()
    if args.fp16:
        # QLoRA leaves adapters in bf16, which the fp16 loss scaler cannot unscale.
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    turn_dropout_off(policy)
    return policy


def _with_adapter(policy: Any, args: AStarPOConfig, peft_config: PeftConfig, is_quantized: bool) -> PeftModel:
    if getattr(peft_config, "lora_dropout", 0.0):
        logger.warning(
            "lora_dropout=%s is taken as 0: completions are sampled and scored without dropout.",
            peft_config.lora_dropout,  # pyright: ignore[reportAttributeAccessIssue]
        )
        peft_config = copy.copy(peft_config)
        peft_config.lora_dropout = 0.0  # pyright: ignore[reportAttributeAccessIssue]
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    # ZeRO-3 gathers parameters into buffers of one type (deepspeedai/DeepSpeed#8072), so there an adapter has the base's.
    kwargs: Any = {"autocast_adapter_dtype": False} if zero3 and not is_quantized else {}
    return get_peft_model(policy, peft_config, **kwargs)


def turn_dropout_off(model: torch.nn.Module) -> None:
    """Set every dropout rate to 0: the engine samples without dropout, so scoring must do so too."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # pyright: ignore[reportArgumentType]


def load_tokenizer_of(policy: Any, args: AStarPOConfig, given: PreTrainedTokenizerBase | None) -> Any:
    """The tokenizer that was given, or the model's own, with a padding token that model and tokenizer agree on.

    Raises:
        TypeError: If what was given is not a tokenizer (a processor of images, say).
    """
    from ..rollout.prompts import load_tokenizer

    if given is not None and not isinstance(given, PreTrainedTokenizerBase):
        raise TypeError(f"`processing_class` must be a tokenizer, got {type(given).__name__}: prompts are text.")
    tokenizer = given if given is not None else load_tokenizer(policy.config._name_or_path, model_revision(args))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    policy.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def options_of(value: Any) -> dict[str, Any]:
    """A field of the configuration that holds keyword arguments, as a dictionary."""
    return dict(value or {})


def model_revision(args: AStarPOConfig) -> str | None:
    """Branch, tag or commit that a model given by name is loaded from."""
    return options_of(args.model_init_kwargs).get("revision")


def load_reference(policy: Any, args: AStarPOConfig) -> Any:
    """A frozen copy of a policy whose weights are all trained; None for an adapter, which is switched off instead."""
    if isinstance(policy, PeftModel):
        return None
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        # A process holds only a part of each parameter, so there is nothing to copy.
        init = {"dtype": policy.dtype, **options_of(args.model_init_kwargs)}
        return AutoModelForCausalLM.from_pretrained(policy.config._name_or_path, **init).eval().requires_grad_(False)
    return copy.deepcopy(policy).eval().requires_grad_(False)
