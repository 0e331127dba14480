"""Arguments that DPOTrainer and the command line refuse, said as early as it shows."""

import inspect
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, PeftType
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from fastdpo.collate import PackedCollator
from fastdpo.config import DPOConfig
from fastdpo.config_check import check_settings
from fastdpo.data import check_dataset
from fastdpo.experts import aux_loss_weight
from fastdpo.losses import PAIR_METRICS
from fastdpo.metrics import TOKEN_METRICS
from fastdpo.model import causal_lm_of
from fastdpo.resuming_trainer import has_encoder
from fastdpo.row_trainer import by_name

OPTIMIZERS_OF_MODELS = ("galore", "apollo", "lomo")  # which transformers makes of a model
EVAL_METRICS = [*TOKEN_METRICS, *PAIR_METRICS]
EVAL_METRICS += "loss aux_loss num_tokens runtime samples_per_second steps_per_second".split()


def check_arguments(
    args: Any,
    model: Any,
    train_dataset: Any,
    data_collator: Any,
    optimizers: tuple[Any, Any] = (None, None),
    quantization_config: Any = None,
    peft_config: Any = None,
) -> None:
    """TypeError or ValueError for other arguments of DPOTrainer; model has passed check_models.

    The experts of a model that is still a name are looked at when it is loaded.
    """
    if not isinstance(args, DPOConfig):
        kind = type(args)
        got = f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(f"want a fastdpo.DPOConfig as args, got {got}")
    check_settings(args)  # one may have been set since
    _check_machine(args, model)
    _check_report_to(args.report_to)
    _check_train_dataset(args, train_dataset)
    if isinstance(data_collator, PackedCollator):
        raise ValueError("want layout='shared' or 'packed' in place of a PackedCollator")
    if data_collator is not None:
        _check_collators_settings(args)
    _check_optimizer(optimizers[0], model, peft_config)
    adapters = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    if args.gradient_checkpointing and (why := _why_no_gradient_checkpointing(adapters)):
        raise ValueError(f"want gradient_checkpointing=False with {why}, got True")
    if args.load_best_model_at_end and has_encoder(adapters):
        raise ValueError(
            f"want load_best_model_at_end=False with {adapters.peft_type.value}, got True: its "
            "checkpoints have the virtual tokens, and not the encoder that they come from"
        )
    if args.gradient_checkpointing and args.gradient_checkpointing_kwargs:
        _check_checkpointing_kwargs(args.gradient_checkpointing_kwargs, args.device)
    if isinstance(model, str):
        return
    # raises where the coefficient does not fit
    aux_loss_weight(causal_lm_of(model), args.router_aux_loss_coef)
    if args.model_init_kwargs is not None or quantization_config is not None:
        raise ValueError(
            "want model as a name with model_init_kwargs or quantization_config, got a "
            f"{type(model).__name__} that is already loaded"
        )


def _check_train_dataset(args: DPOConfig, dataset: Any) -> None:
    if isinstance(dataset, Dataset):
        check_enough_rows(args, len(dataset))
        return
    if not isinstance(dataset, IterableDataset):
        got = "none" if dataset is None else type(dataset).__name__
        if isinstance(dataset, dict):  # load_dataset without split gives a DatasetDict
            got += f": take one of its splits, {[*dataset]}"
        raise TypeError(f"want a datasets.Dataset or IterableDataset as train_dataset, got {got}")
    if args.length_column is not None:
        raise ValueError(
            "want a map-style dataset with train_sampling_strategy="
            f"{args.train_sampling_strategy!r}, got a streamed one, whose order is its own"
        )
    if args.max_steps <= 0:
        raise ValueError(
            "want max_steps with a streamed train_dataset, whose length is not known, got "
            f"{args.max_steps}"
        )


