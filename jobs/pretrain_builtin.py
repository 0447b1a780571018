"""Pretrain the tiny byte-level Llama that the built-in demo fine-tunes, on packages the demo's clients do not hold.

    python jobs/pretrain_builtin.py --steps 2400 --out fedray/assets/builtin-base

Seeded. The result that ships was made by this command; it takes about half an hour on 2 CPU cores.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from fedray.data.builtin import BASE_MODEL, pretraining_text

BYTE_OFFSET = 3  # ByT5 keeps ids 0 to 2 for pad, end and unknown


def batches(tokens: torch.Tensor, steps: int, batch: int, length: int, generator: torch.Generator):
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (batch,), generator=generator)
        yield torch.stack([tokens[s : s + length] for s in starts])


def new_model(vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: a warm-up over a twentieth of the steps, then a cosine down to a twentieth."""
    warmup = steps // 20
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def train(model: LlamaForCausalLM, tokens: torch.Tensor, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))
    started, recent = time.monotonic(), []
    drawn = batches(tokens, args.steps, args.batch, args.length, torch.Generator().manual_seed(1))
    for step, ids in enumerate(drawn, 1):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item() / math.log(2))
        if step % 100 == 0 or step == args.steps:
            bits, seconds = sum(recent) / len(recent), time.monotonic() - started
            print(f"step {step}: {bits:.3f} bits per byte, {seconds:.0f} s", flush=True)
            recent.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="bytes a sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=BASE_MODEL)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    model = new_model(len(tokenizer))
    text = pretraining_text().encode()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(text) / 1e6:.1f} MB of text, {parameters / 1e6:.2f} M parameters", flush=True)
    train(model, torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + BYTE_OFFSET, args)

    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)  # half the download; fedray loads it in fp32
    tokenizer.save_pretrained(args.out)
    (args.out / "origin.json").write_text(
        json.dumps(
            {"steps": args.steps, "batch": args.batch, "length": args.length, "lr": args.lr, "text_bytes": len(text)}
        )
    )


if __name__ == "__main__":
    main()
