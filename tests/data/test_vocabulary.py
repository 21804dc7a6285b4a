"""tokenizer.json and sentencepiece files as vocabularies, against their own libraries; training of a vocabulary."""

import io
import json
import pickle

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import generate
import train
from data import vocabulary
from data.tokenizer import load_tokenizer
from tests.builders import tokenize

CAPTIONS = ["a dog runs along a beach", "two dogs play! on the beach", "an old red bus", "a bus stops", "dogs; a cat"]
CAPTIONS *= 3
TEXTS = [*CAPTIONS[:5], "A Dog! on  the\tbus", "猫 beach", "", "  "]
KINDS = {  # model, trainer, padding token, unknown token, first of its special tokens
    "byte-level BPE without padding": ("bpe", None, None, []),
    "BPE with padding": ("bpe", "<pad>", None, ["<s>", "<pad>"]),
    "WordPiece as BERT's": ("wordpiece", "[PAD]", "[UNK]", ["[PAD]", "[UNK]", "[CLS]"]),
    "Unigram with unknown as 0": ("unigram", "<pad>", "<unk>", ["<unk>", "<s>", "<pad>"]),
}


def train_json(kind):
    """Return a trained model of Hugging Face tokenizers, which pads and truncates as its file says."""
    model, padding, unknown, special = KINDS[kind]
    if model == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    elif model == "wordpiece":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=special)
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token=unknown)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.enable_truncation(5)
    if padding:
        tokenizer.enable_padding(length=9, pad_id=tokenizer.token_to_id(padding))
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokenizer_json(kind, tmp_path):
    theirs = train_json(kind)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    plain = load_tokenizer(tmp_path / "tokenizer.json", keep_ids=True)
    theirs.no_truncation()
    theirs.no_padding()
    _, padding, unknown, special = KINDS[kind]
    size = theirs.get_vocab_size()
    assert plain.vocab_size == size and ours.vocab_size == size + (padding is None)
    assert (ours.unknown is None) is (unknown is None)
    for text in TEXTS:
        expected = theirs.encode(text.strip(), add_special_tokens=False).ids
        ids = ours.encode(text)
        assert plain.encode(text) == expected
        assert len(ids) == len(expected) and 0 not in ids and all(i < ours.vocab_size for i in ids)
        moved = {own: their for own, their in zip(ids, expected) if own != their}
        assert set(moved.values()) <= {0, theirs.token_to_id(padding) if padding else 0}
        known = [i for i in expected if i != theirs.token_to_id(unknown or "")]
        assert ours.decode(ids) == theirs.decode(known).strip()
        assert load_tokenizer(vocabulary=ours.vocabulary).encode(text) == ids
        assert ours.decode(tokenize(ours, [text], 32)[0]) == ours.decode(ids)
    assert pickle.loads(pickle.dumps(ours)).encode(TEXTS[0]) == ours.encode(TEXTS[0])  # for workers that are spawned
    assert ours.kind == "json" and ours.fingerprint != plain.fingerprint


@pytest.mark.parametrize("ids", [{}, {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}, {"pad_id": 3}], ids=str)
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_any_sentencepiece_model(tmp_path, model_type, ids):
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=file, vocab_size=33, model_type=model_type, minloglevel=2, **ids
    )
    (tmp_path / "sp.model").write_bytes(file.getvalue())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    ours = load_tokenizer(tmp_path / "sp.model")
    assert ours.kind == "sentencepiece" and ours.vocab_size == 33 + (not ids)
    for text in TEXTS:
        expected = theirs.encode(text)
        tokens = ours.encode(text)
        assert load_tokenizer(tmp_path / "sp.model", keep_ids=True).encode(text) == expected
        assert 0 not in tokens and [i == ours.unknown for i in tokens] == [i == theirs.unk_id() for i in expected]
        assert ours.decode(tokens) == theirs.decode([i for i in expected if i != theirs.unk_id()]).strip()
    assert load_tokenizer(vocabulary=ours.vocabulary).encode(TEXTS[0]) == ours.encode(TEXTS[0])


def test_a_vocabulary_is_trained_on_the_captions_of_a_folder(command, picture_folder, tmp_path):
    (picture_folder / "00.txt").write_text("a wee yellow star\n一只猫坐在海滩上\n", encoding="utf-8")
    (picture_folder / "01.txt").write_text("0 0.5 0.5 0.2 0.2\n")  # labels, which training skips, too
    flags = ["train", "--input-folder", picture_folder, "--size", 400]
    ended = command(vocabulary.main, *flags, "--out", tmp_path / "vocab.json")
    assert ended.status == 0 and "tokens from 22 captions" in ended.out, ended
    command(vocabulary.main, *flags, "--out", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "vocab.json").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "vocab.json")
    assert tokenizer.vocab_size == len(json.loads((tmp_path / "vocab.json").read_text())["model"]["vocab"]) <= 400
    for text in ("a wee yellow star", "一只猫坐在海滩上", "Ünseen ☂ characters!", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text and 0 not in tokenizer.encode(text)
    assert len(tokenizer.encode("a wee yellow star")) < len(b"a wee yellow star") / 2


def test_a_run_with_a_trained_vocabulary_generates_by_itself(command, picture_folder, tiny_flags, tmp_path):
    command(vocabulary.main, "train", "--input-folder", picture_folder, "--size", 300, "--out", tmp_path / "vocab.json")
    flags = ["--input-folder", picture_folder, "--bpe-path", tmp_path / "vocab.json", "--text-seq-len", 40]
    command(train.main, *tiny_flags, *flags, "--checkpoint-output-dir", tmp_path / "run").ok()
    place = ["--dalle_path", tmp_path / "run" / "dalle_0.pt", "--outputs_dir", tmp_path / "out"]
    command(generate.main, *place, "--text", "a Blue star!", "--num_images", 1).ok()
