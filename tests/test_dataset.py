"""Shards on disk: bad ones are left out by name, good ones read by number; texts are mixed by their share."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import documents, parquet_bytes, write_shards

from nanochat.common import UserError
from nanochat.shards import mixed_texts, open_shards, open_texts, texts


def test_the_last_shard_is_validation(tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    assert list(texts("train", directory=tmp_path)) == documents(0) + documents(1)
    assert list(texts("val", directory=tmp_path)) == documents(2)
    with pytest.raises(UserError, match="no split 'dev'"):
        open_texts("dev", tmp_path)


def test_start_and_step_deal_the_documents_out(tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    dealt = [list(texts("train", start=rank, step=3, directory=tmp_path)) for rank in range(3)]
    assert sorted(itertools.chain(*dealt)) == sorted(documents(0) + documents(1))


def test_documents_are_read_by_number_in_any_order(tmp_path: Path) -> None:
    write_shards(tmp_path, 30)
    read, wanted = open_texts("train", tmp_path), [text for shard in range(29) for text in documents(shard)]
    assert len(read) == 290
    for number in (0, 289, 5, 144, 143, 3, 289):
        assert read[number] == wanted[number]
    with pytest.raises(IndexError):
        read[290]


def test_shards_are_looked_for_in_data_dir_then_base_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    write_shards(tmp_path / "base" / "base_data", 2)
    assert open_shards().directory == tmp_path / "base" / "base_data"
    write_shards(tmp_path / "data" / "pretrain", 2)
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "data"))
    assert open_shards().directory == tmp_path / "data" / "pretrain"


def test_bad_shards_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, 4)
    whole = (tmp_path / "shard_00000.parquet").read_bytes()
    bad = {
        "shard_00010.parquet": whole[: len(whole) // 2],
        "shard_00011.parquet": b"",
        "shard_00012.parquet": b"<html>502 Bad Gateway</html>",
        "shard_00013.parquet": parquet_bytes(documents(9), column="content"),
        "shard_00014.parquet": parquet_bytes([]),
        "shard_00015.parquet": whole,
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / ".shard_00020.parquet.1-1.part").write_bytes(whole[:100])
    table = pa.table({"text": pa.array([1, 2])})
    pq.write_table(table, tmp_path / "shard_00016.parquet")
    shards = open_shards(tmp_path)
    assert [shard.path.name for shard in shards.train] == [f"shard_{n:05d}.parquet" for n in range(3)]
    assert shards.validation.path.name == "shard_00003.parquet"
    assert set(shards.skipped) == {*bad, "shard_00016.parquet"}
    assert shards.skipped["shard_00013.parquet"] == "no column named text, but content"
    assert shards.skipped["shard_00014.parquet"] == "empty"
    assert shards.skipped["shard_00015.parquet"] == "a copy of shard_00000.parquet"
    assert shards.skipped["shard_00016.parquet"] == "column text is int64, not string"
    assert "left out shard_00010.parquet: torn" in capsys.readouterr().out
    told = open_texts("train", tmp_path).told()
    assert len(told) == len(bad) + 1 and "shard_00014.parquet: empty" in told, "the report counts them"


def test_without_two_readable_shards_the_cure_is_named(tmp_path: Path) -> None:
    for count in (0, 1):
        write_shards(tmp_path, count)
        with pytest.raises(UserError, match=f"holds {count} readable shards .*nanochat.dataset"):
            open_shards(tmp_path)
    with pytest.raises(UserError, match="holds 0 readable"):
        open_shards(tmp_path / "nowhere")


def test_a_document_that_is_not_utf8_is_empty_and_counted(tmp_path: Path) -> None:
    write_shards(tmp_path, 2)
    broken = pa.array([b"good", b"\xff\xfe\xfa", b"also good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "shard_00000.parquet")
    read = open_texts("train", tmp_path)
    assert [read[n] for n in range(3)] == ["good", "", "also good"]
    assert dict(read.skipped) == {"shard_00000.parquet row group 0: not UTF-8": 1}
    assert list(texts("train", directory=tmp_path)) == ["good", "also good"]


def test_a_row_group_altered_in_the_middle_costs_only_its_own_documents(tmp_path: Path) -> None:
    write_shards(tmp_path, 2)
    path = tmp_path / "shard_00000.parquet"
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    begin = group.dictionary_page_offset or group.data_page_offset
    data[begin : begin + 12] = b"\xff" * 12
    path.write_bytes(bytes(data))
    read = open_texts("train", tmp_path)
    assert [read[n] for n in range(10)] == [*documents(0)[:3], "", "", "", *documents(0)[6:]]
    assert list(read.skipped.values()) == [3]
    assert read.told() == ["3 documents of shard_00000.parquet row group 1: unreadable"]


def test_missing_values_are_empty_documents(tmp_path: Path) -> None:
    write_shards(tmp_path, 2)
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "shard_00000.parquet")
    assert list(texts("train", directory=tmp_path)) == ["a", "b"]


def test_sources_are_mixed_by_their_share_of_characters() -> None:
    long, short = itertools.repeat("x" * 700), itertools.repeat("y" * 30)
    drawn = list(itertools.islice(mixed_texts([(0.75, long), (0.25, short)]), 3000))
    counted = Counter(character for text in drawn for character in text)
    assert abs(counted["x"] / counted.total() - 0.75) < 0.005


def test_a_mixture_is_the_same_again_and_ends_with_its_first_dry_source() -> None:
    def mixture() -> Iterator[str]:
        return mixed_texts([(1, iter(["aa", "b", "ccc"])), (2, iter(str(n) for n in range(99)))])

    once = list(mixture())
    assert once == list(mixture())
    assert [text for text in once if text.isalpha()] == ["aa", "b", "ccc"]


def test_shares_must_be_shares() -> None:
    for shares in ([], [-1, 2], [0, 0]):
        with pytest.raises(UserError, match="do not mix"):
            next(mixed_texts([(share, iter("a")) for share in shares]))
    assert "".join(mixed_texts([(0, iter("a")), (1, iter("bcd"))])) == "bcd"
