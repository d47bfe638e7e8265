"""Bidirectional Negative Feedback inside somebody else's trainer: TRL's DPOTrainer with minibnf's bnf_loss. Needs trl >= 1.16."""

from contextlib import nullcontext

import torch
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from minibnf.losses import bnf_loss


class BNFTrainer(DPOTrainer):
    """DPOTrainer whose loss is BNF. Data, reference model, adapters and everything else are TRL's; beta is not used.

    TRL precomputes log-probabilities of whole responses, BNF needs them token by token: leave precompute_ref_log_probs off.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask = inputs["completion_mask"].bool()  # (2P, T): P chosen responses, then the P rejected ones
        labels = inputs["input_ids"].masked_fill(~mask, -100)
        batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
        logps = model(**batch, fused_lm_head=True).log_probs  # (2P, T - 1), 0 where there is no label
        adapted = None if self.ref_model else self.accelerator.unwrap_model(model)  # without its adapter: the reference
        before = "ref" if adapted and "ref" in adapted.peft_config else None
        with torch.no_grad(), use_adapter(adapted, before) if adapted else nullcontext():
            ref_logps = (self.ref_model or model)(**batch, fused_lm_head=True).log_probs
        row = torch.arange(len(mask), device=mask.device)
        pairs = row.view(2, -1).T  # (P, 2)
        loss = bnf_loss(logps, ref_logps, mask[:, 1:], row < len(pairs), pairs)
        for name, x in {"logps": logps, "rewards": logps - ref_logps}.items():
            for kind, sums in zip(("chosen", "rejected"), x.detach().sum(1).chunk(2), strict=True):
                self._metrics["train" if self.model.training else "eval"][f"{name}/{kind}"].append(sums.mean().item())
        return (loss, {}) if return_outputs else loss
