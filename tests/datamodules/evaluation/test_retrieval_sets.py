"""Captioned images from any source, COCO, Flickr30k, and queries with judged documents."""

import json
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.evaluation import COCO, CaptionedPairs, Flickr30k, GroupedPairs, QueriesAndDocuments
from lit_clip.errors import InputError
from lit_clip.evaluation.data import CaptionedImages, MissingData
from tests.helpers.coloured_sets import colour, colour_of, encoded, message_of, paint, paint_shade, shade, write_files


def keys_shades_captions(images: CaptionedImages) -> list[tuple[str, int, list[str]]]:
    """Return the key, shade and captions of every image."""
    return [(images.key(i), shade(images.images(i)[0]), images.captions(i)) for i in range(len(images))]


def test_table_rows_with_the_same_image_are_one_image_with_all_captions(tmp_path: Path) -> None:
    for name, number in (("a.png", 10), ("b.png", 20)):
        paint_shade(tmp_path / name, number)
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,one\nb.png,two\na.png,three\n")
    images = CaptionedPairs(str(tmp_path / "pairs.csv"))
    expected = [("a.png", 10, ["one", "three"]), ("b.png", 20, ["two"])]
    assert keys_shades_captions(images) == expected
    copy = pickle.loads(pickle.dumps(images))
    assert (keys_shades_captions(copy), copy.stamp()) == (expected, images.stamp())
    before = images.stamp()
    paint_shade(tmp_path / "b.png", 200).write_bytes(b"another")
    assert CaptionedPairs(str(tmp_path / "pairs.csv")).stamp() != before


def test_columns_and_root_can_be_set_and_a_folder_of_images_and_text_files_is_a_set(tmp_path: Path) -> None:
    paint_shade(tmp_path / "images/a.png", 10)
    (tmp_path / "pairs.csv").write_text("place,words\na.png,one\n")
    images = CaptionedPairs(str(tmp_path / "pairs.csv"), str(tmp_path / "images"), "place", "words")
    assert keys_shades_captions(images) == [("a.png", 10, ["one"])]
    (tmp_path / "images/a.txt").write_text("one\ntwo\n")
    assert keys_shades_captions(CaptionedPairs(str(tmp_path / "images"))) == [("a.png", 10, ["one", "two"])]
    assert "nowhere.csv" in message_of(lambda: CaptionedPairs(str(tmp_path / "nowhere.csv")), MissingData)
    assert "place, words" in message_of(lambda: CaptionedPairs(str(tmp_path / "pairs.csv")))


def test_tar_shards_are_a_retrieval_set(tmp_path: Path) -> None:
    paint_shade(tmp_path / "0.png", 10)
    (tmp_path / "0.txt").write_text("one")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "0.png", "0.png")
        tar.add(tmp_path / "0.txt", "0.txt")
    images = CaptionedPairs(str(tmp_path / "0.tar"))
    assert keys_shades_captions(images) == [("0", 10, ["one"])]
    assert len(pickle.loads(pickle.dumps(images)).images(0)) == 1


def karpathy_entry(name: str, split: str, captions: Sequence[str], **more: str) -> dict[str, Any]:
    sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions]
    return {"filename": name, "split": split, "sentences": sentences, **more}


