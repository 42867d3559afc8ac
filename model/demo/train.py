"""Train the bundled demo model: a byte-level BPE vocabulary and a small GPT-2, from a folder of plain-text books.

Writes `tokenizer.json`, `tokenizer_config.json`, `config.json`, `model.safetensors` (float16; all in Hugging Face's GPT-2
layout, so that the server loads it as any other checkpoint) and `training.json` (the command, the seed, the losses). The last
5% of every book is held out, and the loss on it is reported in bits a byte, which does not depend on the vocabulary. Training
uses transformers' GPT-2, not the server's: the server's forward is for inference, and has the same model as its oracle.

    python model/demo/train.py ../books
    python model/demo/train.py ../books --init model/demo --steps 1300 --decay 1 --dropout 0.15 --muon-lr 0.01 \\
        --adam-lr 0.002 --seed 1730

The matrices are trained with Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers"), the rest with AdamW.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parents[2]))
from model.tokenizer import END_OF_TEXT, load_tokenizer

HELD_OUT = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, help="a folder of .txt files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--vocab", type=int, default=2560)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.6, help="share of the steps in which the rate falls to zero")
    parser.add_argument("--seed", type=int, default=1729)
    parser.add_argument("--init", type=Path, help="a folder with weights to go on from; the result is the average of both")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    books = {path.stem: path.read_text("ascii") for path in sorted(args.books.glob("*.txt"))}
    cut = {name: int(len(text) * (1 - HELD_OUT)) for name, text in books.items()}
    train_text = {name: text[: cut[name]] for name, text in books.items()}
    held_out_text = {name: text[cut[name] :] for name, text in books.items()}

    train_vocabulary(train_text.values(), args.vocab, args.context, args.out)
    vocabulary = load_tokenizer(args.out)
    end, size = vocabulary.begin, vocabulary.vocab_size
    train = torch.tensor([t for text in train_text.values() for t in [end, *vocabulary.encode(text)]])
    held_out = {name: torch.tensor(vocabulary.encode(text)) for name, text in held_out_text.items()}
    print(f"{len(train):,} training tokens, {sum(map(len, held_out.values())):,} held out, vocabulary {size}")

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size, n_positions=args.context, n_embd=args.width, n_layer=args.layers,
            n_head=args.width // 64, resid_pdrop=args.dropout, embd_pdrop=args.dropout, attn_pdrop=0.0,
            activation_function="gelu_pytorch_tanh", bos_token_id=end, eos_token_id=end,
        )
    )  # fmt: skip
    if args.init:
        model.transformer.load_state_dict(load_file(args.init / "model.safetensors"))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters", flush=True)
    started = time.time()
    fit(model, train, held_out, held_out_text, args)
    if args.init:
        average(model, args.init)
    losses = {name: bits_per_byte(model, held_out[name], held_out_text[name], args.context) for name in held_out}
    total = sum(losses[n] * len(held_out_text[n]) for n in losses) / sum(map(len, held_out_text.values()))
    print(f"held out: {total:.4f} bits a byte")
    save(model, args.out)
    report = {
        "command": "python model/demo/train.py BOOKS " + " ".join(sys.argv[2:]),
        "seed": args.seed,
        "minutes": round((time.time() - started) / 60, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": args.steps * args.batch * args.context,
        "held_out_bits_per_byte": round(total, 4),
        "by_book": {name: round(loss, 4) for name, loss in losses.items()},
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def train_vocabulary(texts, size: int, context: int, out: Path) -> None:
    """Byte-level BPE with GPT-2's way of cutting words, in Hugging Face's format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)  # 1: end of text
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "clean_up_tokenization_spaces": False,
        **{f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "pad", "unk")},
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def fit(model, train, held_out, held_out_text, args) -> None:
    matrices = [p for n, p in model.transformer.h.named_parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator = torch.Generator().manual_seed(args.seed)
    started, seen = time.time(), 0.0
    for step in range(args.steps):
        rate = min(1.0, (step + 1) / 50, (args.steps - step) / (args.decay * args.steps))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        starts = torch.randint(len(train) - args.context - 1, (args.batch,), generator=generator)
        windows = torch.stack([train[s : s + args.context + 1] for s in starts])
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen = loss.item() if step == 0 else 0.98 * seen + 0.02 * loss.item()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step} loss {seen:.3f} {(time.time() - started) / (step + 1):.2f} s/step", flush=True)
        if step and step % 500 == 0:
            sizes = {n: len(t) for n, t in held_out_text.items()}
            bits = sum(bits_per_byte(model, held_out[n], held_out_text[n], args.context) * sizes[n] for n in sizes)
            print(f"step {step} held out {bits / sum(sizes.values()):.4f} bits a byte", flush=True)
            save(model, args.out)


@torch.no_grad()
def average(model, init: Path) -> None:
    """Half of what training ended with, half of what it began with (Wortsman et al. 2022): better than either on new text."""
    begun = load_file(init / "model.safetensors")
    for name, parameter in model.transformer.named_parameters():
        parameter.lerp_(begun[name].float(), 0.5)


@torch.no_grad()
def bits_per_byte(model, tokens: torch.Tensor, text: str, context: int) -> float:
    """Windows of `context` tokens that overlap by half; each token is scored once, with at least half a window before it."""
    model.eval()
    nats, scored = 0.0, 1
    for start in range(0, max(1, len(tokens) - context // 2), context // 2):
        window = tokens[start : start + context]
        logits = model(window[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="none")
        nats += losses[scored - start - 1 :].sum().item()
        scored = start + len(window)
    return nats / math.log(2) / len(text.encode())


def save(model, out: Path) -> None:
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "n_layer": model.config.n_layer, "n_head": model.config.n_head, "n_embd": model.config.n_embd,
        "n_positions": model.config.n_positions, "vocab_size": model.config.vocab_size,
        "layer_norm_epsilon": model.config.layer_norm_epsilon,
        "bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    tensors = {n: p.detach().to(torch.float16).contiguous() for n, p in model.transformer.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
