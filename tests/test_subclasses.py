"""Subclasses of DPOTrainer, as scripts written for TRL have them."""

import pytest
import tiny
from datasets import Dataset
from peft import LoraConfig
from trainers import (
    TWO_BATCHES_IN_ORDER,
    RunsOutOfMemory,
    logged,
    make_trainer,
    rows_with_a_longer_one,
    weights,
)

from fastdpo import DPOTrainer
from fastdpo.token_budget import UNBOUNDED


def build(kind, tmp_path, tokenizer, **settings):
    """A trainer of class `kind`, whose updates are 4 batches of a pair."""
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    settings = {"max_steps": 3, **batches, **settings}
    return make_trainer(tmp_path, tokenizer, kind=kind, **settings)


class Plain(DPOTrainer):
    """Does not hand num_items_in_batch on."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class Penalised(DPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss + 0.1 * model.lm_head.weight.square().sum()


class Dividing(Plain):
    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return DPOTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class Counting(Plain):
    """Logs a number of its own as trainers do that were written for TRL."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if model.training else "eval"
        self._metrics[mode]["mine"].append(10.0 * (1 + len(self._metrics[mode]["mine"])))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_custom_metrics_are_logged_as_under_trl(tmp_path, tokenizer):
    trainer = build(
        Counting, tmp_path, tokenizer, max_steps=2, eval_dataset=Dataset.from_list(tiny.rows(3))
    )
    trainer.train()
    assert logged(trainer, "mine") == [25.0, 25.0]  # of 10, 20, 30 and 40
    assert trainer.evaluate()["eval_mine"] == 10.0 and trainer.evaluate()["eval_mine"] == 10.0


@pytest.mark.parametrize(
    ("run", "name", "mean"),
    [("train", "mine", 25.0), ("evaluate", "eval_mine", 20.0)],  # of 4 batches, and of 3
)
def test_numbers_of_what_failed_are_in_no_later_log(tmp_path, tokenizer, run, name, mean):
    settings = {"max_steps": 1, "per_device_eval_batch_size": 1}
    rows = Dataset.from_list(tiny.rows(3))
    trainer, forwards = build(Counting, tmp_path, tokenizer, eval_dataset=rows, **settings), []

    def fail_in_the_second(*_):
        forwards.append(1)
        if len(forwards) == 2:
            raise RuntimeError("pretended")

    trainer.model.register_forward_hook(fail_in_the_second)
    with pytest.raises(RuntimeError, match="pretended"):
        getattr(trainer, run)()
    getattr(trainer, run)()
    assert logged(trainer, name) == [mean]


class CountingPacks(Counting):
    loss_is_scaled_for_ga = True


def test_custom_metrics_are_counted_once_where_an_update_is_run_again(tmp_path, tokenizer):
    def train(most, budget):
        settings = {"rows": rows_with_a_longer_one(), "max_steps": 1, **TWO_BATCHES_IN_ORDER}
        settings |= {"layout": "shared", "max_tokens_per_forward": budget}
        trainer = make_trainer(tmp_path, tokenizer, kind=CountingPacks, **settings)
        memory = RunsOutOfMemory(trainer.model, most, in_backward=False)
        trainer.train()
        return trainer, memory

    again, memory = train(230, "auto")
    once, _ = train(UNBOUNDED, again.budget.max_tokens)
    assert memory.raised and logged(again, "mine") == logged(once, "mine")


@pytest.mark.parametrize("kind", [Plain, Dividing])
def test_a_custom_loss_is_scaled_over_accumulated_batches_once(kind, tmp_path, tokenizer):
    own = build(DPOTrainer, tmp_path, tokenizer)
    own.train()
    theirs = build(kind, tmp_path, tokenizer)
    theirs.train()
    for name in ("loss", "grad_norm"):
        assert logged(theirs, name) == pytest.approx(logged(own, name), abs=1e-5)


