import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.errors import MessageRefused
from fedgrade.federation import pieces
from fedgrade.federation.pieces import cut, join, most_pieces

SMALL = 10


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", SMALL)


def at(place, content=b"x"):
    return {"envelope": content, "place": place}


@given(st.binary(max_size=100), st.randoms(use_true_random=False))
def test_pieces_in_any_order_make_the_envelope_that_was_cut(envelope, chance):
    made = cut(envelope)
    assert len(made) == most_pieces(len(envelope))
    assert all(len(piece["envelope"]) <= SMALL for piece in made)
    chance.shuffle(made)
    assert join(made) == envelope


def test_no_two_pieces_are_alike_whatever_they_hold():
    made = cut(bytes(5 * SMALL))
    assert len({tuple(piece.items()) for piece in made}) == len(made) == 5


def test_one_piece_is_not_copied_again():
    (piece,) = cut(b"an" * (SMALL // 2))
    assert join([piece]) is piece["envelope"]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([], "only \\[\\] came"),
        ([at(1)], "only \\[1\\] came"),
        ([at(0), at(2)], "only \\[0, 2\\] came"),
        ([at(-1), at(0)], "came"),
        ([at(0), at(0)], "comes twice"),
        ([at(0, b"x" * (SMALL + 1))], "exceeds 10 bytes"),
        ([at(0, "text")], "expected two fields"),
        ([at(0, bytearray(b"x"))], "expected two fields"),
        ([at("0")], "expected two fields"),
        ([at(True)], "expected two fields"),
        ([at(0.0)], "expected two fields"),
        ([{"envelope": b"x"}], "expected two fields"),
        ([at(0) | {"more": 1}], "expected two fields"),
        ([at(place, b"x" * SMALL) for place in range(4)], "over 40 bytes: at most 35"),
    ],
)
def test_anything_else_is_refused(found, says):
    with pytest.raises(MessageRefused, match=says):
        join(found, max_bytes=35)


def test_an_endless_row_of_pieces_is_given_up_at_the_limit():
    taken = []

    def endless():
        while True:
            taken.append(at(len(taken), b"x" * SMALL))
            yield taken[-1]

    with pytest.raises(MessageRefused, match="at most 95"):
        join(endless(), max_bytes=95)
    assert len(taken) == most_pieces(95)
