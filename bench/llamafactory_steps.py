"""LLaMA-Factory's DPO trainer as a contender, run by an interpreter that has it (other_process.py).

    python -m venv ../peer && ../peer/bin/pip install torch==2.13.0 llamafactory==0.9.5
    LLAMAFACTORY_PYTHON=$PWD/../peer/bin/python pytest bench/bench_train_step.py -k llama_factory

Its trainer and its collator, given a model and token ids: its own reading of texts, and what it
does to a model while loading it, are not part of a step. Without gradient checkpointing, as the
others at their fastest.
"""

from datasets import Dataset
from llamafactory.data import PairwiseDataCollatorWithPadding, get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments, FinetuningArguments
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from transformers import TrainingArguments

from bench.length_profiles import Pair
from bench.other_process import serve
from bench.stepped_trainer import SteppedTrainer
from bench.tasks import (
    BETA,
    END_ID,
    MODELS,
    Task,
    random_model,
    random_policy,
    trainer_settings,
    word_tokenizer,
)


def llamafactory(task: Task) -> SteppedTrainer:
    tokenizer = word_tokenizer(MODELS[task.model].vocab_size)
    model = random_policy(task)
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="empty"))
    collator = PairwiseDataCollatorWithPadding(  # as its run_dpo makes it
        template=template,
        model=model,
        pad_to_multiple_of=8,
        label_pad_token_id=-100,
        tokenizer=tokenizer,
    )
    trainer = CustomDPOTrainer(
        model=model,
        ref_model=None if task.adapters else random_model(task.model),
        args=TrainingArguments(**trainer_settings(task), remove_unused_columns=False),
        finetuning_args=FinetuningArguments(
            stage="dpo",
            finetuning_type="lora" if task.adapters else "full",
            pref_beta=BETA,
            disable_shuffling=True,
        ),
        processor=None,
        data_collator=collator,
        train_dataset=Dataset.from_list([_features(pair) for pair in task.pairs]),
        tokenizer=tokenizer,
    )
    return SteppedTrainer(trainer)


def _features(pair: Pair) -> dict:
    """A row as its own preprocessing leaves it, of a pair without pictures, videos and sounds."""
    features = {"images": None, "videos": None, "audios": None}
    for side in ("chosen", "rejected"):
        completion_ids = [*pair[f"{side}_ids"], END_ID]
        ids = pair["prompt_ids"] + completion_ids
        features |= {
            f"{side}_input_ids": ids,
            f"{side}_attention_mask": [1] * len(ids),
            f"{side}_labels": [-100] * len(pair["prompt_ids"]) + completion_ids,
        }
    return features


if __name__ == "__main__":
    serve(llamafactory)