@pytest.mark.parametrize("is_made", [False, True], ids=["into the class", "into a trainer"])
def test_a_loss_that_a_script_puts_in_its_place_counts_as_a_custom_one(
    is_made, tmp_path, tokenizer, monkeypatch
):
    settings = {"eval_dataset": Dataset.from_list(tiny.rows(4)), "layout": "padded"}
    own = build(DPOTrainer, tmp_path, tokenizer, **settings)
    own.train()
    eval_loss = own.evaluate()["eval_loss"]
    loss_of = DPOTrainer.compute_loss

    def doubled(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * loss_of(self, model, inputs, return_outputs)

    if not is_made:
        monkeypatch.setattr(DPOTrainer, "compute_loss", doubled)
        assert build(DPOTrainer, tmp_path, tokenizer).layout.name == "padded"
    theirs = build(DPOTrainer, tmp_path, tokenizer, **settings, max_grad_norm=0.0)
    if is_made:
        theirs.compute_loss = doubled.__get__(theirs)
    theirs.train()
    assert logged(theirs)[0] == pytest.approx(2 * logged(own)[0], abs=1e-5)
    assert logged(theirs, "grad_norm")[0] == pytest.approx(2 * logged(own, "grad_norm")[0])
    theirs.model.load_state_dict(own.model.state_dict())
    assert theirs.evaluate()["eval_loss"] == pytest.approx(2 * eval_loss)


class Uncounted(DPOTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(epoch_iterator, num_batches, device)[0], None


class NotHandedOn(DPOTrainer):
    def training_step(self, model, inputs, *others):
        return super().training_step(model, inputs)


@pytest.mark.parametrize("kind", [Uncounted, NotHandedOn])
@pytest.mark.parametrize("budget", [None, 60, "auto"])
def test_a_batch_is_its_part_of_an_update_whose_pairs_are_not_known(
    kind, budget, tmp_path, tokenizer
):
    settings = {"rows": tiny.rows(8), "gradient_accumulation_steps": 2, "layout": "shared"}
    settings |= {"per_device_train_batch_size": 2, "max_tokens_per_forward": budget}
    own, theirs = (build(each, tmp_path, tokenizer, **settings) for each in (DPOTrainer, kind))
    own.train()
    theirs.train()
    for name in ("loss", "grad_norm"):
        assert logged(theirs, name) == pytest.approx(logged(own, name), abs=1e-5)


def test_a_custom_term_weighs_what_it_says(tmp_path, tokenizer):
    trainer = build(Penalised, tmp_path, tokenizer, max_steps=1)
    penalty = 0.1 * trainer.model.lm_head.weight.square().sum().item()
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(0.6931 + penalty, abs=1e-3)


class Doubled(DPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2.0 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class OneMore(DPOTrainer):
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, *others = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss + 1.0, *others


class Silent(DPOTrainer):
    def prediction_step(self, *args, **kwargs):
        super().prediction_step(*args, **kwargs)
        return None, None, None


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize(
    ("kind", "times", "plus"), [(Doubled, 2, 0), (OneMore, 1, 1), (Silent, 1, 0)]
)
def test_an_evaluation_uses_the_custom_loss_where_there_is_one(
    tmp_path, tokenizer, layout, kind, times, plus
):
    rows = Dataset.from_list(tiny.rows(7))
    settings = {"eval_dataset": rows, "per_device_eval_batch_size": 3, "layout": layout}
    settings |= {"ref_model": tiny.model("llama", len(tokenizer), seed=1)}
    own = build(DPOTrainer, tmp_path, tokenizer, **settings).evaluate()
    theirs = build(kind, tmp_path, tokenizer, **settings).evaluate()
    assert theirs["eval_loss"] == pytest.approx(times * own["eval_loss"] + plus, abs=1e-6)
    assert theirs["eval_rewards/margins"] == own["eval_rewards/margins"] != 0


def test_a_custom_loss_takes_no_packs_unless_it_divides(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="want max_tokens_per_forward unset with a compute_loss"):
        build(Plain, tmp_path, tokenizer, max_tokens_per_forward=64)
    build(Dividing, tmp_path, tokenizer, max_tokens_per_forward=64)
    trainer = build(DPOTrainer, tmp_path, tokenizer, max_tokens_per_forward=64)
    trainer.compute_loss = Plain.compute_loss.__get__(trainer)
    with pytest.raises(ValueError, match="want max_tokens_per_forward unset with a compute_loss"):
        trainer.train()


class Watching(DPOTrainer):
    """Runs the model on the batch by itself."""

    def compute_loss(self, model, inputs, **arguments):
        names = ("input_ids", "attention_mask")
        self.logits = model(**{name: inputs[name] for name in names}).logits
        self.inputs = inputs
        return super().compute_loss(model, inputs, **arguments)


def test_a_subclass_that_may_run_the_model_itself_gets_sequences(tmp_path, tokenizer):
    trainer = build(Watching, tmp_path, tokenizer, max_steps=1)
    assert trainer.layout.name == "padded"
    assert trainer.layout.line.endswith("Watching may run the model on a batch by itself")
    trainer.train()
    assert len(trainer.logits) == 2 and trainer.inputs["completion_mask"].any()
    assert build(Watching, tmp_path, tokenizer, layout="shared").layout.name == "shared"


@pytest.mark.parametrize("run", ["train", "evaluate"])
def test_a_loss_put_into_a_trainer_may_run_the_model_itself(run, tmp_path, tokenizer):
    trainer = build(DPOTrainer, tmp_path, tokenizer, eval_dataset=Dataset.from_list(tiny.rows(2)))
    assert trainer.layout.name == "shared"
    losses = []

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits
        losses.append(logits[inputs["completion_mask"].bool()].logsumexp(-1).mean())
        return losses[-1]

    trainer.compute_loss = compute_loss
    getattr(trainer, run)()
    assert losses and trainer.layout.name == "padded"
    by_name = build(DPOTrainer, tmp_path, tokenizer, layout="shared")
    by_name.compute_loss = DPOTrainer.compute_loss.__get__(by_name)
    by_name.train()
    assert by_name.layout.name == "shared"


class Stepping(DPOTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize("kind", [Stepping, OneMore])
def test_any_custom_step_gets_sequences(kind, tmp_path, tokenizer):
    assert build(kind, tmp_path, tokenizer).layout.name == "padded"


def test_losses_for_compute_metrics_are_one_a_pair(tmp_path, tokenizer):
    found = {}

    def compute_metrics(prediction):
        found["losses"] = prediction.losses
        return {}

    trainer = build(
        DPOTrainer,
        tmp_path,
        tokenizer,
        eval_dataset=Dataset.from_list(tiny.rows(5)),
        compute_metrics=compute_metrics,
        include_for_metrics=["loss"],
        per_device_eval_batch_size=2,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert len(found["losses"]) == 5
    assert found["losses"].mean() == pytest.approx(metrics["eval_loss"], abs=1e-6)


class Evaluating(DPOTrainer):
    def evaluation_loop(
        self,
        dataloader,
        description,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ):
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        output.metrics[f"{metric_key_prefix}_wins"] = 0.5
        return output


def test_a_custom_evaluation_may_add_the_best_metric(tmp_path, tokenizer):
    trainer = build(
        Evaluating,
        tmp_path,
        tokenizer,
        eval_dataset=Dataset.from_list(tiny.rows(3)),
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_wins",
    )
    trainer.train()
    assert trainer.evaluate()["eval_wins"] == 0.5


def test_a_custom_evaluation_may_have_less_than_a_batch(tmp_path, tokenizer):
    few = {"eval_dataset": Dataset.from_list(tiny.rows(3)), "dataloader_drop_last": True}
    build(Evaluating, tmp_path, tokenizer, eval_strategy="epoch", **few)


class Preparing(DPOTrainer):
    def _prepare_dataset(self, dataset, *arguments):
        return dataset


def test_a_method_that_is_never_called_is_refused(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(TypeError, match=r"want Preparing to override .*\['_prepare_dataset'\]"):
        build(Preparing, tmp_path, tokenizer)
    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", Preparing._prepare_dataset, raising=False)
    with pytest.raises(TypeError, match=r"want DPOTrainer to override .*\['_prepare_dataset'\]"):
        build(DPOTrainer, tmp_path, tokenizer)


class Tokenizing(DPOTrainer):
    def _tokenize(self, processing_class, input, **arguments):
        return super()._tokenize(processing_class=processing_class, input=input, **arguments)


def test_a_method_that_trls_trainer_had_once_is_called_no_more(tmp_path, tokenizer):
    assert len(build(Tokenizing, tmp_path, tokenizer).train_dataset) == len(tiny.rows())


def test_the_reference_model_has_trls_name(tmp_path, tokenizer):
    full = build(DPOTrainer, tmp_path, tokenizer)
    assert weights(full.ref_model).keys() == weights(full.model).keys()
    lora = LoraConfig(r=2, target_modules="all-linear")
    assert build(DPOTrainer, tmp_path, tokenizer, peft_config=lora).ref_model is None
