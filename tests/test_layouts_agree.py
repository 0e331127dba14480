"""Every layout computes the same: values and gradients, per family, whatever the lengths."""

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.attention import attend_along_trees, attend_as_before
from fastdpo.batch import PairBatch
from fastdpo.collate import make_collator
from fastdpo.columns import Cut
from fastdpo.model import TOKEN_STATS, attach_scorer, score


def pair(prompt, chosen, rejected):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def tokens(seed, count):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, families.SIZES["vocab_size"], (count,), generator=random).tolist()


A, B, C = tokens(1, 9), tokens(2, 11), tokens(3, 7)
ROWS = [
    pair(A, B, C),  # nothing in common but the prompt
    pair(A, B[:4] + C, B),  # the same prompt again, a completion that is there, a shared beginning
    pair(A, A, B + C),  # 5 different completions in one group
    pair([5], C, [7]),  # a prompt and a completion of one token
    pair(B, [*C, 2], C),  # one completion is the beginning of the other
    pair(C, B[:5] + A, [*B[:5], 4, *C]),  # completions that begin alike, a branch of a later trunk
    pair(B + C, [9], [9]),  # chosen equals rejected
]


def run(model, layout, rows, cut=None, **collator):
    """Log-probabilities, statistics and all parameters' gradients of `rows` in `layout`."""
    (attend_as_before if layout == "padded" else attend_along_trees)(model)
    collate = make_collator(layout, cut or Cut(), pad_token_id=0, pad_to_multiple_of=None)
    batch = PairBatch.from_inputs(collate(rows))
    model.zero_grad()
    with families.all_in_float64():
        scored = score(model, batch, stats=TOKEN_STATS)
        weights_C = torch.linspace(-1, 2, len(scored.token_logps_C), dtype=torch.float64)
        (scored.token_logps_C * weights_C).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    stats = scored.entropy_C, scored.mean_logit_C, scored.is_top1_C.double()
    return batch, (scored.token_logps_C.detach(), gradients, *stats)


def assert_all_layouts_agree(model, rows, cut=None):
    truth_batch, truth = run(model, "padded", rows, cut)
    for layout in ("packed", "shared"):
        batch, found = run(model, layout, rows, cut)
        assert torch.equal(batch.cu_seqlens, truth_batch.cu_seqlens), layout
        assert batch.num_tokens == truth_batch.num_tokens, layout
        for ours, theirs in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=layout)


@pytest.fixture(scope="module")
def llama():
    model = families.model("llama")
    attach_scorer(model)
    return model


@pytest.mark.parametrize("family", families.FAMILIES)
def test_all_layouts_agree_to_1e_9(family):
    model = families.model(family)
    attach_scorer(model)
    assert_all_layouts_agree(model, ROWS)


@pytest.mark.parametrize("native", ["eager", "sdpa"])
def test_the_models_own_attention_is_kept_for_all_but_trees(native):
    model = families.model("mistral", attn_implementation=native)
    ids = torch.tensor([tokens(4, 20), tokens(5, 20)])
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    own = model(ids, attention_mask=mask).logits
    generated = model.generate(ids, max_new_tokens=4)
    attend_along_trees(model)
    attend_along_trees(model)  # a second call changes nothing
    assert torch.equal(model(ids, attention_mask=mask).logits, own)
    assert torch.equal(model.generate(ids, max_new_tokens=4), generated)
    assert "attn_implementation" not in str(model.config.to_diff_dict())
    attend_as_before(model)
    assert model.config._attn_implementation == native


completions = st.lists(st.integers(3, 5), min_size=1, max_size=8)
prompts = st.lists(st.integers(3, 4), min_size=1, max_size=3)
some_pairs = st.lists(st.builds(pair, prompts, completions, completions), min_size=1, max_size=5)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(rows=some_pairs)
def test_all_layouts_agree_whatever_the_lengths(llama, rows):
    assert_all_layouts_agree(llama, rows)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    rows=some_pairs,
    cut=st.builds(
        Cut,
        max_length=st.integers(2, 9),
        truncation_mode=st.sampled_from(["keep_start", "keep_end"]),
    ),
)
def test_all_layouts_agree_on_what_is_cut(llama, rows, cut):
    assert_all_layouts_agree(llama, rows, cut)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_no_completion_sees_another(llama, layout):
    """Changing one completion's tokens changes no bit of the others' log-probabilities."""

    def logps(rows):
        batch, (token_logps_C, *_) = run(llama, layout, rows)
        return token_logps_C.split(batch.cu_seqlens.diff().tolist())

    rows = [ROWS[0], ROWS[3], ROWS[5]]  # what they share does not depend on the last token
    before = logps(rows)
    for s in range(2 * len(rows)):
        side = "chosen_ids" if s < len(rows) else "rejected_ids"
        changed = [dict(row) for row in rows]
        row = changed[s % len(rows)]
        row[side] = [*row[side][:-1], 60]  # the same length, and no token of the others'
        for other, (old, new) in enumerate(zip(before, logps(changed), strict=True)):
            assert other == s or torch.equal(old, new), (s, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model = families.model("mistral", torch.float32)
    attach_scorer(model)
    model.train()
    attend_along_trees(model)
    batch = PairBatch.from_inputs(make_collator("shared", Cut(), 0, None)(ROWS))

    def gradients():
        model.zero_grad()
        score(model, batch).token_logps_C.sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(gradients(), plain)
