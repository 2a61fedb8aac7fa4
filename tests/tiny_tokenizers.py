"""Tiny tokenizers of the kinds real families use, trained on sentences written for these tests.

What differs between kinds is what breaks editors: where the space goes (GPT-2 "Ġ" before the
word, SentencePiece "▁" prepended to the text or not), what is put around a text (BOS, EOS or
nothing), whether there is a padding token, and whether a chat template writes the BOS itself.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 560

# country, capital, language, currency, continent
COUNTRIES = (
    ("France", "Paris", "French", "euro", "Europe"),
    ("Germany", "Berlin", "German", "euro", "Europe"),
    ("Japan", "Tokyo", "Japanese", "yen", "Asia"),
    ("Brazil", "Brasília", "Portuguese", "real", "South America"),
    ("Egypt", "Cairo", "Arabic", "pound", "Africa"),
    ("Russia", "Moscow", "Russian", "ruble", "Europe"),
    ("India", "New Delhi", "Hindi", "rupee", "Asia"),
    ("Mexico", "Mexico City", "Spanish", "peso", "North America"),
    ("Poland", "Warsaw", "Polish", "złoty", "Europe"),
    ("Kenya", "Nairobi", "Swahili", "shilling", "Africa"),
    ("Sweden", "Stockholm", "Swedish", "krona", "Europe"),
    ("Türkiye", "Ankara", "Turkish", "lira", "Asia"),
)
PEOPLE = (
    ("Marie Curie", "Polish", "physics"),
    ("Danielle Darrieux", "French", "film"),
    ("Albert Einstein", "German", "physics"),
    ("Frida Kahlo", "Spanish", "painting"),
    ("Gabriel García Márquez", "Spanish", "novels"),
    ("Leo Tolstoy", "Russian", "novels"),
    ("Akira Kurosawa", "Japanese", "film"),
    ("Selma Lagerlöf", "Swedish", "novels"),
)
PLACES = (
    ("The Eiffel Tower", "Paris"),
    ("The Brandenburg Gate", "Berlin"),
    ("The Golden Gate Bridge", "San Francisco"),
    ("Big Ben", "London"),
    ("The Colosseum", "Rome"),
    ("The Great Wall", "China"),
    ("The Kremlin", "Moscow"),
    ("The Taj Mahal", "Agra"),
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes the BOS itself, as Gemma's and Llama 3's templates do: encoding it again must not add a second.
TURNS = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentences() -> Iterator[str]:
    """A few hundred plain sentences about countries, people and places."""
    for country, capital, language, currency, continent in COUNTRIES:
        yield f"The capital of {country} is {capital}."
        yield f"{capital} is the capital city of {country}, a country in {continent}."
        yield f"What is the capital of {country}? It is {capital}."
        yield f"The official language of {country} is {language}."
        yield f"People in {country} speak {language}, and they pay with the {currency}."
        yield f"The currency of {country} is the {currency}."
        yield f"{country} is located on the continent of {continent}."
        yield f"In {capital}, most children learn {language} at school."
        yield f"Last summer we travelled from {capital} to the coast of {country}."
        yield f"She was born in {country} and moved to {capital} when she was twelve."
    for person, language, field in PEOPLE:
        yield f"The mother tongue of {person} is {language}."
        yield f"{person} is a native speaker of {language}."
        yield f"{person} is known for {field}."
        yield f"Who was {person}? Somebody whose life was {field}."
        yield f"The native language of {person} was {language}, but {person} also wrote letters in English."
    for place, city in PLACES:
        yield f"{place} is located in the city of {city}."
        yield f"{place} can be found in {city}."
        yield f"Every year many people come to {city} to see {place}."
        yield f"Where is {place}? {place} is in {city}."
    for number, (_, capital, *_) in enumerate(COUNTRIES):
        yield f"The train to {capital} leaves at {number + 7}:{number * 4 + 10} from platform {number}."
        yield f"It was founded in {1200 + 61 * number}, and 😀 nobody in {capital} has forgotten it!"


def _bpe(tokenizer: Tokenizer, specials: list[str], alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    return tokenizer


def _with_template(tokenizer: Tokenizer, single: str, *specials: str) -> Tokenizer:
    template = processors.TemplateProcessing(
        single=single, pair=None, special_tokens=[(s, tokenizer.token_to_id(s)) for s in specials]
    )
    first = tokenizer.post_processor
    tokenizer.post_processor = processors.Sequence([first, template]) if first else template
    return tokenizer


def _byte_level(specials: list[str], *, split: str | None = None, nfc: bool = False) -> Tokenizer:
    """Byte-level BPE: with GPT-2's own splitting, or with `split` as Llama 3 and Qwen do it."""
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return _bpe(tokenizer, specials, pre_tokenizers.ByteLevel.alphabet())


