"""The pool of large tensors: places that never overlap, next to no holes, gradients that are PyTorch's."""
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from processes import run_python

from fastgpt import GPT, GPTConfig, memory, ops, pooled

LARGE = memory.LARGE // 4  # float32


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(memory, "_pool", memory.Pool(1 << 30))
    return memory._pool


def inside(pool, tensor):
    begin = torch.frombuffer(pool.memory, dtype=torch.uint8).data_ptr()
    return begin <= tensor.data_ptr() < begin + len(pool.memory)


def end_of(pool):
    """The bytes up to the last place that is taken, once what was given back has been joined."""
    memory.empty((LARGE,), torch.float32)
    memory.empty((LARGE,), torch.float32)
    return pool.free[-1][0]


def test_places_do_not_overlap_and_all_come_back(pool):
    generator, held = random.Random(0), {}
    for number in range(400):
        if generator.random() < 0.45 and held:
            name = generator.choice(list(held))
            assert bool((held.pop(name) == name).all())
        else:
            shape = (generator.randint(LARGE, 2 * LARGE),)
            held[number] = memory.empty(shape, torch.float32).fill_(number)
    assert all(bool((t == name).all()) for name, t in held.items()) and len(pool.free) > 1
    held.clear()
    t = memory.empty((LARGE,), torch.float32)
    assert pool.free == [(4 * LARGE, 1 << 30)] and t.data_ptr() % 64 == 0


def test_threads_share_it(pool):
    def work(number):
        for _ in range(200):
            t = memory.empty((LARGE,), torch.float32)
            t[::1024] = number
            wrong.extend(t[::1024][t[::1024] != number].tolist())

    wrong = []
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and end_of(pool) <= 4 * LARGE * 2


def test_small_tensors_and_those_without_room_are_pytorchs(pool):
    assert memory.empty((LARGE - 1,), torch.float32).shape == (LARGE - 1,)
    assert memory.empty((1 << 28, 2), torch.float32).shape == (1 << 28, 2)
    assert not pool.taken


def test_without_addresses_there_is_no_pool(monkeypatch):
    def refuse(size):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(memory, "_pool", None)
    monkeypatch.setattr(memory, "Pool", refuse)
    memory.start()
    assert memory.empty((LARGE,), torch.float32).shape == (LARGE,) and memory._pool is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode, pool):
    x, weight = torch.randn(2000, 300), torch.randn(300, 300)
    with mode():
        y = ops.linear(x, weight)
    assert pool.taken
    assert torch.equal(y[:9], ops.linear(x[:9], weight))


def test_a_view_keeps_the_place(pool):
    view = memory.empty((4, LARGE), torch.float32).fill_(7)[1, 3:9]
    others = [memory.empty((LARGE,), torch.float32).zero_() for _ in range(9)]
    assert (view == 7).all() and len(others) == 9


def test_tensors_lie_as_asked_and_are_no_views(pool):
    t = memory.empty((2, 3, LARGE, 5), torch.bfloat16, stride=(15 * LARGE, 5, 15, 1))
    assert t.stride() == (15 * LARGE, 5, 15, 1) and t.dtype == torch.bfloat16 and not t._is_view()
    assert memory.empty((3, LARGE), torch.float32).is_contiguous()


def test_zeros_take_memory_where_they_are_written():
    result = run_python("""
import torch
from fastgpt import memory
def resident():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
memory.untouched_zeros((2, 2), torch.float32)
before = resident()
zeros = memory.untouched_zeros((50_000, 768), torch.float32)
zeros[::100] += 1
assert zeros.sum().item() == 500 * 768
print(resident() - before)
""")
    assert int(result.stdout) < 8 << 10  # KB, of 150 MB


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_embeddings(tied, pool):
    """A tied one is added in place, where no one else needs the head's gradient: not in a graph that is kept."""
    V, C = 4000, 256
    weight, head = (torch.randn(V, C, requires_grad=True) for _ in range(2))
    ids = torch.randint(V // 2, (3, 50))
    leaves = [weight] if tied else [weight, head]

    def gradients(lookup, times=1):
        loss = ops.cross_entropy(lookup(ids, weight), leaves[-1], ids)
        return [torch.autograd.grad(loss, leaves, retain_graph=n + 1 < times) for n in range(times)]

    expected, = gradients(F.embedding)
    alone, = gradients(pooled.embedding)
    for actual in (alone, *gradients(pooled.embedding, times=2)):
        torch.testing.assert_close(actual, expected)
    assert inside(pool, alone[-1])  # the head's, in its place


def test_the_gradients_of_heads(pool):
    qkv = torch.randn(2, 300, 3 * 4 * 80, requires_grad=True)
    q, k, v = pooled.split_heads(qkv, 4)
    expected = (part.view(2, 300, 4, 80).transpose(1, 2) for part in qkv.split(320, dim=2))
    assert all(map(torch.equal, (q, k, v), expected))
    weights = torch.randn(3, 2, 4, 300, 80)
    gradient, = torch.autograd.grad(sum((w * part).sum() for w, part in zip(weights, (q, k, v))), qkv)
    assert torch.equal(gradient, torch.cat([w.transpose(1, 2).reshape(2, 300, 320) for w in weights], dim=2))


def test_casts_lie_in_it(pool):
    x = torch.randn(1500, 1000, requires_grad=True)
    y, dy = pooled.cast(x, torch.bfloat16), torch.randn(1500, 1000).bfloat16()
    dx, = torch.autograd.grad(y, x, dy)
    assert inside(pool, y) and inside(pool, dx)
    assert torch.equal(y, x.bfloat16()) and torch.equal(dx, dy.float())
    assert pooled.cast(x, torch.float32) is x


def model_and_tokens():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=3000, n_layer=4, n_head=4, n_embd=512))
    return model, torch.randint(3000, (8, 257))


def train_step(model, tokens):
    _, loss = model(tokens[:, :-1], tokens[:, 1:].contiguous(), return_logits=False)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return gradients


def test_a_training_step_leaves_few_holes(pool, monkeypatch):
    model, tokens = model_and_tokens()
    taken, most = 0, 0
    take, join = pool._take, pool._join

    def counted(size):
        nonlocal taken, most
        place = take(size)
        taken += size
        most = max(most, taken)
        return place

    def returned(begin, end):
        nonlocal taken
        taken -= end - begin
        join(begin, end)

    monkeypatch.setattr(pool, "_take", counted)
    monkeypatch.setattr(pool, "_join", returned)
    ends = []
    for _ in range(3):
        model(tokens[:, :-1], tokens[:, 1:].contiguous(), return_logits=False)[1].backward()
        ends.append(max((begin for begin, _ in pool.free), default=0))
        model.zero_grad(set_to_none=True)
    assert most > 100 << 20 and max(ends) < 1.1 * most


def test_a_model_trains_to_the_same_bits_in_it(monkeypatch):
    plain = train_step(*model_and_tokens())
    monkeypatch.setattr(memory, "_pool", memory.Pool(1 << 30))
    pooled = train_step(*model_and_tokens())
    for ours, theirs in zip(pooled[1:], plain[1:]):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(pooled[0], plain[0])  # the tied weight's rows are summed in another order
