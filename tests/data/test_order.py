import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vitpipe.contracts.errors import InputError
from vitpipe.contracts.seeds import seed_of
from vitpipe.data.order import epoch_order, eval_chunks, train_chunks

sizes = st.integers(1, 300)
seeds = st.integers(0, 5)


def chunks(num_samples, *, seed=0, micro_batch=2, accumulation=1, num_ranks=1, rank=0, start=0, steps=5):
    return list(
        train_chunks(
            num_samples,
            seed=seed,
            global_batch=micro_batch * accumulation * num_ranks,
            micro_batch=micro_batch,
            rank=rank,
            num_ranks=num_ranks,
            start_step=start,
            num_steps=steps,
        )
    )


@given(sizes, seeds, st.integers(0, 50))
def test_an_epoch_is_a_permutation(num_samples, seed, epoch):
    order = epoch_order(seed, epoch, num_samples)
    assert sorted(order.tolist()) == list(range(num_samples))
    assert (order == epoch_order(seed, epoch, num_samples)).all()


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(seed, epoch, 50).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(sizes, seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_a_step_has_the_same_chunks_for_any_number_of_ranks(
    num_samples, seed, micro_batch, accumulation, num_ranks
):
    rounds = accumulation * num_ranks
    assume(num_samples >= micro_batch * rounds)
    alone = chunks(num_samples, seed=seed, micro_batch=micro_batch, accumulation=rounds)
    together = [
        chunk
        for rank in range(num_ranks)
        for chunk in chunks(
            num_samples,
            seed=seed,
            micro_batch=micro_batch,
            accumulation=accumulation,
            num_ranks=num_ranks,
            rank=rank,
        )
    ]
    assert sorted(alone) == sorted(together)


@given(sizes, st.integers(1, 4), st.integers(1, 3), st.integers(0, 12))
def test_a_resumed_run_sees_exactly_the_tail(num_samples, micro_batch, accumulation, start):
    assume(num_samples >= micro_batch * accumulation)
    whole = chunks(num_samples, micro_batch=micro_batch, accumulation=accumulation, steps=12)
    tail = chunks(num_samples, micro_batch=micro_batch, accumulation=accumulation, steps=12, start=start)
    assert tail == whole[start * accumulation :]


@given(sizes, st.integers(1, 20))
def test_no_sample_comes_twice_in_an_epoch(num_samples, global_batch):
    assume(num_samples >= global_batch)
    steps_per_epoch = num_samples // global_batch
    seen = [
        i
        for chunk in chunks(num_samples, micro_batch=global_batch, steps=steps_per_epoch)
        for i in chunk.indices
    ]
    assert len(seen) == len(set(seen)) == steps_per_epoch * global_batch


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_sees_every_sample_once(num_samples, batch, num_ranks):
    seen = [
        index
        for rank in range(num_ranks)
        for chunk in eval_chunks(num_samples, batch=batch, rank=rank, num_ranks=num_ranks)
        for index in chunk.indices
    ]
    assert sorted(seen) == list(range(num_samples))


def test_impossible_batches_are_refused():
    with pytest.raises(InputError, match="not a multiple"):
        list(train_chunks(
            100, seed=0, global_batch=10, micro_batch=4, rank=0, num_ranks=1, start_step=0, num_steps=1
        ))  # fmt: skip
    with pytest.raises(InputError, match="fewer than one global batch"):
        chunks(3, micro_batch=4)


def test_seeds_tell_parts_apart():
    parts = [("a", 1), ("a", 11), ("a1", 1), ("a", "1"), (1, "a"), ("a", 1, 1), ("a", -1)]
    assert len({seed_of(*part) for part in parts}) == len(parts)
    # A fixed value: seeds must not change between versions or machines.
    assert seed_of("order", 0, 1) == 1_953_072_085_611_776_627