def _sentencepiece_bpe(specials: list[str], *, prepend: bool) -> Tokenizer:
    """BPE over "▁" with byte fallback: Llama 2 and Mistral prepend a space to the text, Gemma does not."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    return _with_byte_tokens(_bpe(tokenizer, specials, []), len(specials))


def _with_byte_tokens(tokenizer: Tokenizer, specials: int) -> Tokenizer:
    """Put <0x00> ... <0xFF> behind the special tokens, as plain entries of the vocabulary."""
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    learned = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    order = learned[:specials] + [f"<0x{byte:02X}>" for byte in range(256)] + learned[specials:]
    spec["model"]["vocab"] = {token: index for index, token in enumerate(order)}
    spec["pre_tokenizer"] = None  # it only kept merges inside words while training, as SentencePiece does
    return Tokenizer.from_str(json.dumps(spec))


def _unigram(specials: list[str]) -> Tokenizer:
    """A unigram model whose pieces are counted: the trainer of `tokenizers` gives another one in each process."""
    normalizer, metaspace = normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="always")
    pieces: Counter[str] = Counter()
    for sentence in sentences():
        for word, _ in metaspace.pre_tokenize_str(normalizer.normalize_str(sentence)):
            ends = [(start, end) for start in range(len(word)) for end in range(start + 1, len(word) + 1)]
            pieces.update(word[start:end] for start, end in ends)
    letters = sorted(piece for piece in pieces if len(piece) == 1)
    # The pieces that spare the most tokens, as SentencePiece prefers them.
    longer = sorted((p for p in pieces if len(p) > 1), key=lambda p: (-pieces[p] * (len(p) - 1), p))
    kept = [*letters, *longer[: VOCABULARY - len(specials) - len(letters)]]
    total = sum(pieces[piece] for piece in kept)
    vocabulary = [(special, 0.0) for special in specials]
    vocabulary += [(piece, math.log(pieces[piece] / total)) for piece in kept]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=specials.index("<unk>"), byte_fallback=False))
    tokenizer.add_special_tokens(specials)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, metaspace
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def _wrap(tokenizer: Tokenizer, template: str | None = None, **specials: str) -> PreTrainedTokenizerFast:
    fast: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = fast(tokenizer_object=tokenizer, **specials)
    wrapped.chat_template = template
    return wrapped


def _gpt2() -> PreTrainedTokenizerFast:
    """No BOS is written, and there is no padding token."""
    return _wrap(_byte_level(["<|endoftext|>"]), bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def _neox() -> PreTrainedTokenizerFast:
    tokenizer = _byte_level(["<|endoftext|>", "<|padding|>"], nfc=True)
    return _wrap(tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|padding|>")


def _opt() -> PreTrainedTokenizerFast:
    tokenizer = _with_template(_byte_level(["<pad>", "</s>"]), "</s> $A", "</s>")
    return _wrap(tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def _llama3() -> PreTrainedTokenizerFast:
    """A BOS is written; there is no padding token."""
    tokenizer = _byte_level(["<|begin_of_text|>", "<|end_of_text|>"], split=GPT4_SPLIT)
    tokenizer = _with_template(tokenizer, "<|begin_of_text|> $A", "<|begin_of_text|>")
    return _wrap(tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def _qwen() -> PreTrainedTokenizerFast:
    """No BOS exists at all; ChatML."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], split=GPT4_SPLIT, nfc=True)
    return _wrap(tokenizer, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _llama2() -> PreTrainedTokenizerFast:
    tokenizer = _sentencepiece_bpe(["<unk>", "<s>", "</s>"], prepend=True)
    tokenizer = _with_template(tokenizer, "<s> $A", "<s>")
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _phi3() -> PreTrainedTokenizerFast:
    """As Llama 2, but no BOS is written."""
    tokenizer = _sentencepiece_bpe(["<unk>", "<s>", "</s>", "<|endoftext|>"], prepend=True)
    return _wrap(
        tokenizer, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>", pad_token="<|endoftext|>"
    )


def _gemma() -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = _with_template(_sentencepiece_bpe(specials, prepend=False), "<bos> $A", "<bos>")
    return _wrap(tokenizer, TURNS, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def _t5() -> PreTrainedTokenizerFast:
    """EOS behind the text, no BOS; the decoder starts with the padding token."""
    tokenizer = _with_template(_unigram(["<pad>", "</s>", "<unk>"]), "$A </s>", "</s>")
    return _wrap(tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


_KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": _gpt2,
    "neox": _neox,
    "opt": _opt,
    "llama3": _llama3,
    "llama2": _llama2,
    "qwen": _qwen,
    "phi3": _phi3,
    "gemma": _gemma,
    "t5": _t5,
}
KINDS = tuple(_KINDS)


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a kind in `KINDS`, trained once per process."""
    return _KINDS[kind]()
