import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.errors import DocumentRefused
from server.nodes_file import NAME, read_nodes, write_nodes


@given(st.dictionaries(st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True), st.integers(1, 2**64 - 1), max_size=8))
def test_what_was_written_is_read(tmp_path_factory, nodes):
    folder = tmp_path_factory.mktemp("run")
    distinct = {site: node for node, site in {node: site for site, node in nodes.items()}.items()}
    write_nodes(folder, distinct)
    assert read_nodes(folder) == distinct
    assert [path.name for path in folder.iterdir()] == [NAME]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a": "1"}',
        '{"a": 1.5}',
        '{"a": true}',
        '{"a": 0}',
        '{"a": -1}',
        f'{{"a": {2**64}}}',
        '{"a": 1, "b": 1}',
        '{"../a": 1}',
        '{"": 1}',
        "[" * 100_000,
        " " * 1_100_000,
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
def test_anything_else_is_refused(tmp_path, text):
    (tmp_path / NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DocumentRefused):
        read_nodes(tmp_path)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(DocumentRefused, match="enrol the sites first"):
        read_nodes(tmp_path)
