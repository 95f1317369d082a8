"""The tokenizer gives OpenAI's and open_clip's ids for any text."""

import html
import pickle
import random
import time

import ftfy
import pytest
import regex
import torch
from open_clip.tokenizer import SimpleTokenizer

from lit_clip import create_model
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from lit_clip.models.hf_tokenizer import clean as clean_for_others
from lit_clip.models.tokenizer import EOT_ID, MOST_READ, PIECE, SOT_ID, CLIPTokenizer, clean, decode, encode, tokenize

# Ids of openai/CLIP at d05afc4 (clip/simple_tokenizer.py, run with ftfy 6.3.1 and regex 2026.11.19).
OPENAI_IDS = {
    "a diagram": [49406, 320, 22697, 49407],
    "a dog": [49406, 320, 1929, 49407],
    "a cat": [49406, 320, 2368, 49407],
    "a photo of a cat.": [49406, 320, 1125, 539, 320, 2368, 269, 49407],
    "A Photo of a CAT!": [49406, 320, 1125, 539, 320, 2368, 256, 49407],
    "  multiple   spaces\tand\nnewlines ": [49406, 6470, 9006, 537, 1218, 3418, 49407],
    "it's the dog's bone, they'll've": [49406, 585, 568, 518, 1929, 568, 6195, 267, 889, 1342, 1200, 49407],
    "café naïve": [49406, 15304, 1097, 35689, 563, 49407],
    "cafe\u0301": [49406, 15304, 49407],  # decomposed
    "&amp;lt;b&amp;gt; bold": [49406, 283, 321, 285, 8911, 49407],
    "12345 3.14": [49406, 272, 273, 274, 275, 276, 274, 269, 272, 275, 49407],
    "emoji 😀🚀": [49406, 16327, 12832, 13542, 49407],
    "中文 日本語": [49406, 19759, 255, 29032, 485, 39121, 44353, 34002, 508, 49407],
    "schÃ¶n": [49406, 844, 7255, 333, 49407],
    "<|startoftext|> x <|endoftext|>": [49406, 49406, 343, 49407, 49407],
    "": [49406, 49407],
    'a photo of the number: "7".': [49406, 320, 1125, 539, 518, 2842, 281, 257, 278, 2811, 49407],
    "hello-world_foo": [49406, 3306, 268, 1002, 318, 23435, 49407],
    "ﬁne ﬂour": [49406, 3797, 18592, 49407],
    "“curly” ‘quotes’": [49406, 257, 20795, 257, 262, 5808, 262, 49407],
}

CODE_POINTS = {
    "ascii": [range(0x20, 0x7F)],
    "accents": [range(0xC0, 0x250), range(0x300, 0x370), range(0x1E00, 0x1F00)],
    "scripts": [range(0x370, 0x530), range(0x590, 0x780), range(0x900, 0xE80)],
    "cjk": [range(0x3040, 0x3100), range(0x4E00, 0x9FFF), range(0xAC00, 0xD7A4), range(0x20000, 0x2A000)],
    "emoji": [range(0x1F300, 0x1F650), range(0x1F680, 0x1F6D0), range(0x1F900, 0x1FA00), [0x200D, 0xFE0F, 0x20E3]],
    "private use": [range(0xE000, 0xF900), range(0xF0000, 0xF0100)],
    "control": [range(0x00, 0x20), range(0x7F, 0xA0)],
    "white space": [[0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x1C, 0x1F, 0x20, 0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x3000]],
    "invisible": [range(0x2000, 0x2010), [0x2060, 0xFEFF, 0xAD]],
    "digits": [range(0x30, 0x3A), range(0x660, 0x66A), range(0x2150, 0x2190), [0xB2, 0xBD, 0x1D7D8]],
    "surrogates": [range(0xD800, 0xE000)],
    "anything": [range(0x20, 0xD800), range(0xE000, 0x110000)],
}
FRAGMENTS = [
    *("&amp;", "&lt;", "&amp;amp;", "&amp;lt;", "&#39;", "&#x1F600;", "&nbsp;", "&eacute;", "&bogus;", "&#28;", "&"),
    *("'s", "'S", "’s", "'LL", "'d", "it's", "they'll've", "'ſ", "''", "rock'n'roll"),
    *("schÃ¶n", "â€™", "naÃ¯ve", "ﬁ", "Ⅷ", "İ", "ß", "K", "the", "photograph", "hello-world_foo", "   ", "!!!???"),
]
SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|EndOfText|>", "<|startoftext|", "<start_of_text>", "<end_of_text>"]