def test_coco_reads_karpathys_splits_and_val2017_only_by_its_name(tmp_path: Path) -> None:
    """The two have other images, so that a folder with one must not stand for the other."""
    paint_shade(tmp_path / "val2017/7.jpg", 70)
    captions = [{"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": "b"}]
    values = {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": captions}
    write_files(tmp_path, {"annotations/captions_val2017.json": values})
    assert keys_shades_captions(COCO(str(tmp_path), "val2017")) == [("7.jpg", 70, ["a", "b"])]
    message = message_of(lambda: COCO(str(tmp_path)), MissingData)
    for part in ("captions_val2017.json", "dataset_coco.json", "coco_test_karpathy.json", "split val2017"):
        assert part in message
    images = [
        karpathy_entry("1.jpg", "train", ["no"], filepath="train2014"),
        karpathy_entry("2.jpg", "test", ["c", "d"], filepath="val2014"),
        karpathy_entry("3.jpg", "val", ["no"], filepath="val2014"),
    ]
    write_files(tmp_path, {"dataset_coco.json": {"images": images, "dataset": "coco"}})
    paint_shade(tmp_path / "val2014/2.jpg", 20)
    paint_shade(tmp_path / "val2014/3.jpg", 30)
    assert keys_shades_captions(COCO(str(tmp_path))) == [("val2014/2.jpg", 20, ["c", "d"])]
    assert keys_shades_captions(COCO(str(tmp_path), "val")) == [("val2014/3.jpg", 30, ["no"])]
    assert keys_shades_captions(COCO(str(tmp_path), "val2017")) == [("7.jpg", 70, ["a", "b"])]
    assert "dataset_coco.json" in message_of(lambda: COCO(str(tmp_path / "val2014")), MissingData)


LINES = "image,caption\n2.jpg,Two, with a comma .\n2.jpg,b\n1.jpg,One | or two\n"


@pytest.mark.parametrize("file", ["dataset_flickr30k.json", "flickr30k_test_karpathy.txt"])
@pytest.mark.parametrize("folder", ["flickr30k-images", "flickr30k_images", "."])
def test_flickr30k_reads_karpathys_test_split_from_any_of_its_files(file: str, folder: str, tmp_path: Path) -> None:
    for i in (1, 2, 3):
        paint_shade(tmp_path / folder / f"{i}.jpg", 10 * i)
    images = [
        karpathy_entry("3.jpg", "train", ["no"]),
        karpathy_entry("2.jpg", "test", ["Two, with a comma .", "b"]),
        karpathy_entry("1.jpg", "test", ["One | or two"]),
    ]
    whole = {"images": images, "dataset": "flickr30k"}
    write_files(tmp_path, {file: LINES if file.endswith("txt") else whole})
    images = Flickr30k(str(tmp_path))
    expected = [("2.jpg", 20, ["Two, with a comma .", "b"]), ("1.jpg", 10, ["One | or two"])]
    assert keys_shades_captions(images) == expected
    copy = pickle.loads(pickle.dumps(images))
    assert (keys_shades_captions(copy), copy.stamp()) == (expected, images.stamp())
    assert "nowhere" in message_of(lambda: Flickr30k(str(tmp_path / "nowhere")), MissingData)
    if file.endswith("txt"):
        write_files(tmp_path, {file: f"{LINES}rubbish\n"})
        assert "line 5" in message_of(lambda: Flickr30k(str(tmp_path)))


Columns = dict[str, Any]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
QRELS: Columns = {"query-id": ["q1", "q1", "q2"], "corpus-id": ["d1", "d2", "d3"], "score": [2, 0, 1]}
QUERIES: Columns = {"id": ["q1", "q2", "q3"], "text": ["a hat", None, "never judged"], "image": [None, 4, None]}
CORPUS: Columns = {"id": ["d1", "d2", "d3"], "text": ["red", None, "blue"], "title": [None, None, "A"]}
CORPUS |= {"image": [1, 2, None]}


def stored(images: list[Any]) -> pa.Array:
    """Return images as Hugging Face stores them; a text is the path of one."""
    values = [each if each is None or isinstance(each, dict) else {"bytes": encoded(each)} for each in images]
    return pa.array(values, IMAGE)


def write(path: Path, columns: Columns, rows: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: stored(each) if name == "image" else pa.array(each) for name, each in columns.items()}
    pq.write_table(pa.table(arrays), path, row_group_size=rows)


def write_mteb(root: Path, **changed: Columns) -> Path:
    tables = {"queries": QUERIES, "corpus": CORPUS, "qrels": QRELS} | changed
    for name, columns in tables.items():
        write(root / name / "test-00000-of-00001.parquet", columns, rows=2)
    return root


def write_beir(root: Path, images: bool = False) -> Path:
    root.mkdir(exist_ok=True)
    queries = [{"_id": "q1", "text": "a hat", "metadata": {}}, {"_id": "q2", "text": "a shoe"}]
    corpus = [{"_id": f"d{n}", "title": "", "text": f"thing {n}"} for n in (1, 2, 3)]
    if images:
        corpus[1] |= {"image": "photos/2.png", "text": ""}
        paint(root / "photos/2.png", 2)
    for name, rows in (("queries", queries), ("corpus", corpus)):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (root / "qrels").mkdir(exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t0", "q2\td3\t1"]
    (root / "qrels/test.tsv").write_text("\n".join(lines), encoding="utf-8")
    (root / "qrels/dev.tsv").write_text("\n".join(lines[:2]), encoding="utf-8")
    return root


def test_mtebs_layout_opens(tmp_path: Path) -> None:
    found = QueriesAndDocuments(str(write_mteb(tmp_path)))
    assert found.queries == (["q1", "q2"], ["a hat", ""], [-1, 0])
    assert found.documents == (["d1", "d2", "d3"], ["red", "", "A blue"], [1, 2, -1])
    assert sorted(found.relevance) == [(0, 0, 2), (0, 1, 0), (1, 2, 1)]
    assert [colour_of(found, index) for index in range(3)] == [colour(4), colour(1), colour(2)]
    assert [found.key(index) for index in range(3)] == ["query q2", "document d1", "document d2"]
    other = pickle.loads(pickle.dumps(found))  # a data worker
    assert (other.stamp(), colour_of(other, 2)) == (found.stamp(), colour(2))


def test_files_beside_each_other_with_null_columns_numbers_as_ids_and_paths_open(tmp_path: Path) -> None:
    paint(tmp_path / "photos/7.png", 7)
    path = {"bytes": None, "path": "photos/7.png"}
    queries = pa.table({"_id": [1], "text": pa.nulls(1), "image": stored([path]), "modality": ["image"]})
    corpus = pa.table({"id": ["5", "6"], "text": ["x", "y"], "image": pa.nulls(2)})
    for name, table in (("query", queries), ("corpus", corpus)):
        pq.write_table(table, tmp_path / f"{name}-00000-of-00001.parquet")
    write(tmp_path / "qrels-00000-of-00001.parquet", {"query-id": [1], "corpus-id": [6], "score": [1.0]})
    found = QueriesAndDocuments(str(tmp_path))
    assert (found.queries, found.documents.images) == ((["1"], [""], [0]), [-1, -1])
    assert (found.relevance, colour_of(found, 0)) == ([(0, 1, 1)], colour(7))
    assert found.image_paths() == [tmp_path / "photos/7.png"]


def test_beirs_layout_opens_with_the_judgements_of_a_split(tmp_path: Path) -> None:
    found = QueriesAndDocuments(str(write_beir(tmp_path, images=True)))
    assert found.queries == (["q1", "q2"], ["a hat", "a shoe"], [-1, -1])
    assert found.documents == (["d1", "d2", "d3"], ["thing 1", "", "thing 3"], [-1, 0, -1])
    assert (len(found), colour_of(found, 0)) == (1, colour(2))
    assert found.relevance == [(0, 0, 2), (0, 1, 0), (1, 2, 1)]
    assert QueriesAndDocuments(str(tmp_path), "dev").relevance == [(0, 0, 2)]
    before = found.stamp()
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td3\t1", encoding="utf-8")
    assert QueriesAndDocuments(str(tmp_path)).stamp() == before
    paint(tmp_path / "photos/2.png", 3)
    assert QueriesAndDocuments(str(tmp_path)).stamp() != before


def _lines(name: str, *lines: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text("\n".join(lines), encoding="utf-8")


HEAD, GOOD = "query-id\tcorpus-id\tscore", '{"_id": "d1", "text": "x"}'
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown document": (_lines("qrels/test.tsv", HEAD, "q1\td9\t1"), "test.tsv: 'd9' is the id of no"),
    "unknown query": (_lines("qrels/test.tsv", HEAD, "q9\td1\t1"), "test.tsv: 'q9' is the id of no"),
    "no number": (_lines("qrels/test.tsv", HEAD, "q1\td1\thigh"), "score is 'high'"),
    "half": (_lines("qrels/test.tsv", HEAD, "q1\td1\t0.5"), "score 0.5 .* whole number"),
    "huge": (_lines("qrels/test.tsv", HEAD, "q1\td1\t1e300"), "whole number"),
    "no score": (_lines("qrels/test.tsv", "query-id\tcorpus-id", "q1\td1"), "no column score"),
    "twice": (_lines("corpus.jsonl", GOOD, GOOD), "corpus.jsonl: 'd1' is the id of two rows"),
    "no id": (_lines("corpus.jsonl", '{"text": "x"}'), "no id"),
    "empty": (_lines("corpus.jsonl", '{"_id": "d1", "text": " "}'), "'d1' has neither a text nor an image"),
    "number as text": (_lines("corpus.jsonl", GOOD, '{"_id": "d2", "text": 5}'), "corpus.jsonl line 2: text"),
    "outside": (
        _lines("corpus.jsonl", '{"_id": "d1", "image": "../x.png"}'),
        "'d1' has the image '../x.png', .* below",
    ),
    "absolute": (_lines("corpus.jsonl", '{"_id": "d1", "image": "/etc/x.png"}'), "below the folder"),
    "list as image": (_lines("corpus.jsonl", '{"_id": "d1", "image": [0, 0]}'), "below the folder"),
    "no json": (_lines("corpus.jsonl", "{"), "corpus.jsonl: .* line 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_file_is_one_line(mistake: str, tmp_path: Path) -> None:
    spoil, message = MISTAKES[mistake]
    spoil(write_beir(tmp_path))
    with pytest.raises(InputError, match=message) as error:
        QueriesAndDocuments(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_wrong_parquet_file_is_one_line(tmp_path: Path) -> None:
    def problem(**changed: Columns) -> str:
        return message_of(lambda: QueriesAndDocuments(str(write_mteb(tmp_path, **changed))))

    assert "test-00000-of-00001.parquet row 0: text: 5 must be a text" in problem(corpus=CORPUS | {"text": [5] * 3})
    assert "no column query-id or corpus-id or score; its columns are a" in problem(qrels={"a": [1]})
    assert "lacks" in problem(qrels={"query-id": ["q1"], "score": [1]})
    outside = {"bytes": None, "path": "../../x.png"}
    assert "'../../x.png'" in problem(corpus=CORPUS | {"image": [1, outside, 2]})
    whole = (tmp_path / "corpus/test-00000-of-00001.parquet").read_bytes()
    (tmp_path / "corpus/test-00000-of-00001.parquet").write_bytes(whole[:-30])
    assert "parquet" in message_of(lambda: QueriesAndDocuments(str(tmp_path)))


def test_a_missing_table_is_missing_data_and_an_unknown_split_names_those_there(tmp_path: Path) -> None:
    assert "no qrels" in message_of(lambda: QueriesAndDocuments(str(tmp_path)), MissingData)
    write_beir(tmp_path)
    assert "set split to one of dev, test" in message_of(lambda: QueriesAndDocuments(str(tmp_path), "train"))


def write_own_products(folder: Path) -> None:
    for number, name in enumerate(["a", "b", "c", "new", "other"]):
        paint_shade(folder / f"{name}.png", 10 * number)
    catalogue = ["image,title,sku", "a.png,a hat,1", "b.png,a bonnet,1", "c.png,a shoe,2", "new.png,no number,"]
    (folder / "catalogue.csv").write_text("\n".join(catalogue))
    asked = ["image,title,sku", "other.png,a kite,9", "new.png,a cap,1", "new.png,cap,1", "b.png,a boot,2", "a.png,x,"]
    (folder / "asked.csv").write_text("\n".join(asked))


def test_own_pairs_find_the_others_of_their_group(tmp_path: Path) -> None:
    write_own_products(tmp_path)

    def found(*fields: Any) -> GroupedPairs:
        return GroupedPairs(str(tmp_path), "asked.csv", "catalogue.csv", "sku", *fields)

    both = found()
    assert both.documents.texts == ["a hat", "a bonnet", "a shoe", "no number"]
    assert both.queries == (
        ["query new.png", "query b.png"],
        ["a cap", "a boot"],
        [4, 5],
    )  # 9 is nowhere, x in no group
    assert both.relevance == [(0, 0, 1), (0, 1, 1), (1, 2, 1)]
    assert [shade(both.images(row)[0]) for row in range(len(both))] == [0, 10, 20, 30, 30, 10]
    assert [both.whole_file(row) for row in (0, 5)] == [tmp_path / "a.png", tmp_path / "b.png"]
    assert found(["caption"]).queries == (both.queries.keys, both.queries.texts, [-1, -1])
    assert len(found(["caption"])) == 4  # images of queries are not encoded
    assert found(["image"]).queries == (both.queries.keys, ["", ""], [4, 5])
    before = both.stamp()
    assert found(["caption"]).stamp() != before == found().stamp()
    paint_shade(tmp_path / "c.png", 99).write_bytes(b"another")
    assert found().stamp() != before


def test_own_pairs_without_groups_or_fields_are_refused(tmp_path: Path) -> None:
    write_own_products(tmp_path)
    names = str(tmp_path), "asked.csv", "catalogue.csv"
    assert "no row's 'title' is that of a row in catalogue.csv" in message_of(lambda: GroupedPairs(*names, "title"))
    assert "image, title, sku" in message_of(lambda: GroupedPairs(*names, "number"))
    for fields in ([], ["text"]):
        assert "name image, caption or both" in message_of(lambda given=fields: GroupedPairs(*names, "sku", given))
    missing = message_of(lambda: GroupedPairs(str(tmp_path), "asked.csv", "none.csv", "sku"), MissingData)
    assert "none.csv" in missing
