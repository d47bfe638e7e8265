"""BNF in somebody else's trainer: TRL's DPOTrainer with minibnf's bnf_loss. Needs trl 1.16 or
later."""

from contextlib import nullcontext

import torch
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from minibnf.losses import bnf_loss


class BNFTrainer(DPOTrainer):
    """DPOTrainer whose loss is BNF. Data, reference model, adapters and all else are TRL's;
    loss_type and beta go unused.

    Leave precompute_ref_log_probs off: TRL keeps whole responses' log-probabilities, and BNF needs
    each token's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask = inputs[
            "completion_mask"
        ].bool()  # (2P, T): P chosen responses, then the P rejected ones
        forward = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        labels = {"labels": inputs["input_ids"].masked_fill(~mask, -100), "fused_lm_head": True}
        logps = model(**forward, **labels).log_probs  # (2P, T - 1), 0 where there is no label
        frozen, plain = self.ref_model, nullcontext()
        if (
            frozen is None
        ):  # an adapter is being trained: the reference is the same model without it
            frozen = self.accelerator.unwrap_model(model)
            plain = use_adapter(frozen, "ref" if "ref" in frozen.peft_config else None)
        with torch.no_grad(), plain:
            ref_logps = frozen(**forward, **labels).log_probs
        row = torch.arange(len(mask), device=mask.device)
        pairs = row.view(2, -1).T  # (P, 2)
        loss = bnf_loss(logps, ref_logps, mask[:, 1:], row < len(pairs), pairs)
        for name, x in {"logps": logps, "rewards": logps - ref_logps}.items():
            for kind, sums in zip(("chosen", "rejected"), x.detach().sum(1).chunk(2), strict=True):
                self._metrics["train" if self.model.training else "eval"][f"{name}/{kind}"].append(
                    sums.mean().item()
                )
        return (loss, model(**forward)) if return_outputs else loss
