"""Whether two hosts run the same code."""

import sys

from ds_ring.utils.code_digest import code_digest, digest_of


def copy_of(folder, **files):
    for name, text in files.items():
        file = folder / "ds_ring" / "engine" / name.replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return [folder / "ds_ring"]


def test_the_same_files_in_another_folder_are_the_same_code(tmp_path):
    first = copy_of(tmp_path / "a", one_py="x = 1\n", two_cu="//\n")
    (tmp_path / "a/ds_ring/engine/one.pyc").write_bytes(b"compiled")
    assert digest_of(first) == digest_of(copy_of(tmp_path / "b", one_py="x = 1\n", two_cu="//\n"))


def test_content_names_and_kernels_all_count(tmp_path):
    copies = {"a": {"one_py": "x = 1\n"}, "b": {"one_py": "x = 2\n"}, "c": {"two_py": "x = 1\n"}}
    copies["d"] = copies["a"] | {"two_cu": "//\n"}
    assert len({digest_of(copy_of(tmp_path / name, **files)) for name, files in copies.items()}) == 4


def test_benchmarks_count_where_they_are_in_use(monkeypatch):
    import benchmarks

    monkeypatch.setitem(sys.modules, "benchmarks", benchmarks)
    both = code_digest()
    monkeypatch.delitem(sys.modules, "benchmarks")
    assert len(both) == 16
    assert both != code_digest()
