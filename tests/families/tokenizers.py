"""Tiny tokenizers of the kinds that pretrained models use, made here from a few lines of text."""

import math
import re
from collections import Counter
from itertools import pairwise

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTokenizer,
    GemmaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5TokenizerFast,
)

LINES = """
a red circle on a blue background
a photo of a green square and a yellow triangle on white paper
blurry , low quality , bad , ugly , worst quality
Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships
of the objects and background: system user assistant
You are an assistant designed to generate superior images with the superior degree of image-text alignment
based on textual prompts or user prompts. <Prompt Start>
Given a user prompt, generate an image prompt. User Prompt:
""".strip().splitlines()


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    for place, byte in enumerate(byte for byte in range(256) if byte not in letters):
        letters[byte] = chr(256 + place)
    return letters


def merged(words: Counter[tuple[str, ...]], limit: int = 250) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, ties by the alphabet."""
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({joined(word, best): count for word, count in words.items()})
    return merges


def joined(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word with every occurrence of the pair made one."""
    out: list[str] = []
    place = 0
    while place < len(word):
        if word[place : place + 2] == pair:
            out.append(word[place] + word[place + 1])
            place += 2
        else:
            out.append(word[place])
            place += 1
    return tuple(out)


def counted(pattern: str, lines: list[str] = LINES) -> Counter[str]:
    """How often each piece occurs."""
    return Counter(piece for line in lines for piece in re.findall(pattern, line))


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's kind; the second encoder of the XL models pads with "!", which is 0."""
    letters = byte_letters()
    pieces = counted(r"[a-z]+|[0-9]|[^\sa-z0-9]+", [line.lower() for line in LINES])
    words = Counter(
        {
            (*(letters[b] for b in p.encode()[:-1]), letters[p.encode()[-1]] + "</w>"): n
            for p, n in pieces.items()
        }
    )
    merges = merged(words)
    tokens = [letters[byte] for byte in sorted(letters, key=lambda byte: (byte < 33, byte))]
    tokens += [token + "</w>" for token in tokens] + ["".join(pair) for pair in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=77)


CHAT = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def byte_level(pattern: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges over bytes."""
    letters = byte_letters()
    pieces = counted(pattern, LINES + [" " + line for line in LINES])
    merges = merged(Counter({tuple(letters[b] for b in piece.encode()): n for piece, n in pieces.items()}))
    tokens = dict.fromkeys([letters[byte] for byte in range(256)] + ["".join(pair) for pair in merges])
    return {token: place for place, token in enumerate(tokens)}, merges


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's kind, with a chat template."""
    vocabulary, merges = byte_level(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\n\n|\n")
    made = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        model_max_length=8192,
        padding_side="right",
        additional_special_tokens=MARKS,
        chat_template=CHAT,
    )
    made.add_tokens(["<think>", "</think>"])
    return made


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's kind, as HunyuanVideo uses it."""
    vocabulary, merges = byte_level(r" ?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+|\n\n|\n")
    turns = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    marks = ["<|begin_of_text|>", "<|end_of_text|>", *turns, "<pad>"]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(marks)
    made.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[(marks[0], made.token_to_id(marks[0]))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=marks[0],
        eos_token=marks[4],
        pad_token=marks[5],
        model_max_length=8192,
        padding_side="right",
    )


def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's kind: pieces with ▁ for spaces, bytes as a last resort."""
    lines = [line.replace(" ", "▁") for line in LINES + [" " + line for line in LINES]]
    pieces = counted(r"▁?[A-Za-z]+|[0-9]|▁?[^\sA-Za-z0-9▁]+|▁|\n\n|\n", lines)
    merges = merged(Counter({tuple(piece): n for piece, n in pieces.items()}))
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted({letter for piece in pieces for letter in piece}) + ["".join(pair) for pair in merges]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    return GemmaTokenizer(
        vocab=vocabulary, merges=merges, add_bos_token=True, model_max_length=8192, padding_side="right"
    )


def t5_tokenizer() -> T5TokenizerFast:
    """T5's kind: whole words before letters."""
    pieces = counted(r"[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]")
    total = sum(pieces.values())
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    vocabulary += [("▁" + piece, math.log(n / total)) for piece, n in sorted(pieces.items())]
    known = {piece for piece, _ in vocabulary}
    letters = sorted(set("".join(pieces)) | set(map(chr, range(33, 127))))
    vocabulary += [(letter, -9.0) for letter in letters if letter not in known]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, additional_special_tokens=[], model_max_length=512)
