"""DPO as the paper writes it: full float32 logits, padding, one forward per side, no shortcut."""

import torch
import torch.nn.functional as F


def sequence_logps(model, prompts, completions, pad_token_id):
    """Summed log-probability of each completion after its prompt: (B,)."""
    sequences = [torch.tensor(p + c) for p, c in zip(prompts, completions, strict=True)]
    ids_BL = torch.nn.utils.rnn.pad_sequence(sequences, True, pad_token_id)
    lengths = torch.tensor([len(s) for s in sequences])
    positions_L = torch.arange(ids_BL.shape[1])
    attention_mask = (positions_L < lengths[:, None]).long()
    logits = model(input_ids=ids_BL, attention_mask=attention_mask, use_cache=False).logits
    logps_BL = logits[:, :-1].float().log_softmax(-1).gather(2, ids_BL[:, 1:, None]).squeeze(2)
    starts = torch.tensor([len(p) for p in prompts])
    is_completion = (positions_L >= starts[:, None]) & (positions_L < lengths[:, None])
    return (logps_BL * is_completion[:, 1:]).double().sum(1)


def dpo(policy_logps, reference_logps, beta):
    """Mean loss, chosen and rejected rewards of (chosen, rejected) log-probabilities."""
    chosen = beta * (policy_logps[0] - reference_logps[0])
    rejected = beta * (policy_logps[1] - reference_logps[1])
    return -F.logsigmoid(chosen - rejected).mean(), chosen.detach(), rejected.detach()


def train(policy, reference_logps, batches, optimizer, beta, pad_token_id):
    """One step per batch of tokenised pairs; what each step measured before it moved.

    reference_logps(batch) -> (chosen, rejected), both (B,).
    """
    history = []
    for batch in batches:
        prompts = [row["prompt_ids"] for row in batch]
        logps = [
            sequence_logps(policy, prompts, [row[side] for row in batch], pad_token_id)
            for side in ("chosen_ids", "rejected_ids")
        ]
        loss, chosen, rejected = dpo(logps, reference_logps(batch), beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(
            {
                "loss": loss.item(),
                "rewards/chosen": chosen.mean().item(),
                "rewards/rejected": rejected.mean().item(),
                "logps/chosen": logps[0].mean().item(),
                "logps/rejected": logps[1].mean().item(),
            }
        )
    return history


def own_logps(model, inputs):
    """Every completion token's log-probability from the model's own float32 logits, padded."""
    logits = model(inputs["input_ids"], inputs["attention_mask"], use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(-1)
    logps = logps.gather(2, inputs["input_ids"][:, 1:, None]).squeeze(2)
    return logps[inputs["completion_mask"][:, 1:].bool()]
