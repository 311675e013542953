"""Text to samples, and span corruption."""

import pytest
import torch

from halfbit.errors import CalibrationError
from halfbit.samples import SpanCorruption, _random_spans, causal_samples, read_text, windows


def test_windows_are_the_first_of_the_text_in_order() -> None:
    rows = windows(torch.arange(103), samples=4, length=20)
    assert torch.equal(rows, torch.arange(80).view(4, 20))


def test_a_seed_draws_the_same_windows_again_and_another_seed_others() -> None:
    tokens = torch.arange(10_000)
    first, again, other = (windows(tokens, 8, 10, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(int(row[0]) % 10 == 0 and torch.equal(row, torch.arange(10) + row[0]) for row in first)
    assert len(set(first[:, 0].tolist())) == 8


def test_text_shorter_than_asked_is_an_error_that_says_how_much_there_is() -> None:
    with pytest.raises(CalibrationError, match=r"book: asked for 5 samples of 20 tokens, got text for 4 \(99 tokens\)"):
        windows(torch.arange(99), samples=5, length=20, origin="book")


def test_jsonl_gives_its_texts_and_names_the_bad_line(tmp_path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n', "utf-8")
    assert read_text(str(path)) == ["one", "two"]
    path.write_text('{"text": "one"}\n{"body": "two"}\n', "utf-8")
    with pytest.raises(CalibrationError, match="line 2"):
        read_text(str(path))
    path.write_text('{"text": "one"}\n{nonsense\n', "utf-8")
    with pytest.raises(CalibrationError, match="line 2: not JSON"):
        read_text(str(path))


def test_a_missing_text_file_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"nowhere\.txt: no such text file"):
        read_text("nowhere.txt")


def test_special_tokens_stay_out_of_the_hessians() -> None:
    (sample,) = causal_samples(torch.tensor([[5, 0, 7, 1, 0]]), [0, 1])
    assert sample.keep.tolist() == [True, False, True, False, False]


CORRUPTION = SpanCorruption(sentinels=tuple(range(900, 932)), start=1, end=2)
FIXED = SpanCorruption(sentinels=tuple(range(900, 932)), start=1, end=2, kind="fixed")


@pytest.mark.parametrize("length", [4, 7, 64, 256, 511])
def test_fixed_spans_are_three_long_and_end_with_the_end(length: int) -> None:
    (sample,) = FIXED.samples(torch.arange(10, 10 + length)[None], seed=1)
    assert sample.labels is not None
    assert sample.decoder_keep is not None
    *spans, end = sample.labels.tolist()
    assert end == FIXED.end
    assert len(spans) == 4 * min(max(length * 15 // 300, 1), 31)
    for start in range(0, len(spans), 4):
        assert spans[start] == 900 + start // 4
        assert spans[start + 1 : start + 4] == list(range(spans[start + 1], spans[start + 1] + 3))
    assert sample.decoder_keep.tolist() == [t < 900 for t in spans] + [False]


@pytest.mark.parametrize("length", [2, 3, 7, 64, 256, 511])
def test_span_corruption_loses_no_token(length: int) -> None:
    """Putting the decoder's spans back at the encoder's sentinels gives the text."""
    row = torch.arange(10, 10 + length)
    (sample,) = CORRUPTION.samples(row[None], seed=5)
    assert sample.labels is not None
    assert sample.decoder_ids is not None
    spans: dict[int, list[int]] = {}
    for token in sample.labels.tolist():
        if token >= 900:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert sample.ids[-1] == CORRUPTION.end
    back = [t for token in sample.ids[:-1].tolist() for t in (spans[token] if token >= 900 else [token])]
    assert back == row.tolist()
    assert list(spans) == list(range(900, 900 + len(spans)))  # the last one closes the text and is empty
    assert spans[899 + len(spans)] == []
    assert sample.decoder_ids.tolist() == [1, *sample.labels[:-1].tolist()]


def test_span_corruption_cuts_fifteen_percent_in_spans_of_three() -> None:
    masks = [_random_spans(256, 31, torch.Generator().manual_seed(s)) for s in range(20)]
    for mask in masks:
        assert int(mask.sum()) == round(256 * 0.15)
        assert int((mask & ~torch.cat([torch.zeros(1, dtype=torch.bool), mask[:-1]])).sum()) == 13
    assert len({tuple(m.tolist()) for m in masks}) == 20


def test_masked_are_the_sentinels_and_the_tokens_that_predict_them() -> None:
    (sample,) = CORRUPTION.samples(torch.arange(10, 110)[None], seed=0)
    assert sample.labels is not None
    assert sample.decoder_keep is not None
    assert torch.equal(sample.keep, sample.ids < 900)
    assert torch.equal(sample.decoder_keep, sample.labels < 900)
    assert not sample.decoder_keep[-1]


def test_a_data_set_name_without_the_library_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install 'halfbit\[datasets\]'"):
        read_text("allenai/c4:en:train")


def test_a_data_set_is_streamed_and_read_no_further_than_asked(monkeypatch) -> None:
    asked, read = {}, []

    class Datasets:
        @staticmethod
        def load_dataset(name, *config, split, streaming):
            asked.update(name=name, config=config, split=split, streaming=streaming)
            for i in range(1000):
                read.append(i)
                yield {"text": f"text {i}", "id": i}

    monkeypatch.setitem(__import__("sys").modules, "datasets", Datasets)
    assert read_text("allenai/c4:en:validation", characters=14) == ["text 0", "text 1", "text 2"]
    assert read == [0, 1, 2]
    assert asked == {"name": "allenai/c4", "config": ("en",), "split": "validation", "streaming": True}
    assert len(read_text("wikitext")) == 1000
    assert asked == {"name": "wikitext", "config": (), "split": "train", "streaming": True}


def test_texts_are_read_no_further_than_asked(tmp_path) -> None:
    (tmp_path / "long.txt").write_text("abc " * 1000, "utf-8")
    assert read_text(str(tmp_path / "long.txt"), characters=10) == ["abc abc ab"]
    (tmp_path / "long.jsonl").write_text('{"text": "abcdef"}\n' * 50, "utf-8")
    assert read_text(str(tmp_path / "long.jsonl"), characters=10) == ["abcdef", "abcdef"]


def test_text_that_is_no_text_is_an_error(tmp_path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    for source in (str(tmp_path / "latin.jsonl"), "once upon a time " * 40):
        with pytest.raises(CalibrationError):
            read_text(source)
    with pytest.raises(CalibrationError, match="gives no tokens"):
        windows(torch.empty(0, dtype=torch.int64), samples=1, length=4)
