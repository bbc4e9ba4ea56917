"""Convolutions of all kinds, for hypothesis."""

from hypothesis import strategies as st

CONVOLUTIONS = {
    "kernel": st.integers(1, 5),
    "stride": st.integers(1, 3),
    "padding": st.integers(0, 3),
    "dilation": st.integers(1, 2),
    "groups": st.sampled_from([1, 1, 2, 4]),
    "height": st.integers(9, 20),
    "width": st.integers(9, 37),
    "threads": st.integers(1, 4),
}
