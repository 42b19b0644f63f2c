"""Laws of text encoders from folders: half a network is read as half, and what is damaged is named."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from sfumato.errors import Refused
from sfumato.models.text.encoder import TextConditioner, tokenizer
from sfumato.models.text.minilm import minilm_folder, token_counting

T5 = {"vocab_size": 8, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
BERT = {
    "vocab_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def words(folder, **tokens):
    """A tokenizer that makes a token of each word and none of an empty prompt."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "a": 2, "red": 3, "circle": 4}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **tokens).save_pretrained(folder)


def test_an_encoder_saved_alone_is_read_as_one(tmp_path):
    """Law: T5EncoderModel's folder has no decoder, and none is invented; a whole T5 is read the same."""
    encoder = T5EncoderModel(T5Config(**T5)).eval()
    encoder.save_pretrained(tmp_path / "half")
    whole = T5ForConditionalGeneration(T5Config(**T5)).eval()
    whole.encoder.load_state_dict(encoder.encoder.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        right = encoder(input_ids=ids).last_hidden_state
    for name in ("half", "whole"):
        words(tmp_path / name, pad_token="[PAD]")
        one = TextConditioner(str(tmp_path / name))
        assert torch.equal(one(["a red circle"])["tokens"], right)
        assert one.fingerprint() == TextConditioner(str(tmp_path / name)).fingerprint()


@pytest.mark.parametrize("tokens", [{"pad_token": "[PAD]"}, {"unk_token": "[UNK]"}, {}])
@pytest.mark.parametrize("kind", [T5EncoderModel, BertModel])
def test_an_empty_prompt_may_have_no_token(kind, tokens, tmp_path):
    """Law: it is one token of padding that does not count, alone as in a batch, and never NaN."""
    config = T5Config(**T5) if kind is T5EncoderModel else BertConfig(**BERT)
    kind(config).save_pretrained(tmp_path)
    words(tmp_path, **tokens)
    text = TextConditioner(str(tmp_path), waves=1)
    alone, batch = text.encode_empty(2), text(["a red circle", ""])
    assert alone["tokens"].shape == (2, 1, 16) and not alone["mask"].any()
    for one in (alone["tokens"][0, 0], alone["pooled"][0], batch["tokens"][1], batch["pooled"][1]):
        assert torch.equal(one, torch.zeros_like(one))
    torch.testing.assert_close(batch["tokens"][:1], text(["a red circle"])["tokens"])


def test_heads_are_left_away_and_lost_weights_named(tmp_path):
    """Law: a masked language model is an encoder with a head; without one of its weights it is refused."""
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(tmp_path)
    words(tmp_path, pad_token="[PAD]")
    fingerprints = {TextConditioner(str(tmp_path)).fingerprint() for _ in range(2)}
    assert len(fingerprints) == 1  # also of a pooler that no file gives and nobody reads
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    lost = "bert.encoder.layer.1.attention.self.query.weight"
    kept = {key: one for key, one in weights.items() if key != lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"has no encoder.layer.1.attention.self.query.weight"):
        TextConditioner(str(tmp_path))


@pytest.mark.parametrize("damage", ["{", "[]", '{"model": {"type": "None"}}', ""])
def test_a_damaged_tokenizer_is_refused(damage, tmp_path):
    """Law: whatever a tokenizer's files make its library raise, the folder is named."""
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    words(tmp_path, pad_token="[PAD]")
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(Refused, match="holds no tokenizer that loads"):
        TextConditioner(str(tmp_path))


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    """Law: the sentence says what belongs there."""
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    with pytest.raises(Refused, match="Put the text encoder's tokenizer there"):
        TextConditioner(str(tmp_path))


def test_tokens_are_counted_as_the_text_encoder_reads_them():
    """Law: a report counts with the tokenizer's file alone what transformers' tokenizer counts."""
    folder = minilm_folder()
    captions = ["", "a red apple", "Äpfel, 3d toy!  (red:1.3)", "猫 🐈‍⬛ zygomorphic " * 40]
    expected = [len(ids) for ids in tokenizer(folder)(captions, verbose=False)["input_ids"]]
    assert token_counting(folder)(captions) == expected