def random_texts(number: int, seed: int, extra: list[str]) -> list[str]:
    """Create texts of random characters and fragments; one in ten is far longer than 77 tokens."""
    rng = random.Random(seed)
    kinds = list(CODE_POINTS.values())

    def piece() -> str:
        if rng.random() < 0.3:
            return rng.choice(FRAGMENTS + extra)
        if rng.random() < 0.3:
            return "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABC", k=rng.randint(1, 9)))
        ranges = rng.choice(kinds)
        return "".join(chr(rng.choice(rng.choice(ranges))) for _ in range(rng.randint(1, 5)))

    def text() -> str:
        pieces = rng.randint(60, 120) if rng.random() < 0.1 else rng.randint(0, 10)
        return "".join(piece() + rng.choice(["", " "]) for _ in range(pieces))

    return [text() for _ in range(number)]


@pytest.fixture(scope="module")
def open_clip_tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def openai_tokenizer() -> SimpleTokenizer:
    """open_clip's tokenizer with the special tokens of the paper's code."""
    tokenizer = SimpleTokenizer()
    for theirs, papers in (("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>")):
        del tokenizer.cache[theirs]
        tokenizer.encoder[papers] = tokenizer.encoder.pop(theirs)
        tokenizer.cache[papers] = papers
    tokenizer.pat = regex.compile(  # clip/simple_tokenizer.py
        r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""",
        regex.IGNORECASE,
    )
    return tokenizer


@pytest.mark.parametrize("text", OPENAI_IDS)
def test_ids_are_openais(text: str) -> None:
    tokens = tokenize(text)
    ids = OPENAI_IDS[text]
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [ids + [0] * (77 - len(ids))]


MANY = pytest.param(10_000, marks=pytest.mark.slow)  # of the same kinds; the peer's tokenizer takes 1 ms a text


@pytest.mark.parametrize("count", [1_000, MANY])
def test_ids_of_random_unicode_are_open_clips(count: int, open_clip_tokenizer: SimpleTokenizer) -> None:
    texts = random_texts(count, seed=0, extra=[])
    ours, theirs = tokenize(texts), open_clip_tokenizer(texts)
    differ = [text for text, a, b in zip(texts, ours, theirs, strict=True) if not torch.equal(a, b)]
    assert differ == []
    assert ours.shape == (count, 77)
    assert (ours[:, -1] == EOT_ID).sum() > count / 20  # some texts are truncated


def test_special_tokens_inside_a_text_have_openais_ids(openai_tokenizer: SimpleTokenizer) -> None:
    # open_clip spells them <start_of_text> and <end_of_text>, which are ordinary text to the paper's code.
    texts = random_texts(500, seed=1, extra=SPECIAL * 10)
    ours, theirs = tokenize(texts), openai_tokenizer(texts)
    differ = [text for text, a, b in zip(texts, ours, theirs, strict=True) if not torch.equal(a, b)]
    assert differ == []
    assert (ours[:, 1:] == SOT_ID).any(dim=1).sum() > 50  # some texts contain special tokens


def test_open_clips_spelling_of_the_special_tokens_is_ordinary_text_as_in_openais_code(
    openai_tokenizer: SimpleTokenizer, open_clip_tokenizer: SimpleTokenizer
) -> None:
    spellings = ["<start_of_text>", "<end_of_text>", "<END_of_text>", "&lt;end_of_text&gt;"]
    texts = [text for text in random_texts(500, seed=2, extra=spellings * 10) if "|" not in text]
    ours = tokenize(texts)
    assert torch.equal(ours, openai_tokenizer(texts))
    assert ((ours == EOT_ID).sum(dim=1) == 1).all()  # the one that ends the text
    assert ((open_clip_tokenizer(texts) == EOT_ID).sum(dim=1) > 1).sum() > 50


def test_a_special_token_written_in_a_text_shortens_that_text_and_does_nothing_else() -> None:
    model = create_model("RN-tiny-64").eval()
    with torch.no_grad():
        whole = model.encode_text(model.tokenize(["a dog <|endoftext|> on a hill", "a cat"]))
        short = model.encode_text(model.tokenize(["a dog", "a cat"]))
    torch.testing.assert_close(whole, short, rtol=0, atol=1e-5)


@pytest.mark.parametrize("context_length", [2, 3, 16])
def test_other_context_lengths_truncate_as_in_open_clip(
    context_length: int, open_clip_tokenizer: SimpleTokenizer
) -> None:
    texts = ["", "a", "a dog", "a photo of a dog on a hill in the rain, seen from far away, in black and white"]
    assert torch.equal(tokenize(texts, context_length), open_clip_tokenizer(texts, context_length))


def test_without_truncation_only_a_caption_that_fits_is_accepted() -> None:
    fits, too_long = " ".join(["dog"] * 75), " ".join(["dog"] * 76)
    assert tokenize(fits, truncate=False).tolist() == [[SOT_ID, *[1929] * 75, EOT_ID]]
    assert torch.equal(tokenize(too_long), tokenize(fits))
    with pytest.raises(InputError, match=r"text 1 has 78 tokens, 77 fit.*dog dog"):
        tokenize(["a cat", too_long], truncate=False)


@pytest.mark.parametrize("stranger", [3, None, b"a dog", ["a dog"], float("nan")])
def test_a_non_string_is_refused_naming_position_and_type(stranger: object) -> None:
    with pytest.raises(InputError, match=rf"text 1 is a {type(stranger).__name__}, not a string"):
        tokenize(["a dog", stranger])  # type: ignore[list-item]


def test_an_empty_list_gives_no_rows() -> None:
    tokens = tokenize([])
    assert tokens.shape == (0, 77)
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A photo of a cat.", "a photo of a cat ."),
        ("it's 7 dogs", "it 's 7 dogs"),
        ("café naïve", "café naïve"),
        ("schön", "schön"),
        ("中文 日本語", "中文 日本語"),
        ("emoji 😀🚀", "emoji 😀🚀"),
        ("", ""),
    ],
)
def test_decoding_an_encoded_caption_gives_its_words(text: str, words: str) -> None:
    assert decode(tokenize(text)[0].tolist()) == words  # without start, end and padding
    assert decode(encode(text)) == words


def test_decoding_gives_open_clips_text(open_clip_tokenizer: SimpleTokenizer) -> None:
    texts = random_texts(200, seed=2, extra=[])
    differ = [text for text in texts if decode(ids := encode(text)) != open_clip_tokenizer.decode(ids).strip()]
    assert differ == []


def papers_cleaning(text: str) -> str:
    """Clean as clip/simple_tokenizer.py does."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


@pytest.mark.parametrize("count", [1_000, MANY])
def test_every_text_is_cleaned_as_in_the_paper_with_and_without_ftfy(count: int) -> None:
    rng = random.Random(3)
    printable = [chr(code) for code in range(0x20, 0x7F)]
    odd = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA1))]
    special = ["\t", "\r\n", "\x1b[31m", "\u2028", "&", "&lt", "\u201cx\u201d", "\ufb01", "\u00e2\u20ac\u2122"]
    texts = random_texts(count // 3, seed=3, extra=special)
    for rare in ([], ["&"], [*odd, *special, *FRAGMENTS]):
        for _ in range(count * 2 // 3):
            characters = rng.choices(printable, k=rng.randint(0, 60))
            for _ in range(rng.randint(1, 3) if rare else 0):
                characters.insert(rng.randint(0, len(characters)), rng.choice(rare))
            texts.append("".join(characters))
    texts = [text for text in texts if len(text) <= PIECE]
    assert len(texts) > 2 * count
    differ = [text for text in texts if clean(text) != papers_cleaning(text)]
    assert differ == []


def test_printable_ascii_does_not_wait_for_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(ftfy, "fix_text", lambda text: called.append(text) or text)
    assert clean('  A photo of <b>a cat\'s</b>   `7` ~ \\n "toys" | 100%; ') == (
        'a photo of <b>a cat\'s</b> `7` ~ \\n "toys" | 100%;'
    )
    assert called == []
    for text in ("caf\u00e9", "a&b", "a\tb", "a\x7fb"):
        clean(text)
    assert called == ["caf\u00e9", "a&b", "a\tb", "a\x7fb"]


def test_ids_of_a_word_stay_the_same_when_seen_again() -> None:
    text = "a photo of a zyzzyva, incomprehensibilities, pneumonoultramicroscopicsilicovolcanoconiosis"
    first = encode(text)
    assert encode("zyzzyva") == encode("zyzzyva")
    encode("zyzzyva").append(0)
    assert encode(text) == first == encode("a photo of a zyzzyva,") + encode(text.partition(", ")[2])


def test_trim_keeps_the_columns_of_the_longest_caption() -> None:
    tokens = tokenize(["a dog", "a photo of a cat.", ""])
    trimmed = CLIPTokenizer().trim(tokens)
    assert torch.equal(trimmed, tokens[:, :8])  # 'a photo of a cat.' has 8 ids
    assert torch.equal(CLIPTokenizer().trim(trimmed), trimmed)
    assert CLIPTokenizer().trim(tokens[2:]).tolist() == [[SOT_ID, EOT_ID]]


def test_a_caption_with_an_end_of_text_has_one_feature_whatever_is_beside_it() -> None:
    text = TextTransformerConfig(context_length=16, width=16, layers=1, heads=1, pool="class")  # reads what follows
    model = CLIP(CLIPConfig(16, VisionTransformerConfig(32, 16, 64, 1, 1), text)).eval()
    captions = ["a dog <|endoftext|> on the beach", "a red kite over the beach and two dogs in the street"]
    with torch.no_grad():
        alone, whole, beside = (
            model.encode_text(tokens)[0]
            for tokens in (
                model.tokenizer.trim(model.tokenize(captions[0])),
                model.tokenize(captions[0]),
                model.tokenizer.trim(model.tokenize(captions)),
            )
        )
    torch.testing.assert_close(alone, beside)
    torch.testing.assert_close(alone, whole)
    tokens = model.tokenize(["a dog <|endoftext|> x", "", "x " * 20])
    assert model.tokenizer.lengths(tokens).tolist() == [6 + 1, 2 + 1, 16]


def test_the_tokenizer_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(CLIPTokenizer(context_length=5)))
    assert copy == CLIPTokenizer(context_length=5)
    assert torch.equal(copy(["a photo of a cat.", "a dog"]), tokenize(["a photo of a cat.", "a dog"], 5))


def test_ids_are_counted_before_truncation() -> None:
    assert {text: CLIPTokenizer(4).count(text) for text in OPENAI_IDS} == {
        text: len(ids) for text, ids in OPENAI_IDS.items()
    }
    assert CLIPTokenizer(77).count("cat " * 500) == 502


@pytest.mark.slow
def test_ids_of_long_normal_texts_are_open_clips(open_clip_tokenizer: SimpleTokenizer) -> None:
    generator = random.Random(0)
    broken = {"sch\u00c3\u00b6n", "<|startoftext|>", "<|endoftext|>"}
    words = [word for word in " ".join(OPENAI_IDS).split() if word not in broken]
    words += ["<b>", "R&amp;D", "&eacute;t&eacute;", "l\u2019h\u00f4tel", "https://example.org/?a=1&b=2", "C:\\\\x"]
    for size in (300, 1000, 5000):
        for space in (" ", "\n", "  "):
            text = space.join(generator.choices(words, k=size))
            assert len(text) > 1000
            for length in (77, 248, size // 2):
                assert tokenize(text, length).equal(open_clip_tokenizer(text, length))


HOSTILE = {  # seconds to minutes each if cleaned at once
    "escaped ampersands": "&" + "amp;" * 30_000,
    "escaped escapes": "&amp;lt;" * 20_000,
    "numbered ampersands": "&" + "#38;" * 30_000,
    "accents": "a" + "\u0301\u0323" * 100_000,
    "broken Unicode": "\u00c3\u00a2\u00e2\u201a\u00ac" * 50_000,
    "spaces": " " * 1_000_000,
    "one word": "x" * 1_000_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_time_of_a_hostile_text_is_bounded(kind: str) -> None:
    started = time.process_time()
    tokenize(HOSTILE[kind])
    clean_for_others(HOSTILE[kind], "canonicalize")
    assert CLIPTokenizer().count(HOSTILE[kind]) <= 4 * MOST_READ
    assert time.process_time() - started < 10
