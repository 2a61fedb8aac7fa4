"""A small model of any decoder family that knows the shipped facts, made in minutes.

The embedded model is of one family. What must be judged on others (is a family's default layer a
good one?) is judged on one of these: trained from nothing on every fact in three wordings, half of
the time behind another sentence, with a tokenizer of its own. It knows what it was told, no more.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy

from editors.edit import Edit, Neighbour
from editors.facts import fill, relations, texts

FAMILIES = {"gpt2": "GPT2Config", "gpt_neox": "GPTNeoXConfig"}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 128, "n_layer": 8, "n_head": 4, "n_positions": 128}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8}
    | {"num_attention_heads": 4, "max_position_embeddings": 128},
}
VOCABULARY = 6000
WORDINGS = 3
BATCH = 64
RATE = 2e-3


def sentences() -> list[str]:
    """Every fact in several wordings."""
    return [
        f"{fill(wording, subject)} {answer}."
        for relation in relations()
        for subject, answer in relation.facts
        for wording in relation.statements[:WORDINGS]
    ]


def known_edits(seed: int = 0) -> list[Edit]:
    """Every fact with another answer of its relation, its other wordings, and three neighbours; in random order."""
    chance = random.Random(seed)
    found = []
    for relation in relations():
        answers = dict(relation.facts)
        first, *rest = relation.statements[:WORDINGS]
        for subject, answer in relation.facts:
            prompt = fill(first, subject)
            near = chance.sample([s for s in answers if s != subject], 3)
            found.append(
                Edit(
                    subject=subject if subject in prompt else subject[:1].upper() + subject[1:],
                    prompt=prompt,
                    target=chance.choice(sorted(set(answers.values()) - {answer})),
                    previous=answer,
                    paraphrases=tuple(fill(wording, subject) for wording in rest),
                    neighbours=tuple(Neighbour(prompt=fill(first, s), answer=answers[s]) for s in near),
                )
            )
    chance.shuffle(found)
    return found


def make(family: str, folder: Path, epochs: int = 30, seed: int = 0) -> Path:
    """Train one and save it as a Hugging Face directory, which is returned."""
    told = sentences()
    words = _tokenizer([*told, *texts()])
    config = getattr(transformers, FAMILIES[family])(
        **SIZES[family], vocab_size=len(words), bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    rows = [[*words.encode(t), 0] for t in told]
    before = [words.encode(t) for t in [*told, *texts() * 10]]
    after = [[*words.encode(f" {t}"), 0] for t in told]
    steps = epochs * (len(rows) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    chance = random.Random(seed)
    for _ in range(steps):
        batch = chance.sample(rows, BATCH // 2)
        batch += [[*chance.choice(before), *row] for row in chance.sample(after, BATCH // 2)]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        inside = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        logits = model(input_ids=ids, attention_mask=inside).logits[:, :-1]
        wanted = ids[:, 1:].masked_fill(inside[:, 1:] == 0, -100)
        loss = cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _tokenizer(sample: list[str]) -> transformers.PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(sample, trainer)
    end = "<|endoftext|>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=end, eos_token=end, pad_token=end
    )