def _check_optimizer(optimizer: Any, model: Any, peft_config: Any) -> None:
    """ValueError for an optimizer made before what is to train, or of something else."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    if isinstance(model, str) or peft_config is not None:
        got = "model as a name" if isinstance(model, str) else "peft_config"
        raise ValueError(
            f"want optimizers of what trains, got {got}, which DPOTrainer makes it of: load the "
            "model, and put the adapters on it (get_peft_model), before the optimizer is made"
        )
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if not any(each.requires_grad and each in held for each in model.parameters()):
        raise ValueError(
            "want optimizers of what trains, got one that holds no parameter of model with "
            "requires_grad"
        )


def _check_checkpointing_kwargs(settings: dict[str, Any], device: torch.device) -> None:
    # every_n_layers and offload are transformers' own, in the versions that have them
    before_5_18 = PreTrainedModel.gradient_checkpointing_enable
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", before_5_18)
    own = inspect.signature(enable).parameters
    try:
        one = torch.zeros(1, requires_grad=True)
        of_torch = {name: value for name, value in settings.items() if name not in own}
        checkpoint(torch.nn.Identity(), one, **of_torch)
    except Exception as error:
        detail = f"{settings}: {error}"
        raise ValueError(
            f"want gradient_checkpointing_kwargs that torch can take, got {detail}"
        ) from error
    every = settings.get("every_n_layers", 1)
    if not isinstance(every, int) or every < 1:
        raise ValueError(
            f"want every_n_layers >= 1 in gradient_checkpointing_kwargs, got {every!r}"
        )
    if settings.get("offload") and device.type == "cpu":
        raise ValueError(
            "want offload=False in gradient_checkpointing_kwargs on a CPU, where activations are "
            "already, got True"
        )


def check_gradient_checkpointing(
    policy: torch.nn.Module, args: DPOConfig, *, aux_loss: bool
) -> None:
    """ValueError where `policy` cannot do gradient checkpointing, and for the reentrant kind with
    aux_loss: within it, a load-balancing loss has no gradient."""
    if not args.gradient_checkpointing:
        return
    causal_lm = causal_lm_of(policy)
    if not causal_lm.supports_gradient_checkpointing:
        name = type(causal_lm).__name__
        raise ValueError(f"want gradient_checkpointing=False with {name}, which has none, got True")
    if aux_loss and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "want use_reentrant=False in gradient_checkpointing_kwargs with experts, got True: "
            "their load-balancing loss would have no gradient (router_aux_loss_coef=0 drops it)"
        )


def check_enough_rows(args: DPOConfig, num_rows: int) -> None:
    """ValueError where dataloader_drop_last would leave nothing of so many rows to train on."""
    wanted, what = args.over_ranks(args.train_batch_size), "one batch"
    if args.train_sampling_strategy == "batch_rebalance":  # its sampler shares out whole updates
        wanted = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        what = "one update"
    _check_not_dropped(args, num_rows, f"{what} of {wanted}", wanted, "to train on")


def _check_not_dropped(args: DPOConfig, num_rows: int, what: str, least: int, purpose: str) -> None:
    if args.dataloader_drop_last and num_rows < least:
        raise ValueError(
            f"want at least {what} rows with dataloader_drop_last, got {num_rows} {purpose}"
        )


def check_optimizer_and_schedule(args: DPOConfig) -> None:
    """ValueError where transformers can make no optimizer or schedule of `args`.

    For a run without optimizers of its own; train() would find it, with the reference scored. Tried
    on one parameter, but for DeepSpeed's own; of optimizers that look at the model, only whether
    their package is there.
    """
    if args.deepspeed:
        return
    parameters = [torch.zeros(1, device=args.device, requires_grad=True)]
    optimizer = torch.optim.SGD(parameters)
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            optimizer = kind(parameters, **settings)
    except Exception as error:
        wants_model = any(name in args.optim for name in OPTIMIZERS_OF_MODELS)
        if isinstance(error, ImportError) or not wants_model:
            detail = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"want settings that optim={args.optim.value} can take, got {detail}"
            ) from error
    name, num_updates = args.lr_scheduler_type.value, max(args.max_steps, 1000)
    try:
        schedule = get_scheduler(
            name,
            optimizer,
            args.get_warmup_steps(num_updates),
            num_updates,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        for rate in getattr(schedule, "lr_lambdas", ()):
            rate(num_updates - 1)
    except Exception as error:
        detail = f"{args.lr_scheduler_kwargs}: {type(error).__name__}: {error}"
        raise ValueError(
            f"want lr_scheduler_kwargs that lr_scheduler_type={name} can take, got {detail}"
        ) from error


def _why_no_gradient_checkpointing(config: PeftConfig | None) -> str | None:
    if getattr(config, "peft_type", None) == PeftType.PREFIX_TUNING:
        return (
            "PREFIX_TUNING (the prefix is cached keys and values, which gradient checkpointing "
            "drops)"
        )
    if getattr(config, "alora_invocation_tokens", None):
        return (
            "aLoRA (with checkpointing, peft refuses a second forward, the reference's, before the "
            "backward)"
        )
    return None


def check_evaluation(
    args: DPOConfig, eval_dataset: Any, compute_metrics: Any, *, has_own_loop: bool
) -> None:
    """TypeError or ValueError for an evaluation that is asked for and cannot be.

    has_own_loop: whether a subclass evaluates in its own way; its metrics may be any.
    """
    for name, each in by_name(eval_dataset).items():
        check_dataset(each, name)
        if args.eval_strategy != "no" and not has_own_loop and isinstance(each, Dataset):
            batch = args.over_ranks(args.eval_batch_size)
            what = f"one batch of {batch}"
            _check_not_dropped(args, len(each), what, batch, f"in the {name} dataset")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ValueError("want an eval_dataset, or eval_strategy='no', got neither")
    in_batches = args.batch_eval_metrics and compute_metrics
    if in_batches and "compute_result" not in inspect.signature(compute_metrics).parameters:
        raise ValueError(
            "want compute_metrics with a parameter compute_result under batch_eval_metrics, got "
            f"{inspect.signature(compute_metrics)}"
        )
    if not has_own_loop:
        _check_best_metric(args, eval_dataset, compute_metrics)


def _check_best_metric(args: DPOConfig, eval_dataset: Any, compute_metrics: Any) -> None:
    """ValueError for a metric_for_best_model that no evaluation has, before the first one fails.

    With compute_metrics, it may be any name.
    """
    wanted = args.metric_for_best_model
    if wanted is None or compute_metrics or eval_dataset is None or args.eval_strategy == "no":
        return
    names = [f"{each}_{name}" for each in by_name(eval_dataset) for name in EVAL_METRICS]
    if f"eval_{wanted.removeprefix('eval_')}" not in names:
        raise ValueError(f"want metric_for_best_model of {names}, got {wanted!r}")


def _check_machine(args: DPOConfig, model: Any) -> None:
    device = args.device.type
    if device not in ("cuda", "cpu"):  # MPS has neither float64 nor segment_reduce
        raise ValueError(f"want a CUDA GPU, or use_cpu=True, got device {device!r}")
    placed_on = set((getattr(model, "hf_device_map", None) or {}).values())
    will_be_placed = isinstance(model, str) and (args.model_init_kwargs or {}).get("device_map")
    if args.n_gpu > 1 and len(placed_on) < 2 and not will_be_placed:
        raise ValueError(
            f"want one process per GPU (accelerate launch, torchrun), got {args.n_gpu} GPUs in "
            "one process: launch it so, or show it one GPU with CUDA_VISIBLE_DEVICES"
        )


def _check_report_to(names: list[str] | str | None) -> None:
    """ValueError for a service that transformers does not know, or whose package is not here.

    args.set_logging leaves a text, which may be none or all; the constructor made a list of it.
    """
    get_reporting_integration_callbacks(names)
    if names in (None, "none", "all"):
        return
    names = [names] if isinstance(names, str) else names
    # the two that transformers does not always list where they are
    installed = {*get_available_reporting_integrations(), "azure_ml", "flyte"}
    if missing := [name for name in names if name not in installed]:
        raise ValueError(
            f"want report_to of packages that are installed, got {missing}, which are not"
        )


def _check_collators_settings(args: DPOConfig) -> None:
    for name, unset in {"layout": "auto", "max_tokens_per_forward": None}.items():
        if getattr(args, name) != unset:
            raise ValueError(
                f"want {name}={unset!r} with a data_collator of your own, which decides that, got "
                f"{getattr(args, name)!r}"
            )
